"""Which activation belongs to which name."""

from __future__ import annotations

from harness.saes.batchtopk import BatchTopK, Matryoshka
from harness.saes.decoder_norm import TopKDecoderNorm
from harness.saes.entries import Activation
from harness.saes.gated import Gated
from harness.saes.jumprelu import JumpRelu, JumpReluTanh
from harness.saes.relu import ProLu, Relu, ReluDecoderNorm
from harness.saes.topk import MultiTopK, TopK

ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(),
    "switch": TopK(),
    "multi_topk": MultiTopK(),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(),
    "topk_decoder_norm": TopKDecoderNorm(),
    "relu": Relu(),
    "relu_decoder_norm": ReluDecoderNorm(),
    "gated": Gated(),
    "prolu": ProLu(),
    "jumprelu": JumpRelu(),
    "jumprelu_tanh": JumpReluTanh(),
}
