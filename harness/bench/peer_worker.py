"""One step of somebody else's SAE, as a contender. Runs in the peers' own environment and imports nothing of ours.

Each peer is built through its public classes from our initial weights, and one step is what its own trainer does per
batch, logging and data aside. `steel` sets what takes only a flag: fused Adam and an unsorted top-k.
"""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
# (the peers live in another environment)
from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

Step = Callable[[], None]
"""Runs forward and backward only, or a whole step."""

LR = 1e-4
GPU_REPEATS = 5
SHORT_MS = 250.0


def _adam(parameters: Any, steel: bool) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=LR, eps=6.25e-10, fused=True if steel else None)


def sparsify(data: dict[str, torch.Tensor], k: int, steel: bool) -> tuple[Step, Step, Callable[[], dict]]:
    """EleutherAI's: loss is the batch's fvu; decoder gradients projected, rows renormalised."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    n, d = data["W_enc"].shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), device=data["x"].device, dtype=torch.float32)
    with torch.no_grad():
        sae.encoder.weight.copy_(data["W_enc"])
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(data["W_dec"])
        sae.b_dec.copy_(data["b_dec"])
    optimizer = _adam(sae.parameters(), steel)

    def gradients() -> None:
        optimizer.zero_grad()
        sae(data["x"]).fvu.backward()

    def whole() -> None:
        gradients()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        sae.set_decoder_norm_to_unit_norm()

    return gradients, whole, lambda: {"W_enc": sae.encoder.weight.grad, "W_dec": sae.W_dec.grad}


def dictionary_learning(data: dict[str, torch.Tensor], k: int, steel: bool) -> tuple[Step, Step, Callable[[], dict]]:
    """Marks et al.: summed squared error; gradient clipping at norm 1 as its trainer has it."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    n, d = data["W_enc"].shape
    trainer = TopKTrainer(
        steps=10**6, activation_dim=d, dict_size=n, k=k, layer=0, lm_name="none", lr=LR, warmup_steps=0,
        device=str(data["x"].device), seed=0,
    )  # fmt: skip
    ae = trainer.ae
    with torch.no_grad():
        ae.encoder.weight.copy_(data["W_enc"])
        ae.encoder.bias.zero_()
        ae.decoder.weight.copy_(data["W_dec"].T)
        ae.b_dec.copy_(data["b_dec"])
    if steel:
        trainer.optimizer = _adam(ae.parameters(), steel)

    def gradients() -> None:
        trainer.optimizer.zero_grad()
        trainer.loss(data["x"], step=1).backward()

    # step 0 would reset b_dec to a geometric median
    return (
        gradients,
        lambda: trainer.update(1, data["x"]),
        lambda: {"W_enc": ae.encoder.weight.grad, "W_dec": ae.decoder.weight.grad.T},
    )


