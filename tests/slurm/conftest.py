"""One cluster for all tests of this directory, emptied between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dev.slurm.cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started by the first test that wants it."""
    if reason := missing():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster with both nodes up and nothing in its queue; what a test leaves there is cancelled."""
    yield shared_cluster
    shared_cluster.reset()
