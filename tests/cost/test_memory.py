"""The planned memory of a rank against what the real code takes: of a GPU without one, of a process on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GPU_STUDIES = ("gao2024_nk", "gao2024_16m", "gao2024_baselines", "switch2024_flop_matched", "switch2024_width_matched")
"""Those that need a cluster; the others are planned for CPUs."""


def agree(*arguments: str) -> None:
    # the tests let Triton interpret kernels, and then they need other buffers
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.bench.memory", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


PAPER = ("activations=gpt2", "train=gao2024", "tracker=none")


def test_the_plan_of_a_gpu_is_within_a_tenth_of_what_is_allocated() -> None:
    agree("activations=gpt2", "train=switch2024", "tracker=none", "sae=topk", "sae.n_latents=24576", "sae.k=32")


@pytest.mark.slow
def test_it_is_with_further_reconstructions() -> None:
    agree(*PAPER, "sae=topk,multi_topk", "sae.n_latents=2048,65536", "sae.k=32")
    # an evaluation in several tiles takes most
    agree(*PAPER, "sae=topk", "sae.n_latents=65536", "sae.k=32", "sae.aux_alpha=0", "train.batch_tokens=4096")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["mesh.shard=4", "mesh.dp=2", "train.precision=fp32", "train.ema=0"])
def test_it_is_on_a_mesh_and_in_other_precisions(mesh: str) -> None:
    agree(*PAPER, "sae=topk", "sae.n_latents=65536", "sae.k=16,256", mesh)
    if not mesh.startswith("mesh.shard"):
        agree(*PAPER, "sae=switch", "sae.n_experts=8", "sae.n_latents=65536", "sae.k=32", "train.clip_norm=1", mesh)


@pytest.mark.slow
def test_it_is_with_peers() -> None:
    peers = ("train.until=budget", "train.seed=0,1,2", "train.mfr_weight=1", "train.mfr_seeds=[0,1,2]")
    few = ("sae=topk", "sae.aux_alpha=0", "sae.k=32", "train.ema=0", "train.batch_tokens=4096")
    agree(*PAPER, *peers, *few, "sae.n_latents=262144")


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_STUDIES)
def test_it_is_for_the_shipped_studies(name: str) -> None:
    # k moves it least, and all of the 42 cells of gao2024_nk would take minutes
    few = {"gao2024_baselines": ["sae.k=32", "sae.target_l0=32"], "gao2024_16m": []}.get(name, ["sae.k=32"])
    agree("--study", name, "tracker=none", *few)


@pytest.mark.slow
def test_the_plan_of_a_cpu_is_within_a_tenth_of_what_a_process_takes() -> None:
    small = ("--device", "cpu", "activations=minilm", "train=quick", "tracker=none")
    # the sample decides, a save, half of all latents that are active at first
    agree(*small, "sae=topk,switch", "sae.n_latents=1024,32768", "sae.k=16")
    agree(*small, "sae=prolu", "sae.n_latents=4096", "sae.target_l0=32", "train.batch_tokens=256")
