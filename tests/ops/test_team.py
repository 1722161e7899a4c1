"""The team of threads behind the CPU kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from harness.ops.cpu import team as cpu_team


@pytest.fixture(params=["openmp", "threads"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run: torch's OpenMP runtime, and ordinary threads where torch has none."""
    if request.param == "threads":
        monkeypatch.setattr(cpu_team, "_openmp", lambda: None)
    elif cpu_team._openmp() is None:
        pytest.skip("torch is not linked with an OpenMP runtime that exports GOMP_parallel")
    return request.param


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize("items", [0, 1, 2, 7, 1000])
def test_every_item_is_done_once(items: int) -> None:
    done = [0] * items

    def work(item: int) -> None:
        done[item] += 1

    cpu_team.run(items, work)
    assert done == [1] * items


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Whatever other tests left torch at."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("team", "two_threads")
def test_several_threads_take_part_and_torch_works_inside() -> None:
    both, names = threading.Barrier(2, timeout=30), set()
    x = torch.ones(64, 64)
    results = [torch.empty(64, 64) for _ in range(2)]

    def work(item: int) -> None:
        both.wait()
        names.add(threading.get_ident())
        torch.mm(x, x, out=results[item])

    cpu_team.run(2, work)
    assert len(names) == 2
    assert all(torch.equal(result, torch.full((64, 64), 64.0)) for result in results)


@pytest.mark.usefixtures("team")
def test_what_the_work_raises_reaches_the_caller() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise ArithmeticError("item 3")

    with pytest.raises(ArithmeticError, match="item 3"):
        cpu_team.run(50, work)


def test_cuts_cover_the_range() -> None:
    for total in (0, 1, 31, 32, 33, 1000):
        pieces = cpu_team.cuts(total, 32)
        assert [i for begin, end in pieces for i in range(begin, end)] == list(range(total))
        assert all(end - begin >= 32 for begin, end in pieces[:-1])
