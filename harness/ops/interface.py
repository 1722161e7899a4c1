"""What a kernel set must provide. Kernels are local: they know nothing of ranks, schedules or losses.

TopK is a Switch SAE with one expert, so there is one set of operations, over *groups*: group g owns the tokens
`token_offsets[g] : token_offsets[g+1]` and the latents `row_offsets[g] : row_offsets[g+1]`, and every token selects
among its own group's latents only.

Shapes: k = active latents of a token, d = d_model, rows = the local latents. Products accumulate in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.ops.untyped import integers


class Codes(NamedTuple):
    """The active latents of each token, value descending, equal values by ascending index.

    In the *whole* form, which needs groups of equally many latents, there is a column for every row of the token's
    group, in order, and `index` counts these: the same numbers for every token, without memory of its own
    (`whole_index`). It is cheaper where many latents are active.
    """

    values: Float[Tensor, "tokens k"]
    index: Int[Tensor, "tokens k"]  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index)


def whole_index(rows: slice, tokens: int, device: torch.device) -> Int[Tensor, "tokens rows"]:
    return torch.arange(rows.start, rows.stop, device=device).expand(tokens, -1)


def is_whole(index: Int[Tensor, "tokens k"]) -> bool:
    return index.shape[0] > 1 and index.stride(0) == 0


def per_entry(vector: Float[Tensor, " rows"], index: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """`vector[index]`, without a copy in the whole form."""
    if is_whole(index):
        return vector[index[0]].expand(index.shape)
    return vector.expand(index.shape[0], -1).gather(1, index)  # on a CPU four times as fast as vector[index]


@dataclass(frozen=True)
class Groups:
    """Which consecutive tokens choose among which consecutive latents."""

    token_offsets: Int[Tensor, " groups_plus_1"]
    row_offsets: tuple[int, ...]
    _by_token: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict[int, tuple[Tensor, Tensor]], init=False, repr=False, compare=False
    )

    def latents_of(self, tokens: int) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """First latent and number of latents of the group of each of all `tokens`, on the device, int32; computed once.
        Never waits for a GPU."""
        if tokens not in self._by_token:
            self._by_token[tokens] = self._latents_of(tokens)
        return self._by_token[tokens]

    def _latents_of(self, tokens: int) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        rows, device = self.row_offsets, self.token_offsets.device
        if len(rows) == 2:
            firsts = torch.zeros(tokens, dtype=torch.int32, device=device)
            return firsts, torch.full_like(firsts, rows[1])
        ends = self.token_offsets[1:].contiguous()
        group = torch.searchsorted(ends, torch.arange(tokens, device=device), right=True).clamp_(max=len(rows) - 2)
        firsts = self.row_starts[group]
        widths = self.row_starts[group + 1] - firsts
        return firsts.clamp_(max=max(0, rows[-1] - 1)), widths

    @cached_property
    def row_starts(self) -> Int[Tensor, " groups_plus_1"]:
        """`row_offsets` on the device, int32. Never waits for a GPU.

        Equal groups are computed there, so a CUDA graph that reads them owns them. Others (dead latents) are copied
        from the host, and must not be recorded.
        """
        offsets, device = self.row_offsets, self.token_offsets.device
        step = offsets[1] - offsets[0]
        if step and offsets == tuple(range(0, step * len(offsets), step)):
            return torch.arange(0, step * len(offsets), step, dtype=torch.int32, device=device)
        numbers = torch.tensor(offsets, dtype=torch.int32, pin_memory=device.type == "cuda")
        return numbers.to(device, non_blocking=True)

    @cached_property
    def spans(self) -> list[tuple[slice, slice]]:
        """(tokens, rows) of each group as host slices; on a GPU this waits for the device, once per batch."""
        tokens = integers(self.token_offsets)
        rows = self.row_offsets
        return [(slice(tokens[g], tokens[g + 1]), slice(rows[g], rows[g + 1])) for g in range(len(rows) - 1)]


class Nesting(NamedTuple):
    """Which block each entry of codes belongs to. Reconstructions are of blocks 1 … b."""

    block: Int[Tensor, "tokens k"]
    """From 0; uint8."""
    weights: tuple[float, ...]
    """Of the error of blocks 1 … b in the loss."""
    headline: int
    """The block up to which the reconstruction is the SAE's; fvu, L0 and AuxK are about it."""


Reduce: TypeAlias = Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]]
"""Sums a partial reconstruction over the shards, in place, and returns it."""


class AdamState(NamedTuple):
    """First and second moment of one parameter, of its shape and dtype."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Hyper:
    """Settings of one optimiser update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """1 for the first update; enters the bias corrections."""
    scale: Float[Tensor, ""] | None = None
    """Factor on the gradient (clipping), on the device; None is 1."""
    project: bool = False
    """First remove the gradient's component parallel to each (unit) row."""
    unit_rows: bool = False
    """Afterwards scale each row to unit norm."""
    rates: Float[Tensor, 2] | None = None
    """`corrected()` on the device, for a step in a CUDA graph; None: `lr` and `step` are used."""

    def corrected(self) -> tuple[float, float]:
        """(lr/(1 − β₁ᵗ), 1/(1 − β₂ᵗ)): the step size and the factor on the second moment."""
        return self.lr / (1 - self.beta1**self.step), 1 / (1 - self.beta2**self.step)


