"""How long a paused machine stays awake for who looks at its files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dutchman import wait_for

from engine.errors import Busy
from engine.runtimes.vm.leases import Leases
from engine.runtimes.vm.pausing import Pausing


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


class Looked:
    """A lock that tells how many have come to it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock, self.waiting = lock, 0

    def __enter__(self) -> None:
        self.waiting += 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


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
    assert not machine.awake.is_set() and not leases._leases


def test_who_waits_while_one_cannot_be_woken_does_not_try_again_in_turn() -> None:
    leases, tried, go = Leases(linger=60), [0], threading.Event()
    failed: list[Busy] = []

    @contextmanager
    def refuse() -> Iterator[None]:
        tried[0] += 1
        assert go.wait(30)
        raise Busy("QEMU does not answer")
        yield

    def ask() -> None:
        try:
            with leases.of("a", refuse):
                raise AssertionError
        except Busy as error:
            failed.append(error)

    first = threading.Thread(target=ask)
    first.start()
    wait_for(lambda: tried[0] == 1, 30)
    lease = leases._leases["a"]
    looked = lease.lock = Looked(lease.lock)
    others = [threading.Thread(target=ask) for _ in range(4)]
    for other in others:
        other.start()
    wait_for(lambda: looked.waiting == 4, 30)
    go.set()
    for thread in (first, *others):
        thread.join(30)
    assert len(failed) == 5 and tried == [1] and not leases._leases


def test_a_machine_that_was_woken_to_end_does_not_sleep_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Pausing, "_qmp", lambda self, id, command: told.append(command))
    monkeypatch.setattr(Pausing, "_freeze", lambda self, id, state: True)
    pausing = Pausing(lambda id: tmp_path)
    pausing.pause("a")
    with pausing.awake("a"):  # for who looks at its files
        pausing.wake("a")  # it is killed meanwhile, and writes out what is on its disk
        assert not (tmp_path / "unsure").exists()
    with pausing.awake("a"):
        pass
    assert told == ["stop", "cont", "cont", "cont"]
    assert not (tmp_path / "unsure").exists()
    pausing.pause("a")  # of another run
    with pausing.awake("a"):
        assert (tmp_path / "unsure").exists()
    assert told[4:] == ["stop", "cont", "stop"]