def saelens(data: dict[str, torch.Tensor], k: int, steel: bool) -> tuple[Step, Step, Callable[[], dict]]:
    """SAELens: its training forward pass, gradient clipping at norm 1 as its trainer has it, Adam."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    n, d = data["W_enc"].shape
    config = TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k, device=str(data["x"].device), dtype="float32")
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(data["W_enc"].T)
        sae.b_enc.zero_()
        sae.W_dec.copy_(data["W_dec"])
        sae.b_dec.copy_(data["b_dec"])
    optimizer = _adam(sae.parameters(), steel)
    dead = torch.zeros(n, dtype=torch.bool, device=data["x"].device)

    def gradients() -> None:
        optimizer.zero_grad()
        given = TrainStepInput(
            sae_in=data["x"], coefficients={}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False
        )
        sae.training_forward_pass(given).loss.backward()

    def whole() -> None:
        gradients()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return gradients, whole, lambda: {"W_enc": sae.W_enc.grad.T, "W_dec": sae.W_dec.grad}


def openai(data: dict[str, torch.Tensor], k: int, steel: bool) -> tuple[Step, Step, Callable[[], dict]]:
    """Gao et al.'s Triton kernels: decoder gradient projected, rows renormalised; without AuxK, average and scaler.

    Their single-process top-k asks for the size of a group of ranks, which does not exist here, so it gets None for the
    group. Their Adam is fused by default. Written from their source and not run yet: it needs a GPU.
    """
    from sparse_autoencoder import train

    n, d = data["W_enc"].shape
    sharded = train.sharded_topk
    train.sharded_topk = lambda x, k, sh_comm, capacity_factor=None: sharded(x, k, sh_comm, None)
    sae = train.FastAutoencoder(n, d, k, None, dead_steps_threshold=10**9).to(data["x"].device)
    with torch.no_grad():
        sae.encoder.weight.copy_(data["W_enc"])
        sae.latent_bias.zero_()
        sae.decoder.weight.copy_(data["W_dec"].T)
        sae.pre_bias.copy_(data["b_dec"])
    optimizer = _adam(sae.parameters(), True)

    def gradients() -> None:
        optimizer.zero_grad()
        reconstruction, _ = sae(data["x"])
        torch.nn.functional.mse_loss(reconstruction, data["x"]).backward()

    def whole() -> None:
        gradients()
        train.unit_norm_decoder_grad_adjustment_(sae)
        optimizer.step()
        train.unit_norm_decoder_(sae)

    return gradients, whole, lambda: {"W_enc": sae.encoder.weight.grad, "W_dec": sae.decoder.weight.grad.T}


PEERS = {
    "openai": ("sparse_autoencoder", openai),
    "sparsify": ("eai-sparsify", sparsify),
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "saelens": ("sae-lens", saelens),
}


def _gpu_ms(whole: Step, autocast: Callable[[], Any]) -> float:
    """Mean milliseconds of a step of a few that are queued between two events, as ours are timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(GPU_REPEATS):
        with autocast():
            whole()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / GPU_REPEATS


def installed() -> list[str]:
    """The peers whose packages are in this environment."""
    names = []
    for name, (package, _) in PEERS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            names.append(name)
    return names


def main() -> None:
    if sys.argv[1:] == ["installed"]:
        print(*installed())
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently if nobody waits for an answer any more
    first = sys.stdin.readline()
    if not first.endswith("\n"):
        return  # the driver ended before it sent the task
    task = json.loads(first)
    out, sys.stdout = sys.stdout, sys.stderr  # what a peer prints is not an answer
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    clock = {"wall": time.perf_counter, "process": time.process_time}[task["clock"]]
    device = torch.device(task["device"])
    before = psutil.Process().memory_info().rss
    data = {name: value.to(device) for name, value in load_file(task["data"]).items()}
    package, build = PEERS[task["peer"]]
    if task["steel"]:
        torch.topk = functools.partial(torch.topk, sorted=False)
        plain = torch.Tensor.topk
        torch.Tensor.topk = lambda self, *args, **kw: plain(self, *args, **{"sorted": False, **kw})
    gradients, whole, weight_grads = build(data, task["k"], task["steel"])
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=task["precision"] == "bf16")
    last_ms = SHORT_MS
    for line in sys.stdin:
        command = line.split()
        answer: dict[str, Any] = {}
        if command[0] == "round":
            # as ours: a short step is taken twice, and the second one counts
            for _ in range(2 if last_ms < SHORT_MS else 1):
                if device.type == "cuda":
                    last_ms = _gpu_ms(whole, autocast)
                    continue
                begin = clock()
                with autocast():
                    whole()
                last_ms = 1e3 * (clock() - begin)
            answer = {"step_ms": last_ms}
        elif command[0] == "gradients":
            with autocast():
                gradients()
            save_file({name: grad.cpu().contiguous() for name, grad in weight_grads().items()}, command[1])
        elif command[0] == "peak":
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
            else:
                peak = (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                peak -= before
            answer = {"peak_mem_bytes": peak, "version": importlib.metadata.version(package)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
