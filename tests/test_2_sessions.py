"""The contract of sessions (`exec`), kept by `fake`, `oci` (runc exec under conmon; needs root on Linux) and `vm`."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtimebench import OWN, REAL, Bench, bench_of

from engine.errors import Busy, DeadlineExceeded, EngineError, NotFound, RuntimeFailure
from engine.logs import ContainerLogs
from engine.runtimes import conmon, pids, stdio
from engine.runtimes.base import Exit, State
from engine.runtimes.sessions import SessionSpec

EXIT_3 = {"fake": ("exit", "3"), "oci": ("sh", "-c", "exit 3"), "vm": ("sh", "-c", "exit 3")}


class Execs:
    """A running container, and sessions in it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.kind = bench, bench.kind
        self.id = bench.run("sleep", env={"A": "one", "B": "two"})
        self.directory = bench.place / "containers" / self.id
        self.ends: dict[int, queue.Queue[Exit]] = {}
        self.count = 0

    @property
    def driver(self) -> Any:
        return self.bench.runtime.sessions

    def create(self, *argv: str, **more: Any) -> int:
        self.count += 1
        spec = SessionSpec(self.id, self.count, self.directory / "exec" / str(self.count), argv, **more)
        self.driver.create(spec)
        return self.count

    def watch(self, number: int) -> None:
        ends = self.ends[number] = queue.Queue()
        self.driver.watch(self.id, number, ends.put)

    def run(self, *argv: str, **more: Any) -> int:
        number = self.create(*argv, **more)
        assert self.driver.start(self.id, number) > 0
        self.watch(number)
        return number

    def end(self, number: int) -> Exit:
        return self.ends[number].get(timeout=60)

    def output(self, number: int, view: str = "stdout") -> bytes:
        logs = ContainerLogs(self.directory / "exec" / str(number) / "logs")
        try:
            assert logs.caught_up(view, 10)
            return logs.read(view, 0, 1 << 30)
        finally:
            logs.close()

    def state(self, number: int) -> State:
        return State(self.driver.status(self.id, number).state)


@pytest.fixture(scope="module")
def of_oci(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execs]:
    """One container for all tests that leave it running: setting up a driver takes a second."""
    bench = bench_of("oci", tmp_path_factory.mktemp("oci"))
    yield Execs(bench)
    bench.close()


@pytest.fixture(scope="module")
def of_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execs]:
    bench = bench_of("vm", tmp_path_factory.mktemp("vm"))
    yield Execs(bench)
    bench.close()


@pytest.fixture(scope="module")
def of_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execs]:
    bench = bench_of("own", tmp_path_factory.mktemp("own"))
    yield Execs(bench)
    bench.close()


@pytest.fixture(params=[*REAL, *OWN])
def oci(request: pytest.FixtureRequest) -> Execs:
    """Either of the drivers that run programs under conmon."""
    found: Execs = request.getfixturevalue(f"of_{request.param}")
    return found


@pytest.fixture(params=["fake", *REAL, *OWN])
def execs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Execs]:
    if request.param in (*REAL, *OWN):
        yield request.getfixturevalue(f"of_{request.param}")
        return
    bench = bench_of("fake", tmp_path)
    yield Execs(bench)
    bench.close()


# --- the contract ---------------------------------------------------------------------------------------------------


def test_created_then_started_then_over(execs: Execs) -> None:
    assert execs.state(1000) is State.ABSENT
    number = execs.create(*EXIT_3[execs.kind])
    assert execs.state(number) is State.CREATED
    execs.driver.start(execs.id, number)
    execs.watch(number)
    end = execs.end(number)
    assert (end.exit_code, end.reason) == (3, "")
    status = execs.driver.status(execs.id, number)
    assert (status.state, status.exit_code, status.finished_ns) == (State.STOPPED, 3, end.finished_ns)
    with pytest.raises(Busy):
        execs.driver.start(execs.id, number)
    execs.driver.delete(execs.id, number)
    execs.driver.delete(execs.id, number)
    assert execs.state(number) is State.ABSENT


