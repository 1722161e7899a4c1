"""Invariant 4: same science, same name."""

import dataclasses
import json
from pathlib import Path

import pytest

from harness.config import (
    SERVICE,
    ActivationsConfig,
    Config,
    MeshConfig,
    SaeConfig,
    SyntheticConfig,
    TrackerConfig,
    TrainConfig,
    from_container,
    run_id,
    science,
    to_container,
)

RECORDED = Path(__file__).parents[1] / "analysis" / "data" / "recorded_quick"
"""A sweep of version 0.1.0."""


def config(**changes: object) -> Config:
    base = Config(
        sae=SaeConfig(architecture="topk", n_latents=256, k=8),
        activations=ActivationsConfig(kind="synthetic"),
        train=TrainConfig(tokens=1e6, precision="fp32"),
    )
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


def test_golden_names() -> None:
    """These names are on people's disks: a change here means that finished runs are trained again."""
    assert run_id(config(), "0123456789abcdef") == "topk-n256-k8-s0-28f0cbd6c0"
    switch = SaeConfig(architecture="switch", n_latents=1024, k=16, n_experts=8, balance_weight=0.03)
    train = TrainConfig(tokens=2e6, precision="bf16", seed=3, lr_factor=4.0)
    assert run_id(config(sae=switch, train=train), "0123456789abcdef") == "switch-n1024-k16-e8-s3-90319767c8"


def test_defaults_do_not_enter() -> None:
    assert science(config()) == {
        "sae": {"architecture": "topk", "n_latents": 256, "k": 8},
        "activations": {"kind": "synthetic"},
        "train": {"tokens": 1e6, "precision": "fp32"},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": MeshConfig(dp=2, shard=4)},
        {"tracker": TrackerConfig(name="none", tags=["x"])},
        {"sweep": "other", "out": "elsewhere"},
        {"ops": "reference"},
        {"train": TrainConfig(tokens=1e6, precision="fp32", threads=7, log_every_steps=1, keep_checkpoints=True)},
        {"activations": ActivationsConfig(kind="synthetic", dir="/x", lm_batch=3)},
    ],
)
def test_service_settings_do_not_rename(change: dict[str, object]) -> None:
    assert run_id(config(**change), "s") == run_id(config(), "s")


@pytest.mark.parametrize(
    "change",
    [
        {"sae": SaeConfig(architecture="topk", n_latents=256, k=8, enc_bias=False)},
        {"train": TrainConfig(tokens=1e6, precision="bf16")},
        {"train": TrainConfig(tokens=1e6, precision="fp32", lr=1e-3)},
    ],
)
def test_scientific_settings_rename(change: dict[str, object]) -> None:
    assert run_id(config(**change), "s") != run_id(config(), "s")


def test_peers_rename_and_their_order_does_not() -> None:
    def named(**settings: object) -> str:
        return run_id(config(train=TrainConfig(tokens=1e6, precision="fp32", **settings)), "s")  # pyright: ignore

    pair = named(mfr_weight=1.0, mfr_seeds=[1, 0])
    assert pair == named(mfr_weight=1.0, mfr_seeds=[0, 1])
    assert (
        len({pair, named(), named(mfr_weight=1.0, mfr_seeds=[0, 1, 2]), named(mfr_weight=2.0, mfr_seeds=[0, 1])}) == 4
    )
    assert named(mfr_seeds=[0, 1]) == named(), "without a weight they mean nothing"


def test_the_store_renames() -> None:
    assert run_id(config(), "a") != run_id(config(), "b")


def test_every_field_has_chosen_a_side() -> None:
    """Service fields are listed here, so that a new field that changes results cannot stay out of the name unseen."""

    def service(cls: type, prefix: str = "") -> set[str]:
        return {prefix + f.name for f in dataclasses.fields(cls) if f.metadata == SERVICE}

    assert service(Config) == {"mesh", "cluster", "tracker", "ops", "sweep", "out"}
    assert service(SaeConfig) == set()
    assert service(SyntheticConfig) == set()
    assert service(ActivationsConfig) == {
        *("shard_rows", "lm_batch", "lm_precision", "rows_precision", "device_map", "dir", "store"),
    }
    assert service(TrainConfig) == {
        *("device", "threads", "log_every_steps", "checkpoint_every_s", "checkpoint_every_steps", "keep_checkpoints"),
        "cuda_graph",
        "init_from",  # `init_hash`, the content, is science
    }


def test_a_frozen_configuration_reads_back_equal() -> None:
    assert from_container(to_container(config())) == config()


def test_runs_of_an_earlier_version_keep_their_names() -> None:
    results = [json.loads(path.read_text()) for path in RECORDED.glob("*/result.json")]
    assert len(results) == 30
    for result in results:
        assert run_id(from_container(result["config"]), result["store_id"]) == result["run_id"]
