"""End-to-end objectives: gradients against dense autograd, whole contexts, FLOPs, kills, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.store.paths import store_path
from harness.activations.whole_contexts import ContextBatch, Weights, WholeContexts
from harness.config import ActivationsConfig, run_id
from harness.errors import UserError
from harness.launch import main
from harness.parallel import Solo
from harness.process.signals import StopFlag
from harness.saes import Normalizer, Sae, find_dead, step
from harness.training.end_to_end import WEIGHTS, EndToEnd
from harness.training.state import TrainState
from tests.activations.conftest import GPT, VOCABULARY, one_thread, save_tokenizer, text_files
from tests.grid.test_run_id import config as any_config
from tests.saes.dense import dense_loss
from tests.saes.dense_catalogue import catalogue_loss
from tests.saes.test_catalogue import make_sae, random_params
from tests.tiny import TINY
from tests.training.members import runtime

__all__ = ["one_thread", "text_files"]

CPU, LAYER, CONTEXT, ROWS = torch.device("cpu"), 0, 16, 40
"""40 rows are two contexts of 15 rows and ten rows of a third."""


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of three blocks with random weights: in float64 it computes everything in float64."""
    directory = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT, n_positions=64, vocab_size=len(VOCABULARY), bos_token_id=2, eos_token_id=3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.constant_(model.transformer.ln_f.weight, 3.0)  # probabilities far from uniform
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


Opened = tuple[ActivationSource, ActivationsConfig, Path]


