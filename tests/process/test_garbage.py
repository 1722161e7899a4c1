"""Garbage is collected at fixed points of a loop."""

from __future__ import annotations

import gc

import pytest

from harness.process.garbage import collected_by_request


def test_nothing_is_collected_unless_asked() -> None:
    assert gc.isenabled()
    with collected_by_request():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_an_error_restores_it_and_a_nested_use_leaves_it_off() -> None:
    with pytest.raises(RuntimeError), collected_by_request():
        with collected_by_request():
            pass
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
