"""Invariant 7: a step does not wait for the device, beyond what is listed here."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from harness.ops import choose_ops
from harness.parallel import Solo
from harness.process.device import pick_device
from harness.training.state import TrainState, make_state
from tests.ops.sets import kernel_set
from tests.training.members import runtime, small_config, source_of

WAITS = (
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "argwhere", "masked_select"),
    *("bincount", "unique", "equal", "allclose", "is_nonzero", "repeat_interleave"),
)
"""Functions of a tensor that need its numbers, or a size that depends on them, on the host."""

SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}


class Waits(TorchFunctionMode):
    """Counts the calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def make(changes: dict[str, Any], kernels: str, device: str = "cpu") -> tuple[TrainState, torch.Tensor]:
    """A member whose AuxK has work from the third step on, and a batch. Refreshes at steps 0, 3, 6 …"""
    config = small_config(sae__dead_after_tokens=100, train__device=device, **changes)
    source = source_of(config)
    on = pick_device(device)
    ops = choose_ops("triton", on) if device == "cuda" else kernel_set(kernels)
    member = make_state(config, source, runtime(Solo(), ops, on))
    with source.stream(0, 64, on, 0, 1) as stream:
        return member, next(iter(stream.batches(0)))


@pytest.mark.parametrize(
    ("changes", "kernels", "waits"),
    [
        # the CPU kernels read the tokens of each group, and again for AuxK; on CPU tensors nobody waits for that
        ({}, "cpu", {"tolist": 2}),
        ({}, "triton", {}),
        (SWITCH | {"train__clip_norm": 0.5, "train__ema": 0.9}, "triton", {}),
        (SWITCH, "cpu", {"tolist": 2}),
    ],
    ids=["topk-cpu", "topk-triton", "switch-triton", "switch-cpu"],
)
def test_a_step_waits_for_nothing_else(changes: dict[str, Any], kernels: str, waits: dict[str, int]) -> None:
    member, batch = make(changes, kernels)
    here = runtime(Solo(), kernel_set(kernels))
    for _ in range(4):
        member.train_step(batch, here)
    assert member._dead_latents is not None, "AuxK takes part"
    for _ in range(2):
        with Waits() as found:
            member.train_step(batch, here)
        assert dict(found.counted) == waits
    with Waits() as refresh:
        member.train_step(batch, here)
    lists = {} if kernels == "triton" else {"nonzero": 1}
    assert dict(refresh.counted) == {"tolist": 1 + waits.get("tolist", 0)} | lists


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, SWITCH], ids=["topk", "switch"])
def test_a_step_on_a_gpu_waits_for_nothing(changes: dict[str, Any]) -> None:
    member, batch = make(changes, "triton", "cuda")
    here = runtime(Solo(), choose_ops("triton", batch.device), batch.device)
    for _ in range(4):
        member.train_step(batch, here)
    torch.cuda.synchronize()
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            member.train_step(batch, here)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("auxk", [False, True])
@pytest.mark.parametrize("changes", [{}, SWITCH, {"train__clip_norm": 0.5, "train__ema": 0.9}])
def test_a_graph_of_the_step_gives_the_same_bits(changes: dict[str, Any], auxk: bool) -> None:
    """Also while lists of dead latents come, change and go."""
    ends, changes = [], changes if auxk else changes | {"sae__aux_alpha": 0.0}
    for graph in (False, True):
        member, batch = make(changes | {"train__cuda_graph": graph}, "triton", "cuda")
        here = runtime(Solo(), choose_ops("triton", batch.device), batch.device)
        for number in range(40):
            if auxk and number == 20:
                member.silent.zero_()
            member.train_step(batch.roll(number, 0) * (1 + number / 10), here)
        assert not graph or member._graph is not None
        ends.append(member.tensors() | {"logged": torch.tensor(member.log_line(Solo())["n_dead"])})
    for name, one in ends[0].items():
        assert torch.equal(one, ends[1][name]), name


@pytest.mark.gpu
def test_a_graph_is_captured_beside_a_thread_that_pins_memory() -> None:
    """Two members of unlike shapes, as in a pack, on a stream that is being read."""
    ends = []
    for graph in (False, True):
        changes = {"train__cuda_graph": graph, "sae__aux_alpha": 0.0}
        members = [make(SWITCH | changes, "triton", "cuda")[0], make(changes, "triton", "cuda")[0]]
        on = members[0].silent.device
        here = runtime(Solo(), choose_ops("triton", on), on)
        with source_of(members[0].config).stream(0, 64, on, 0, 1) as stream:
            for _, batch in zip(range(40), stream.batches(0), strict=False):
                for member in members:
                    member.train_step(batch, here)
        ends.append([member.tensors() for member in members])
    for eager, captured in zip(*ends, strict=True):
        for name, one in eager.items():
            assert torch.equal(one, captured[name]), name


class Replayed:
    """Stands for `StepGraph` where there is no GPU: what a kind's first step read on the host is what its later ones
    read, as in a recording; tensors are read as they are."""

    def __init__(self, member: TrainState, here: Any) -> None:
        self.member, self.here, self.kinds = member, here, {}

    def fits(self, batch: torch.Tensor) -> bool:
        return True

    def __call__(self, batch: torch.Tensor, kind: Any) -> None:
        member = self.member
        now = member.done, member._dead_latents
        member.done, member._dead_latents = self.kinds.setdefault(kind, now)
        member._compute(batch, self.here)
        member.done, member._dead_latents = now


@pytest.mark.parametrize("changes", [{}, SWITCH], ids=["topk", "switch"])
def test_a_replayed_step_takes_nothing_from_the_host(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of the step, nor its learning rate, nor which and how many latents are dead."""
    monkeypatch.setattr(TrainState, "_can_record", lambda *_: True)
    ends, kinds = [], []
    for graph in (False, True):
        member, batch = make(changes | {"train__log_every_steps": 1}, "triton")
        here = runtime(Solo(), kernel_set("triton"))
        member.optimizer.rates = torch.empty(2)
        stand_in = Replayed(member, here)
        monkeypatch.setattr(TrainState, "_step_graph", lambda *_, at=stand_in if graph else None: at)
        lines = []
        for number in range(15):
            if number == 8:
                member.silent[::3] = 0
            if number == 11:
                member.silent.zero_()
            member.train_step(batch.roll(number, 0) * (1 + number / 10), here)
            line = member.log_line(Solo())
            lines.append([line[name] for name in ("loss", "n_dead", "aux_loss")])
        ends.append(member.tensors() | {"logged": torch.tensor(lines)})
        kinds = list(stand_in.kinds)
    for name, one in ends[0].items():
        assert torch.equal(one, ends[1][name]), name
    counts = ends[0]["logged"][:, 1].unique()
    assert () in kinds and len(kinds) > 1 and len(counts) > len(kinds), "lists of one length with other latents"


def test_without_a_gpu_the_step_is_no_graph() -> None:
    plain, batch = make({}, "cpu")
    asked, _ = make({"train__cuda_graph": True}, "cpu")
    for member in (plain, asked):
        for _ in range(3):
            member.train_step(batch, runtime(Solo(), kernel_set("cpu")))
    for name, one in plain.tensors().items():
        assert torch.equal(one, asked.tensors()[name]), name