def test_output_is_kept_and_watching_late_tells_the_end(execs: Execs) -> None:
    number = execs.run("echo", "hello", "there")
    execs.end(number)
    assert execs.output(number) == b"hello there\n"
    execs.watch(number)
    assert execs.end(number).exit_code == 0
    execs.watch(999)
    assert execs.end(999).exit_code == 255


def test_what_cannot_be_executed_leaves_nothing(execs: Execs) -> None:
    number = execs.create("no-such-program")
    with pytest.raises(RuntimeFailure, match="not found"):
        execs.driver.start(execs.id, number)
    assert execs.state(number) is State.ABSENT
    with pytest.raises(EngineError):
        execs.driver.signal(execs.id, number, signal.SIGTERM)


def test_input_arrives_in_order_and_ends(execs: Execs) -> None:
    number = execs.run("cat", stdin=True)
    assert execs.driver.send(execs.id, number, b"one\n") == 4
    assert execs.driver.send(execs.id, number, b"two\n") == 4
    execs.driver.end_input(execs.id, number)
    assert execs.end(number).exit_code == 0
    assert execs.output(number) == b"one\ntwo\n"
    with pytest.raises((BrokenPipeError, NotFound)):
        execs.driver.send(execs.id, number, b"late\n")


def test_signals_and_the_end_of_the_container(execs: Execs) -> None:
    execs = Execs(execs.bench)
    first, second = execs.run("sleep", "1000"), execs.run("sleep", "1000")
    execs.driver.signal(execs.id, first, signal.SIGTERM)
    assert execs.end(first).exit_code == 143
    with pytest.raises(Busy):
        execs.driver.signal(execs.id, first, signal.SIGTERM)
    execs.bench.runtime.signal(execs.id, signal.SIGKILL)
    assert execs.end(second).exit_code == 137


def test_deleting_ends_it_even_before_it_started(execs: Execs) -> None:
    created, running = execs.create("sleep", "1000"), execs.run("sleep", "1000")
    execs.driver.delete(execs.id, created)
    execs.driver.delete(execs.id, running)
    assert {execs.state(created), execs.state(running)} == {State.ABSENT}


# --- oci and vm -----------------------------------------------------------------------------------------------------


def test_it_runs_as_the_container_does_unless_told_otherwise(oci: Execs) -> None:
    script = "id -u; echo $A $B $HOME; pwd; grep -E 'CapEff|Seccomp:' /proc/self/status"
    plain, other = oci.run("sh", "-c", script), oci.run("sh", "-c", script, user="web", own_home=True, cwd="/etc")
    added = oci.run("sh", "-c", "echo $A $B", env=("B=new",))
    groups = oci.run("id", "-G", user="web", groups=("4242", "0"))
    for number in (plain, other, added, groups):
        oci.end(number)
    lines = oci.output(plain).decode().split("\n")
    assert lines[:3] == ["0", "one two /root", "/"]
    assert lines[3].split() == ["CapEff:", "00000000a80425fb"] and lines[4].split()[1] == "2"
    lines = oci.output(other).decode().split("\n")
    assert lines[:3] == ["33", "one two /srv", "/etc"] and lines[3].split() == ["CapEff:", "0000000000000000"]
    assert oci.output(added) == b"one new\n"
    assert {"34", "4242", "0"} <= set(oci.output(groups).decode().split())


def test_a_terminal_has_a_size_and_takes_control_c(oci: Execs) -> None:
    number = oci.create("sh", tty=True)
    with stdio.connect(oci.driver.attach_path(oci.id, number)) as terminal:
        oci.driver.start(oci.id, number)
        oci.watch(number)
        oci.driver.resize(oci.id, number, 101, 43)
        seen = b""

        def until(wanted: bytes) -> None:
            nonlocal seen
            terminal.settimeout(20)
            while wanted not in seen:
                seen += terminal.recv(70000)[1:]

        # a guest has the size a moment later
        terminal.send(b"until stty size | grep '^4''3 101$'; do sleep 0.02; done; cat\n")
        until(b"43 101\r\n")
        terminal.send(b"typed\n")
        until(b"typed\r\ntyped\r\n")  # echoed, and said again by cat: from here on ^C is for cat
        terminal.send(b"\x03")
        until(b"^C")
        seen = seen.partition(b"^C")[2]
        until(b"# ")  # the shell asks anew; what is typed before is flushed
        assert oci.driver.send(oci.id, number, b"exit 9\n") == 7  # as a second client
    assert oci.end(number).exit_code == 9


