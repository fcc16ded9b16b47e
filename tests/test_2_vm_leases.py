"""How long a paused machine stays awake for who looks at its files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dutchman import wait_for

from engine.errors import Busy
from engine.runtimes.vm.leases import Leases


class Machine:
    def __init__(self) -> None:
        self.woken = 0
        self.awake = threading.Event()
        self.resumed = False

    @contextmanager
    def wake(self) -> Iterator[None]:
        self.woken += 1
        self.awake.set()
        yield
        self.awake.clear()
        if self.resumed:
            raise Busy("the container went on meanwhile")


def test_it_sleeps_on_after_the_last_of_a_burst_of_calls() -> None:
    leases, machine = Leases(linger=0.2), Machine()
    with leases.of("a", machine.wake):
        for _ in range(3):
            with leases.of("a", machine.wake):
                assert machine.awake.is_set()
        assert not threading.Event().wait(0.5) and machine.awake.is_set()  # a call is under way
    wait_for(lambda: not machine.awake.is_set(), 10)
    assert machine.woken == 1
    machine.resumed = True
    with leases.of("a", machine.wake):
        pass
    wait_for(lambda: not machine.awake.is_set() and not leases._leases, 10)
    assert machine.woken == 2


def test_one_that_cannot_be_woken_is_asked_again_next_time() -> None:
    leases, machine = Leases(linger=60), Machine()

    @contextmanager
    def refuse() -> Iterator[None]:
        raise Busy("not frozen")
        yield

    for _ in range(2):
        with pytest.raises(Busy), leases.of("a", refuse):
            raise AssertionError
    with leases.of("a", machine.wake):
        assert machine.awake.is_set()
    leases.close()
    assert not machine.awake.is_set()
