"""`python -m tests.peers.worker`: the bench's contenders that were written from a description of a public trainer."""

from __future__ import annotations

from harness.bench.peer_worker import Peer, main
from tests.peers import bionemo_like, flashsae_like

if __name__ == "__main__":
    main({"bionemo_like": Peer(bionemo_like.build), "flashsae_like": Peer(flashsae_like.build)})