@pytest.fixture(scope="module")
def opened(causal: Path, text_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A store, and where its contexts are kept."""
    out = tmp_path_factory.mktemp("out")
    cfg = ActivationsConfig(
        model=str(causal),
        layer=LAYER,
        text="files",
        text_paths=[f"{text_files}/*.txt"],
        context=CONTEXT,
        tokens=3000,
        heldout_tokens=300,
        dtype="fp32",
        lm_precision="fp32",
    )
    store = open_source(cfg, out, progress=False, stop=StopFlag())
    return store, cfg, store_path(cfg, out).with_suffix(".contexts.npy")


@pytest.fixture(scope="module")
def contexts(opened: Opened) -> WholeContexts:
    """In float64."""
    found = WholeContexts(*opened, ROWS, CPU)
    assert torch.equal(found.ids_of(3, 5), WholeContexts(*opened, ROWS, CPU).ids_of(3, 5))
    found.model.hooked.model.double()
    return found


def test_batches_are_whole_contexts_and_a_pure_function(contexts: WholeContexts) -> None:
    stream = contexts.stream(1, ROWS, CPU)
    batches = stream.batches(0)
    first = [next(batches) for _ in range(2)]
    assert [int(batch.replaced.sum()) for batch in first] == [ROWS, ROWS] and first[0].ids.shape == (3, CONTEXT)
    assert not first[0].replaced[:, 0].any() and not first[0].replaced[2, 11:].any()
    assert torch.equal(stream.batch(1).ids, first[1].ids) and torch.equal(stream.batch(1).hidden, first[1].hidden)
    assert not torch.equal(contexts.stream(2, ROWS, CPU).batch(1).ids, first[1].ids)
    # an epoch sees every context once
    count = len(contexts._ids)
    epoch = torch.cat([contexts.ids_of(number, 1) for number in range(-(-count // 3))])[:count]
    assert np.array_equal(np.unique(epoch.numpy(), axis=0), np.unique(contexts._ids, axis=0)) and count > 100


def test_replacing_rows_by_themselves_does_nothing(contexts: WholeContexts) -> None:
    batch = contexts.stream(0, ROWS, CPU).batch(0)
    effects = batch.effects(batch.rows, Weights(0.5, 2.5))
    assert float(effects.kl) == 0.0 and float(effects.later) == 0.0
    assert float(effects.gradient.abs().max()) < 1e-12
    # in several passes the same as in one
    other = batch.rows + torch.randn(batch.rows.shape, generator=torch.Generator().manual_seed(0)).double()
    one = batch.effects(other, Weights(0.5, 2.5))
    single = dataclasses.replace(batch, source=_with(contexts, contexts_per_pass=1))
    for a, b in zip(one, single.effects(other, Weights(0.5, 2.5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert float(one.kl) > 0.01 and float(one.later) > 0.01


def _with(contexts: WholeContexts, **changes: Any) -> WholeContexts:
    other = object.__new__(WholeContexts)
    other.__dict__.update(contexts.__dict__ | changes)
    return other


def dense_effects(
    contexts: WholeContexts, batch: ContextBatch, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and mean later error per row from the whole model with one value replaced, by torch's autograd."""
    model: Any = contexts.model.hooked.model

    def run(replacement: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        values: list[torch.Tensor] = []

        def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            return None if replacement is None else output.masked_scatter(batch.replaced[..., None], replacement)

        blocks = model.transformer.h
        handles = [blocks[LAYER].register_forward_hook(replace)]
        handles += [
            block.register_forward_hook(lambda _m, _i, output: values.append(output)) for block in blocks[LAYER + 1 :]
        ]
        logits = model(input_ids=batch.ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits, values

    with torch.no_grad():
        clean, before = run(None)
    logits, after = run(rows)
    p, q = torch.softmax(clean, dim=-1), torch.softmax(logits, dim=-1)
    errors = [(a - b).square().sum() / v for a, b, v in zip(after, before, contexts.later_variance, strict=True)]
    return (p * (p.log() - q.log())).sum() / ROWS, torch.stack(errors).mean() / ROWS


@pytest.mark.parametrize("objective", WEIGHTS)
@pytest.mark.parametrize("name", ["topk", "switch", "jumprelu", "relu_decoder_norm"])
@pytest.mark.parametrize("rule", ["scale", "layernorm"])
def test_the_whole_gradient_equals_dense_autograd(
    name: str, objective: str, rule: str, contexts: WholeContexts
) -> None:
    """With AuxK, balance and penalties, through the normaliser and the language model."""
    generator = torch.Generator().manual_seed(7)
    sae = Sae("switch", 16, 32, 3, 4, True, 2.0, 1 / 32, 5, 0.3) if name == "switch" else make_sae(name, d_model=16)
    params = random_params(sae, generator)
    batch = contexts.stream(0, ROWS, CPU).batch(2)
    normalizer = Normalizer(rule, 3.0 if rule == "scale" else 1.0)
    x = normalizer(batch.rows, torch.float64)
    silent = torch.arange(32) % 3 == 0
    grads = {key: torch.full_like(value, torch.nan) for key, value in params.items()}
    told = EndToEnd(WEIGHTS[objective], batch, normalizer, x)
    stats = step(
        sae,
        params,
        params,
        x,
        runtime(),
        find_dead(sae, silent, Solo(), runtime().ops),
        grads,
        sparsity=0.07,
        objective=told,
    )

    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    shared = {"k": sae.k, "variance": sae.variance, "aux_alpha": sae.aux_alpha, "aux_k": sae.aux_k, "dead": silent}
    if name == "switch":
        expected = dense_loss(leaves, x, n_experts=4, balance_weight=0.3, **shared)
        reconstruction = expected["reconstruction"]
    else:
        expected = catalogue_loss(leaves, x, architecture=name, sparsity=0.07, bandwidth=sae.bandwidth, **shared)
        reconstruction = expected["z"] @ leaves["W_dec"] + leaves["b_dec"]
    kl, later = dense_effects(contexts, batch, normalizer.undo(reconstruction, normalizer.units(batch.rows)))
    own = WEIGHTS[objective].kl * kl + WEIGHTS[objective].later * later
    loss = expected["loss"] - expected["fvu"] + own
    loss.backward()
    found = (stats.loss, stats.fvu, stats.measured["kl"])
    for value, right in zip(found, (loss, expected["fvu"], kl), strict=True):
        torch.testing.assert_close(value, right.detach(), rtol=1e-9, atol=1e-9)
    for key, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-6, key
        torch.testing.assert_close(grads[key], leaf.grad, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


class Counted(TorchDispatchMode):
    """FLOPs of all products, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_flops_of_the_suffix_are_counted(contexts: WholeContexts) -> None:
    batch = contexts.stream(0, ROWS, CPU).batch(0)
    model: Any = contexts.model.hooked.model
    model.set_attn_implementation("eager")
    with Counted() as counted:
        batch.effects(batch.rows, Weights(1.0, 0.0))
    assert contexts.flops_per_row * ROWS == counted.flops


def words(causal: Path, text_files: Path, out: Path, *further: str) -> list[str]:
    kept = [word for word in TINY if not word.startswith("activations")]
    return [
        *("activations=lm", f"activations.model={causal}", "activations.layer=0", "activations.text=files"),
        *(f"activations.text_paths=[{text_files}/*.txt]", "activations.context=16", "activations.lm_precision=fp32"),
        *("activations.tokens=3000", "activations.heldout_tokens=300", "activations.dtype=fp32"),
        *(*kept, "train.batch_tokens=128", "train.tokens=2560", f"out={out}", *further),
    ]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(
    causal: Path, text_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuned from a local SAE; the KL falls, and the record has the FLOPs of the language model."""
    out = tmp_path / "out"
    assert main(words(causal, text_files, out)) == 0
    (local,) = (path.parent for path in out.glob("t/*/config.yaml"))
    further = ("train.objective=e2e_downstream", f"train.init_from={local}", "train.lr=0.002", "sweep=e2e")
    assert main(words(causal, text_files, out, *further)) == 0
    (whole,) = (path.parent for path in out.glob("e2e/*/config.yaml"))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl"] for line in lines if "kl" in line]
    assert kl[-1] < kl[0] and all(line["later_fvu"] > 0 for line in lines if "kl" in line)
    flops = [json.loads((path / "result.json").read_text())["flops"] for path in (local, whole)]
    assert flops[1] > 1.5 * flops[0]

    stopped = [*further[:-1], "sweep=cut", "train.checkpoint_every_steps=3"]
    train_step = TrainState.train_step

    def until_seven(member: TrainState, *arguments: Any) -> None:
        train_step(member, *arguments)
        if member.done == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "train_step", until_seven)
        assert main(words(causal, text_files, out, *stopped)) != 0
    assert list(out.glob("cut/*/checkpoints/*06")) and not list(out.glob("cut/*/result.json"))
    assert main(words(causal, text_files, out, *stopped)) == 0
    (cut,) = (path.parent for path in out.glob("cut/*/config.yaml"))
    assert (cut / "sae/sae.safetensors").read_bytes() == (whole / "sae/sae.safetensors").read_bytes()
    assert cut.name == whole.name != local.name


def test_names_of_local_runs_stay() -> None:
    base = any_config()
    local, other = (
        dataclasses.replace(base, train=dataclasses.replace(base.train, objective=objective))
        if objective == "local"
        else dataclasses.replace(
            base,
            activations=ActivationsConfig(kind="lm", model="m"),
            train=dataclasses.replace(base.train, objective=objective),
        )
        for objective in ("local", "e2e")
    )
    assert run_id(local, "0123456789abcdef") == "topk-n256-k8-s0-28f0cbd6c0"
    assert run_id(other, "0123456789abcdef") != run_id(local, "0123456789abcdef")


@pytest.mark.parametrize(
    ("further", "told"),
    [
        (["mesh.dp=2"], "trains in one process; set mesh.dp=1"),
        (["activations.hook=mlp_out"], "needs the residual stream of a causal language model"),
        (["activations.outlier_factor=10"], "needs activations.keep=store and activations.outlier_factor=0"),
        (["sae=matryoshka"], "is for SAEs with one reconstruction, not for matryoshka"),
        (["train.tokens=0", "train.flops=1e12"], "the budget is train.tokens"),
    ],
)
def test_what_is_not_defined_is_refused_in_one_line(
    further: list[str],
    told: str,
    causal: Path,
    text_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(causal, text_files, tmp_path, "train.objective=e2e", *further)) == 2
    assert told in capsys.readouterr().err


def test_what_only_the_text_and_the_model_tell_is_refused_too(opened: Opened, tmp_path: Path) -> None:
    store, cfg, file = opened
    with pytest.raises(UserError, match="takes 200 whole contexts, and the text has"):
        WholeContexts(store, cfg, file, 3000, CPU)
    last = WholeContexts(store, dataclasses.replace(cfg, layer=2), file, ROWS, CPU)
    with pytest.raises(UserError, match="no block comes after"):
        _ = last.later_variance
    (tmp_path / "a.contexts.npy").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a.contexts.npy cannot be read .*; delete it"):
        WholeContexts(store, cfg, tmp_path / "a.contexts.npy", ROWS, CPU)
