"""A mesh of ranks over torch.distributed: gloo on CPUs, NCCL on GPUs.

Ranks come from `torchrun`, from `srun` (one task a rank), or from the launcher on one machine; all are known by
environment variables. The group is owned by `mesh`, a context manager: leaving without destroying a group aborts some
processes at exit.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from harness.errors import UserError
from harness.parallel import collectives
from harness.parallel.interface import GATHER_BYTES, Axis, Kind, Shards
from harness.parallel.meeting import Waiting, meet, meeting_point
from harness.parallel.solo import Solo

START_TIMEOUT = timedelta(minutes=30)
"""Until the first step: ranks may start far apart, compile, or wait for a harvest."""
STEP_TIMEOUT = timedelta(minutes=5)
"""After the first step: if a rank is silent for longer, the others end."""
FLAG_BITS = 8
"""Of the numbers that ranks agree on."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    local_rank: int
    """Number of this process on its node."""
    meeting_point: tuple[str, int] | None = None
    """Address and port of rank 0; None if MASTER_ADDR and MASTER_PORT tell."""


class Mesh:
    """`Shards` over a process group of dp·shard ranks; rank = dp_rank·shard + shard_rank."""

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.device_mesh = device_mesh
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dp, self.shard = device_mesh.size(0), device_mesh.size(1)
        self.dp_rank, self.shard_rank = device_mesh.get_local_rank("dp"), device_mesh.get_local_rank("shard")
        self._sent: dict[Kind, float] = {}
        self._groups = {"dp": device_mesh.get_group("dp"), "shard": device_mesh.get_group("shard")}
        self._sizes = {"dp": self.dp, "shard": self.shard, "all": self.dp * self.shard}
        self._control = collectives.new_control_group(START_TIMEOUT)
        self._pending: tuple[Tensor, dist.Work] | None = None

    def rows(self, count: int) -> slice:
        assert count % self.shard == 0
        each = count // self.shard
        return slice(self.shard_rank * each, (self.shard_rank + 1) * each)

    def keep(self, values: Float[Tensor, "tokens width"], k: int, kind: Kind) -> Int[Tensor, " tokens"]:
        """Exact: every shard sends all its candidates of a token to the token's owner, who answers each shard with
        how many of them are among the k largest. Stable order, shards ascending: ties go to the lowest index."""
        if self.shard == 1:
            return Solo().keep(values, k, kind)
        tokens, width = values.shape
        group, each = self._groups["shard"], -(-tokens // self.shard)
        padded = values.new_full((each * self.shard, width), -torch.inf)
        padded[:tokens] = values
        received = torch.empty_like(padded)
        collectives.all_to_all(received, padded, group)
        self._count(kind, padded, self.shard, 1)
        # (owned tokens, shard·width): of each token all candidates, lowest shard first
        candidates = received.view(self.shard, each, width).transpose(0, 1).reshape(each, -1)
        winners = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
        counts = torch.zeros(each, self.shard, dtype=torch.int32, device=values.device)
        counts.scatter_add_(1, winners // width, torch.ones_like(winners, dtype=torch.int32))
        answers = counts.T.contiguous()
        kept = torch.empty_like(answers)
        collectives.all_to_all(kept, answers, group)
        self._count(kind, answers, self.shard, 1)
        return kept.flatten()[:tokens].long()

    def sum_(self, tensor: Tensor, over: Axis, kind: Kind) -> Tensor:
        if self._sizes[over] > 1:
            contiguous = tensor.contiguous()
            collectives.all_reduce(contiguous, None if over == "all" else self._groups[over])
            if contiguous is not tensor:
                tensor.copy_(contiguous)
            self._count(kind, tensor, self._sizes[over], 2)
        return tensor

    def _count(self, kind: Kind, tensor: Tensor, group_size: int, passes: int) -> None:
        """An all-reduce (2 passes) sends 2·(g−1)/g of the buffer, an all-to-all (g−1)/g of it, over g ranks."""
        sent = passes * tensor.numel() * tensor.element_size() * (group_size - 1) / group_size
        self._sent[kind] = self._sent.get(kind, 0.0) + sent

    def take_sent(self) -> dict[Kind, float]:
        sent, self._sent = self._sent, {}
        return sent

    def global_view(self, local: Tensor, cut: bool) -> Tensor:
        placement = Shard(0) if cut else Replicate()
        return DTensor.from_local(local, self.device_mesh, [Replicate(), placement], run_check=False)

    def gather(self, local: Tensor) -> Tensor:
        rows = local.shape[0]
        whole = torch.empty((rows * self.shard, *local.shape[1:]), dtype=local.dtype)
        for first in range(0, rows, step := max(1, GATHER_BYTES * rows // (local.nbytes * self.shard))):
            block = local[first : first + step].contiguous()
            parts = [torch.empty_like(block) for _ in range(self.shard)]
            collectives.all_gather(parts, block, self._groups["shard"])
            for number, part in enumerate(parts):
                whole[number * rows + first :][: len(part)] = part
        return whole

    def texts(self, own: str) -> list[str]:
        return collectives.gather_texts(own, self._control)

    def agree(self, bits: int) -> int:
        """Returns the answer to the previous call, so that no rank waits for the slowest one."""
        answer = 0
        if self._pending is not None:
            flags, work = self._pending
            work.wait()
            answer = sum(1 << place for place, flag in enumerate(flags) if flag)
        flags = torch.tensor([bits >> place & 1 for place in range(FLAG_BITS)])
        self._pending = (flags, collectives.start_maximum(flags, self._control))
        return answer

    def started(self) -> None:
        for group in (dist.group.WORLD, self._control, *self._groups.values()):
            collectives.set_timeout(STEP_TIMEOUT, group)

    def barrier(self) -> None:
        collectives.barrier(self._control)

    def finish(self) -> None:
        """Wait for the exchange of the last `agree`. Every rank does, so that none is left open."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def close(self) -> None:
        """Drop the groups, so that destroying them ends their threads. A thread that holds a tensor while the
        interpreter exits aborts the process (https://github.com/pytorch/pytorch/issues/190489)."""
        del self._pending, self._control, self._groups, self.device_mesh


def meet_all(ranks: Ranks, dp: int, shard: int, lm: int = 0, on_wait: Waiting = lambda what: None) -> Store:
    """The store at which dp·shard + lm ranks have met. `on_wait` is called again and again while ranks are missing, and
    may raise. Raises `UserError` if their number is another, or if they do not meet."""
    if (wanted := dp * shard + lm) != ranks.world:
        more = f" + mesh.lm={lm}" if lm else ""
        raise UserError(
            f"mesh.dp={dp} × mesh.shard={shard}{more} needs {wanted} ranks, and {ranks.world} were started; "
            f"change the mesh or the number of tasks"
        )
    address, port = ranks.meeting_point or meeting_point()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has started all ranks and holds the store
        return TCPStore(address, port, is_master=False, timeout=START_TIMEOUT)
    return meet(ranks.rank, ranks.world, address, port, START_TIMEOUT, on_wait)


@contextmanager
def mesh(
    dp: int,
    shard: int,
    device: torch.device,
    ranks: Ranks,
    *,
    store: Store | None = None,
    even_alone: bool = False,
    on_wait: Waiting = lambda what: None,
) -> Generator[Shards, None, None]:
    """The mesh of the first dp·shard ranks, of which this process is one; `Solo` for one. `device` decides between gloo
    and NCCL.

    `store`: where these ranks have met, if they have; for `on_wait` and what is raised otherwise see `meet_all`.
    `even_alone` makes a mesh of one rank, to check that the backend works.
    """
    if dp * shard == 1 and (store or ranks.world == 1) and not even_alone:
        yield Solo()
        return
    store = store or meet_all(ranks, dp, shard, on_wait=on_wait)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("mesh", store),
        rank=ranks.rank,
        world_size=dp * shard,
        timeout=START_TIMEOUT,
    )
    try:
        with closing(Mesh(init_device_mesh(device.type, (dp, shard), mesh_dim_names=("dp", "shard")))) as shards:
            yield shards
            shards.finish()
    finally:
        dist.destroy_process_group()
