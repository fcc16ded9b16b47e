"""What machines are said to use, and how long a mute one is waited for."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import meters
from engine.errors import DeadlineExceeded
from engine.lifecycle import State
from engine.meters import Meters
from engine.processes import guest_processes
from engine.runtimes.vm.protocol import ProtocolError, Values, fields
from engine.stats import guest_resources

TOLD = {
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
    "cpu.max": "50000 100000\n",
    "memory.current": "4096\n",
    "memory.max": "max\n",
    "memory.events": "low 0\noom_kill 2\n",
    "pids.current": "3\n",
    "io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=2\n254:16 rbytes=1 wbytes=2 rios=3 wios=4\n",
    "net.dev": "h\nlo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\neth0: 7 2 0 0 0 0 0 0 9 3 0 0 0 0 0 0\n",
    "meminfo": "MemTotal:         100 kB\nMemFree: 1 kB\n",
}


def values(told: dict[str, str]) -> Values:
    return Values(f"{key}={value}".encode() for key, value in told.items())


class Files:
    """A machine's agent: it answers, refuses, or is mute until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def call(self, verb: str, words: Any, deadline: float) -> Values:
        if not self.go.wait(10):
            raise AssertionError("nobody let it go on")
        if self.error is not None:
            raise self.error
        return values(TOLD) if verb == "STATS" else Values([])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    files = Files()
    guests: Any = SimpleNamespace(files=lambda container: files)
    made = Meters(tmp_path, guests, lambda id: tmp_path)
    for name, seconds in (("PATIENCE", 1.0), ("FRESH", 1.0), ("MUTE", 0.2), ("EVERY", 0.0)):
        monkeypatch.setattr(meters, name, seconds)
    container: Any = SimpleNamespace(id="c", runtime="vm", state=State.RUNNING, started_ns=1, pid=1)
    yield SimpleNamespace(files=files, meters=made, container=container)
    files.go.set()
    made.close()


def test_an_agents_numbers_have_the_names_of_a_hosts() -> None:
    found = guest_resources(values(TOLD))
    assert found["cpu_usec"] == 1500 and found["cpu_limit_percent"] == 50 and found["oom_kills"] == 2
    assert (found["io_read_bytes"], found["io_written_bytes"], found["io_reads"], found["io_writes"]) == (11, 22, 4, 6)
    assert (found["network_received_bytes"], found["network_sent_packets"]) == (7, 3)
    assert "memory_limit_bytes" not in found and found["memory_machine_bytes"] == 100 << 10


def test_a_guest_may_say_anything() -> None:
    wild = {key: "9" * 5000 for key in TOLD} | {
        "cpu.max": "1 0",
        "net.dev": "eth0: " + "x " * 20,
        "io.stat": "²=² rbytes=²",
    }
    assert guest_resources(values(wild))["network_received_bytes"] == 0
    good = [b"7", b"1", b"0", b"33", b"S", b"5", b"250", b"4096", b"1", b"sh", b"sh\x1f-c\x1fx\x1b"]
    (one,) = guest_processes(Values([b"proc=" + fields(*good)]))
    assert (one.pid, one.inside, one.uid, one.cpu_seconds, one.command) == (7, 1, 33, 2.5, "sh -c x\\x1b")
    for bad in (good[:-1], [b"-7", *good[1:]], [b"9" * 30, *good[1:]]):
        with pytest.raises(ProtocolError):
            guest_processes(Values([b"proc=" + fields(*bad)]))


def test_a_mute_machine_is_told_of_once_and_holds_nobody_up(machine: Any) -> None:
    told: list[bool] = []
    changed = threading.Semaphore(0)
    machine.meters.on_change = lambda id, mute: (told.append(bool(mute)), changed.release())
    assert machine.meters.stats(machine.container)["cpu_usec"] == 1500
    assert machine.meters.quick(machine.container)[1:] == (1500, 4096)

    machine.files.go.clear()
    with pytest.raises(DeadlineExceeded, match="did not answer") as caught:
        machine.meters.stats(machine.container)
        machine.meters.stats(machine.container)  # the first may have had the last answer
    assert "kill" in str(caught.value.hint)
    with pytest.raises(DeadlineExceeded):
        machine.meters.processes(machine.container)
    assert machine.meters.latest(machine.container) == {}
    paused: Any = SimpleNamespace(**{**vars(machine.container), "state": State.PAUSED})
    assert machine.meters.stats(paused)["cpu_usec"] == 1500  # as it was: nothing happens in it

    machine.files.error = DeadlineExceeded("no answer")
    machine.files.go.set()
    until = time.monotonic() + 30
    while not told and time.monotonic() < until:
        machine.meters.watch([machine.container])
        changed.acquire(timeout=0.05)
    machine.meters.watch([machine.container])
    assert told == [True]
    machine.files.error = None
    while len(told) < 2 and time.monotonic() < until:
        machine.meters.watch([machine.container])
        changed.acquire(timeout=0.05)
    assert told == [True, False] and machine.meters.latest(machine.container)
