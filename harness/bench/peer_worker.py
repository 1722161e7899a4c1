"""One step of somebody else's SAE, as a contender. Runs in the peers' own environment and imports nothing of ours.

`tests.peers.worker` runs the same loop with peers that exist only in a checkout.

Each peer is built through its public classes from our initial weights, and one step is what its own trainer does per
batch, logging and data aside. `steel` sets what takes only a flag: fused Adam and an unsorted top-k.
"""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
# (the peers live in another environment)
from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file, save_file

Step = Callable[[], None]
"""Runs forward and backward only, or a whole step."""
Build = Callable[[dict[str, torch.Tensor], int, bool], tuple[Step, Step, Callable[[], dict[str, Any]]]]
"""Initial weights and batch, k, steel -> gradients alone, a whole step, and the gradients of the weights by our names.
"""

LR = 1e-4
GPU_REPEATS = 5
SHORT_MS = 250.0


def adam(parameters: Any, steel: bool) -> torch.optim.Adam:
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
    optimizer = adam(sae.parameters(), steel)

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
        trainer.optimizer = adam(ae.parameters(), steel)

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
    optimizer = adam(sae.parameters(), steel)
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

    Their single-process top-k asks for the size of a group of ranks, which does not exist here, so it gets no capacity
    factor. As in their loop, only the forward pass is autocast, and Adam is fused.
    """
    if importlib.util.find_spec("wandb") is None:
        # their module imports it for a logger, which is not used here
        sys.modules["wandb"] = types.ModuleType("wandb")
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
    optimizer = adam(sae.parameters(), True)
    exact = functools.partial(torch.autocast, data["x"].device.type, enabled=False)

    def gradients() -> None:
        optimizer.zero_grad()
        reconstruction, _ = sae(data["x"])
        loss = torch.nn.functional.mse_loss(reconstruction, data["x"])
        with exact():
            loss.backward()

    def whole() -> None:
        gradients()
        with exact():
            train.unit_norm_decoder_grad_adjustment_(sae)
        optimizer.step()
        train.unit_norm_decoder_(sae)

    return gradients, whole, lambda: {"W_enc": sae.encoder.weight.grad, "W_dec": sae.decoder.weight.grad.T}


def trained_as(task: dict[str, Any], data: dict[str, torch.Tensor]) -> tuple[Step, Step, Callable[[], dict]]:
    """A step of the peer's trainer of another architecture, which has no gradients apart."""
    trainers = importlib.import_module("peer_trainers")  # beside this file
    settled = {"batch": len(data["x"]), "steps": 10**6, "warmup_steps": 0, "decay_steps": 0, "sparsity_warmup_steps": 0}
    settled |= {"dead_steps": 10**6, "lr": LR, "seed": 0, "own_init": True, "scale": 1.0}
    settled |= {"l0": task["k"], "sparsity": 1.0, "first_threshold": {str(task["k"]): 2.0}}
    trainer = trainers.TRAINERS[task["peer"]](task | settled, data)
    for group in trainer.optimizer.param_groups if task["steel"] else []:
        group["fused"] = True

    def whole() -> None:
        trainer.step(data["x"])

    return whole, whole, dict


class Peer(NamedTuple):
    """A contender that this worker can be."""

    build: Build
    distribution: str | None = None
    """Name on the package index; None for code of this checkout."""
    module: str | None = None
    """What `build` imports."""

    def version(self) -> str:
        return importlib.metadata.version(self.distribution) if self.distribution else "checkout"

    def missing(self) -> str | None:
        """Why the peer cannot take part; None if it can."""
        try:
            self.version()
        except importlib.metadata.PackageNotFoundError:
            return "it is not installed"
        try:
            if self.module:
                importlib.import_module(self.module)
        except Exception as error:  # a peer's import may fail in any way, and the others go on
            return f"it cannot be imported: {type(error).__name__}: {error}"
        return None


PEERS = {
    "openai": Peer(openai, "sparse_autoencoder", "sparse_autoencoder.kernels"),
    "sparsify": Peer(sparsify, "eai-sparsify", "sparsify.sparse_coder"),
    "dictionary_learning": Peer(dictionary_learning, "dictionary-learning", "dictionary_learning.trainers.top_k"),
    "saelens": Peer(saelens, "sae-lens", "sae_lens.saes.topk_sae"),
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


def main(peers: Mapping[str, Peer] = PEERS) -> None:
    """`missing NAME...` prints one JSON object, name -> why it cannot take part, or null. Otherwise: be a contender."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a peer prints is not an answer
    if sys.argv[1:2] == ["missing"]:
        out.write(json.dumps({name: peers[name].missing() for name in sys.argv[2:]}) + "\n")
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently if nobody waits for an answer any more
    first = sys.stdin.readline()
    if not first.endswith("\n"):
        return  # the driver ended before it sent the task
    task = json.loads(first)
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    clock = {"wall": time.perf_counter, "process": time.process_time}[task["clock"]]
    device = torch.device(task["device"])
    before = psutil.Process().memory_info().rss
    data = {name: value.to(device) for name, value in load_file(task["data"]).items()}
    peer = peers[task["peer"]]
    if task["steel"]:
        torch.topk = functools.partial(torch.topk, sorted=False)
        plain = torch.Tensor.topk
        torch.Tensor.topk = lambda self, *args, **kw: plain(self, *args, **{"sorted": False, **kw})
    if "architecture" in task:
        gradients, whole, weight_grads = trained_as(task, data)
    else:
        gradients, whole, weight_grads = peer.build(data, task["k"], task["steel"])
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
            answer = {"peak_mem_bytes": peak, "version": peer.version()}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
