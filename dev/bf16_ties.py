"""How ties of bfloat16 pre-activations change how often a latent fires: `python -m dev.bf16_ties`.

Selection gives equal pre-activations to the lowest latent index, and bfloat16 has so few numbers that a half of all
rows have a tie at the threshold. The pre-activations here are exchangeable over the latents, so without ties all
latents would fire equally often. Emulated on the CPU.
"""

from __future__ import annotations

import torch

ROWS, K, SIZES = 16_384, 32, (4096, 32_768)
BLOCK = 256


def firing_counts(n_latents: int, bf16: bool) -> tuple[torch.Tensor, float]:
    """How often each latent is among the k largest of a row, and the share of rows with a tie at the threshold."""
    generator = torch.Generator().manual_seed(0)
    counts, ties = torch.zeros(n_latents), 0.0
    for _ in range(ROWS // BLOCK):
        z = torch.randn(BLOCK, n_latents, generator=generator)
        z = z.bfloat16().float() if bf16 else z
        values, index = z.sort(dim=1, descending=True, stable=True)  # equal values stay in the order of their index
        counts.scatter_add_(0, index[:, :K].flatten(), torch.ones(BLOCK * K))
        ties += float((values[:, K] == values[:, K - 1]).sum())
    return counts, ties / ROWS


def main() -> None:
    for n_latents in SIZES:
        for bf16 in (False, True):
            counts, ties = firing_counts(n_latents, bf16)
            tenth, mean = n_latents // 10, counts.mean()
            error = float((tenth * mean) ** -0.5)
            first, last = (float(part.mean() / mean) for part in (counts[:tenth], counts[-tenth:]))
            print(
                f"n={n_latents} k={K} {'bf16' if bf16 else 'fp32'}: the first tenth of the latents fires {first:.3f} "
                f"times as often as the mean, the last {last:.3f} times (± {error:.3f}); {ties:.0%} of rows tie"
            )


if __name__ == "__main__":
    main()
