"""What the architectures have in common: entries of a batch, and what becomes of them on the way back.

An architecture decides which latents a token may use (`select`), what they are worth (z from the pre-activations), and
how the gradient with respect to z returns to the pre-activations and to its own parameters (`backward`). Everything
else is the same for all, and stands in `step`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import Codes, Nesting, Ops, Reduce
from harness.parallel import Shards
from harness.saes.dead import DeadLatents
from harness.saes.router import Routing
from harness.saes.sae import Params, Sae
from harness.saes.start import Start


@dataclass(frozen=True)
class Entries:
    """The latents that each of this rank's own tokens may use; entries with z = 0 are not active."""

    pre: Float[Tensor, "own capacity"]
    """Pre-activations as they were selected; −inf where padded."""
    index: Int[Tensor, "own capacity"]
    """Local row of each."""
    z: Float[Tensor, "own capacity"]
    """Activations."""
    nesting: Nesting | None = None
    """Nested reconstructions; None: one, of all entries."""
    dead: Codes | None = None
    """AuxK's latents of each token, where they came with the selection; `index` counts places in `DeadLatents.rows`."""

    @property
    def codes(self) -> Codes:
        """The active latents of the SAE's reconstruction."""
        nesting = self.nesting
        if nesting is None or nesting.headline == len(nesting.weights) - 1:
            return Codes(self.z, self.index)
        return Codes(self.z.where(nesting.block <= nesting.headline, 0.0), self.index)


@dataclass(frozen=True)
class Batch:
    """One batch on its way through an SAE, on this rank."""

    sae: Sae
    params: Params
    compute: Params
    """W_enc and W_dec as products use them."""
    routing: Routing
    target: Float[Tensor, "own d"]
    """x − b_dec, which is reconstructed."""
    inputs: Float[Tensor, "own d"]
    """What the encoder sees, in the precision of the products."""
    ops: Ops
    shards: Shards
    reduce: Reduce | None
    """Sums partial reconstructions over the shards; None where they are complete."""
    training: bool
    global_tokens: int
    step: int = 0
    """Completed steps."""
    dead: DeadLatents | None = None
    """Dead latents that the selection chooses from for AuxK at the same time (`saes.dead.encoded_with_all`)."""
    residual: Float[Tensor, "own d"] | None = None
    """What pulls at x̂, once it is known: x − x̂, with another objective −V·B/2 times its gradient."""

    @property
    def factor(self) -> float:
        """Of −residual·… in the gradient of the error: 2/V, averaged over the batch."""
        return -2.0 / (self.sae.variance * self.global_tokens)


@dataclass(frozen=True)
class Backward:
    """Gradients of one batch on this rank, all loss factors included."""

    da: Float[Tensor, "own capacity"]
    """With respect to the product of the encoder's row with its input."""
    own: Params = field(default_factory=dict[str, Tensor])
    """With respect to the parameters per latent, b_enc included where it is not Σ da."""
    token_loss: Float[Tensor, ""] | None = None
    """Further loss that every shard of a replica holds whole."""
    latent_loss: Float[Tensor, ""] | None = None
    """Further loss of this rank's latents: the penalty."""
    decoder_norm: Float[Tensor, " rows"] | None = None
    """With respect to the norms of the decoder's rows."""
    everywhere: Float[Tensor, " rows"] | None = None
    """With respect to the pre-activation of a latent, the same for each own token; `da` is on top."""


class Activation(Protocol):
    """What distinguishes an architecture. Implementations have no state."""

    def parameters(self, start: Start) -> Params:
        """Initial values of the parameters that only this architecture has, and of others that it begins otherwise."""
        ...

    def select(self, batch: Batch) -> Entries: ...

    def backward(
        self, batch: Batch, entries: Entries, dz: Float[Tensor, "own capacity"], sparsity: Float[Tensor, ""] | float
    ) -> Backward:
        """`dz` is the gradient of all reconstructions with respect to z (0 where z is) and may be overwritten;
        `sparsity` is the coefficient λ of the penalty, averaged over tokens: λ/B."""
        ...
