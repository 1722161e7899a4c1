"""TopK and Switch sparse autoencoders: what is computed, in which order, with hand-written gradients."""

from harness.saes.dead import DeadLatents, encoded_with_all, find_dead
from harness.saes.init import geometric_median, initial_params, match_norm
from harness.saes.normalize import Normalizer, make_normalizer
from harness.saes.sae import Params, Sae, resolve_sae
from harness.saes.step import Stats, forward, step

__all__ = [
    "DeadLatents",
    "Normalizer",
    "Params",
    "Sae",
    "Stats",
    "encoded_with_all",
    "find_dead",
    "forward",
    "geometric_median",
    "initial_params",
    "make_normalizer",
    "match_norm",
    "resolve_sae",
    "step",
]
