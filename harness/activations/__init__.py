"""Where x comes from: harvested from a language model into a store, or drawn from a known sparse dictionary."""

from harness.activations.identity import store_id, store_root
from harness.activations.open import open_source
from harness.activations.source import ActivationSource, Statistics
from harness.activations.stream import Stream
from harness.activations.synthetic import recovered

__all__ = ["ActivationSource", "Statistics", "Stream", "open_source", "recovered", "store_id", "store_root"]