@runtime_checkable
class Ops(Protocol):
    """A kernel set. Implementations are modules: `reference`, `cpu`, `triton`."""

    @property
    def NAME(self) -> str:
        """Recorded with every result."""
        ...

    def dense_rows_per_k(self, precision: str) -> int:
        """A group of at most this many latents per active one is computed as dense products over its whole width, a
        wider one with gathers. `precision` is fp64, fp32 or bf16."""
        ...

    def centred(
        self,
        x: Float[Tensor, "tokens d"],
        order: Int[Tensor, " own"] | None,
        offset: Float[Tensor, " d"],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "own d"], Float[Tensor, "own d"]]:
        """The rows `order` of x (None: all) minus `offset`, as a new tensor; and the same in `dtype`, which is the same
        tensor where it has that dtype."""
        ...

    def list_length(self, rows: int) -> int:
        """How long a list of `rows` latents should be made, by filling it up with others, so that the sizes of its
        products suit the kernels; at least `rows`."""
        ...

    def select(
        self,
        x: Float[Tensor, "tokens d"],
        W_enc: Float[Tensor, "rows d"],
        b_enc: Float[Tensor, " rows"] | None,
        k: int,
        groups: Groups,
        ordered: bool = True,
    ) -> Codes:
        """The k largest of x·W_encᵀ + b_enc of each token's group, before any ReLU; equal values go to the lowest
        index. `index` counts local rows. A group with fewer than k rows pads with −inf at its first row.

        With `ordered=False` a kernel may return only the positive ones of these k, in any fixed order, padded with
        values ≤ 0 at rows of the group, or the whole form, 0 where it is none of them. This suffices for callers that
        apply ReLU and sum (AuxK)."""
        ...

    def select_preactivations(self, preactivations: Float[Tensor, "tokens rows"], k: int) -> Codes:
        """`select` from given pre-activations of a single group; k ≤ rows."""
        ...

    def select_above(
        self,
        x: Float[Tensor, "tokens d"],
        W_enc: Float[Tensor, "rows d"],
        b_enc: Float[Tensor, " rows"] | None,
        theta: Float[Tensor, " rows"],
        groups: Groups,
    ) -> Codes:
        """All entries of x·W_encᵀ + b_enc of each token's group that are not below their latent's `theta` (NaN is
        not), by ascending index. As many columns as the fullest token has entries, at least one; shorter ones are
        padded with −inf at the group's first row. Waits for the device, once, for the number of columns. Where a token
        has too many entries for that, a kernel may return the whole form, −inf where there is no entry."""
        ...

    def reconstruct(
        self,
        codes: Codes,
        W_dec: Float[Tensor, "rows d"],
        x: Float[Tensor, "tokens d"],
        scale: Float[Tensor, " tokens"] | None,
        groups: Groups,
        reduce: Reduce | None = None,
    ) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]]:
        """(residual, dz, squared error) of x̂ = scale·Σ_j z_j W_dec[j].

        residual = x − x̂; dz[t, j] = ⟨residual_t, W_dec[index_tj]⟩ where z > 0, else 0 (its factor −2·scale/(V·B)
        belongs to the loss and is applied by the caller); squared error = ‖residual_t‖². Without `reduce` a kernel
        may fuse the three.
        """
        ...

    def latent_grads(
        self,
        codes: Codes,
        W_dec: Float[Tensor, "rows d"],
        residual: Float[Tensor, "tokens d"],
        groups: Groups,
    ) -> Float[Tensor, "tokens k"]:
        """⟨residual_t, W_dec[index_tj]⟩ where `codes.values` > 0, else 0: the second half of `reconstruct`."""
        ...

    def weight_grads(
        self,
        codes: Codes,
        dz: Float[Tensor, "tokens k"],
        x: Float[Tensor, "tokens d"],
        residual: Float[Tensor, "tokens d"],
        groups: Groups,
        out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
    ) -> None:
        """Writes out = (Σ_t dz_tj·x_t, Σ_t z_tj·residual_t, Σ_t dz_tj) per latent j: the gradients of W_enc, W_dec
        and b_enc, with all loss factors already in `codes.values` and `dz`."""
        ...

    def latent_sums(self, values: Float[Tensor, "tokens k"], index: Int[Tensor, "tokens k"], rows: int) -> Tensor:
        """Σ_t values[t, j] per local latent (rows), in the same order every time."""
        ...

    def fired(self, codes: Codes, rows: int) -> Int[Tensor, " rows"]:
        """How many tokens each local latent was active on (z > 0)."""
        ...

    def project(self, param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
        """Remove from `grad`, in place, the component parallel to each row of `param`, whose rows have norm 1."""
        ...

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: AdamState,
        hyper: Hyper,
        ok: Bool[Tensor, ""],
        low_precision: Tensor | None = None,
    ) -> None:
        """One Adam update in place: optional projection, Adam, optional unit norm, optional low-precision copy.
        Where `ok` is false nothing changes; no host synchronisation."""
        ...