def test_a_process_that_does_not_read_times_out_the_writer(oci: Execs) -> None:
    number = oci.run("sleep", "1000", stdin=True)
    with pytest.raises(DeadlineExceeded):
        for _ in range(64):
            oci.driver.send(oci.id, number, b"x" * 65536)
    oci.driver.delete(oci.id, number)


def test_everything_goes_through_an_attached_socket_and_the_log_is_bounded(
    oci: Execs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runtimes.oci_sessions.LOG_LIMIT", 1 << 20)
    number = oci.create("cat", stdin=True)
    data = os.urandom(8 << 20)
    got = bytearray()
    with stdio.connect(oci.driver.attach_path(oci.id, number)) as client:
        oci.driver.start(oci.id, number)
        oci.watch(number)

        def read() -> None:
            while packet := client.recv(70000):
                got.extend(packet[1:])

        reader = threading.Thread(target=read)
        reader.start()
        for start in range(0, len(data), stdio.PACKET):
            client.send(data[start : start + stdio.PACKET])
        client.shutdown(socket.SHUT_WR)
        reader.join(30)
    assert oci.end(number).exit_code == 0
    assert bytes(got) == data
    assert 0 < (oci.directory / "exec" / str(number) / "logs" / "ctr.log").stat().st_size <= (1 << 20) + 65536


def test_another_daemon_finds_sessions_and_their_input_again(oci: Execs) -> None:
    feeding = oci.run("cat", stdin=True)
    oci.driver.send(oci.id, feeding, b"before\n")
    waiting = oci.create("sleep", "1000")
    oci.bench.runtime.close()
    oci.bench.runtime = oci.bench.connect()
    assert oci.state(feeding) is State.RUNNING and oci.state(waiting) is State.CREATED
    oci.watch(feeding)
    oci.driver.send(oci.id, feeding, b"after\n")
    oci.driver.end_input(oci.id, feeding)
    assert oci.end(feeding).exit_code == 0
    assert oci.output(feeding) == b"before\nafter\n"
    oci.driver.delete(oci.id, waiting)


def test_a_killed_conmon_takes_its_process_along(oci: Execs) -> None:
    number = oci.run("sleep", "1000")
    facts = conmon.Facts.load(oci.directory / "exec" / str(number) / "run" / "facts.json")
    assert facts is not None
    os.kill(facts.conmon, signal.SIGKILL)
    end = oci.end(number)
    assert end.exit_code == 137 and "conmon was killed" in end.reason
    oci.bench.until(lambda: pids.start_time(facts.pid) is None)


def test_a_containers_own_input(oci: Execs) -> None:
    id = oci.bench.run(("cat",), stdin=True)
    runtime = oci.bench.runtime
    assert runtime.console.send(id, b"hello\n") == 6
    runtime.close()
    runtime = oci.bench.runtime = oci.bench.connect()
    ends: queue.Queue[Exit] = queue.Queue()
    runtime.watch(id, lambda _, end: ends.put(end))
    assert runtime.console.send(id, b"again\n") == 6
    runtime.console.end_input(id)
    assert ends.get(timeout=60).exit_code == 0
    assert oci.bench.output(id) == b"hello\nagain\n"


def test_a_process_may_end_as_soon_as_its_input_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = conmon.Files(tmp_path / "session", "1", tmp_path, 1)
    files.run.mkdir(parents=True)
    stdio.note_terminal(files, terminal=False)

    class Line(socket.socket):
        """A fake of the way to conmon: when it is shut, the process has ended and its files are cleared."""

        def shutdown(self, how: int) -> None:
            super().shutdown(how)
            shutil.rmtree(files.directory)

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(stdio, "_held", lambda _: Line(fileno=ours.detach()))
    with theirs:
        stdio.end_input(files)
        assert theirs.recv(1) == b"" and not files.directory.exists()
