"""The monitor that takes conmon's place where there is none: log, input, output, ends; a shell is its runtime."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import attachline
from engine.errors import DeadlineExceeded, NotFound, RuntimeFailure
from engine.logformat import parse
from engine.runtimes import calls, conmon, pids, stdio
from engine.runtimes.conmon import Facts, Files

# what becomes the process: $SCRIPT, after it is ready (descriptor 3: engine/runtimes/monitor.py); `early` before that
RUNTIME = """#!/bin/sh
. "{place}/early"
printf ready >&3
exec sh "{place}/script"
"""
# as the process of a machine does: it ends when its monitor has
WATCHED = "(cat <&3 >/dev/null; kill -9 $$) & exec sleep 1000"


class Kept:
    """A process under a monitor."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files = Files(place / "container", "a" * 64, place / "exits")
        for directory in ("bundle", "run", "run/exits", "logs"):
            (self.files.directory / directory).mkdir(parents=True)
        self.files.spare.mkdir(parents=True)
        self.facts: Facts | None = None

    def start(self, script: str, early: str = "", *, stdin: bool = False, terminal: bool = False) -> Facts:
        (self.place / "early").write_text(early + "\n")
        (self.place / "script").write_text(script + "\n")
        runtime = self.place / "runtime"
        runtime.write_text(RUNTIME.format(place=self.place))
        runtime.chmod(0o755)
        monitor = str(calls.program(self.place, "monitor", "monitor"))
        stdio.note_terminal(self.files, terminal)
        self.facts = conmon.launch(monitor, str(runtime), [], self.files, terminal=terminal, stdin=stdin)
        return self.facts

    def end(self) -> int:
        """How the process ended, when its monitor has."""
        assert self.facts is not None
        held = pids.open_process(self.facts.conmon, self.facts.conmon_start)
        if held is not None:
            assert pids.ended(held, 60)
            os.close(held)
        found = conmon.exit_code(self.files)
        assert found is not None and (self.files.exit.read_text(), self.files.kept_exit.read_text()) == (
            str(found[0]),
            str(found[0]),
        )
        return found[0]

    def log(self) -> list[tuple[str, str, bytes]]:
        """Stream, tag and content of each record."""
        out = []
        for line in self.files.log.read_bytes().split(b"\n")[:-1]:
            record = parse(line)
            assert record is not None and line[35:45] in (b" stdout F ", b" stdout P ", b" stderr F ", b" stderr P ")
            assert line[19:20] == b"." and line[29:35] == b"+00:00"
            out.append(("stderr" if record[1] else "stdout", "P" if record[2] else "F", record[3]))
        return out

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path)
    yield found
    if found.facts is not None:
        for pid, started in ((found.facts.pid, found.facts.pid_start), (found.facts.conmon, found.facts.conmon_start)):
            held = pids.open_process(pid, started)
            if held is not None:
                pids.send(held, signal.SIGKILL)
                pids.ended(held, 60)
                os.close(held)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


# one step after the other: each waits to be told
STEPS = (
    r"printf 'a line\npart'",
    r"printf ' two\n\n'",
    r"printf 'no end'; printf 'err\n' >&2",
    "printf tail",
    "exit 3",
)


def test_the_log_is_what_conmon_writes(kept: Kept, tmp_path: Path) -> None:
    told = [fifo(tmp_path / f"step{number}") for number in range(len(STEPS))]
    kept.start("\n".join(f"read -r _ < '{go}'; {step}" for go, step in zip(told, STEPS, strict=True)))
    for go, size in zip(told, [0, 2, 4, 6, 7], strict=True):
        kept.until(lambda size=size: len(kept.log()) == size)  # type: ignore[misc]
        go.write_text("go\n")
    assert kept.end() == 3
    out = [("F", b"a line"), ("P", b"part"), ("F", b" two"), ("F", b""), ("P", b"no end"), ("P", b"tail")]
    assert [record[1:] for record in kept.log() if record[0] == "stdout"] == out
    assert [record[1:] for record in kept.log() if record[0] == "stderr"] == [("F", b"err")]
    assert os.stat(kept.files.log).st_mode & 0o777 == 0o600


@pytest.mark.skipif(shutil.which("conmon") is None and not os.environ.get("CI"), reason="needs conmon")
def test_conmon_itself_agrees(kept: Kept, tmp_path: Path) -> None:
    """The same process under both: the same records of a long line, the same code, the same report of a failure."""
    script = "head -c 20000 /dev/zero | tr '\\0' x; printf 'y\\nz'; kill -9 $$"
    kept.start(script)
    assert kept.end() == 137
    theirs = Kept(tmp_path / "theirs")
    runtime = tmp_path / "run"
    runtime.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --pid-file ]; do shift; done\nsh "{tmp_path}/script" &\nprintf %s $! > "$2"\n'
    )
    runtime.chmod(0o755)
    program = shutil.which("conmon", path=calls.search_path())
    assert program is not None
    theirs.facts = conmon.launch(program, str(runtime), [], theirs.files, terminal=False)
    assert theirs.end() == 137
    joined = [b"".join(content + b"\n" * (tag == "F") for _, tag, content in each.log()) for each in (kept, theirs)]
    assert joined[0] == joined[1] == b"x" * 20000 + b"y\nz"
    assert max(len(content) for _, _, content in kept.log()) <= 8192


def test_the_log_is_opened_anew_when_asked_for(kept: Kept) -> None:
    kept.start("while read -r line; do echo $line; done", stdin=True)
    stdio.send(kept.files, b"one\n")
    kept.until(lambda: kept.log() == [("stdout", "F", b"one")])
    old = kept.files.log.rename(kept.files.log.with_name("ctr.log.1"))
    conmon.reopen_log(kept.files)
    kept.until(kept.files.log.exists)
    stdio.send(kept.files, b"two\n")
    stdio.end_input(kept.files)
    assert kept.end() == 0
    assert b"one" in old.read_bytes() and b"two" not in old.read_bytes()
    assert kept.log() == [("stdout", "F", b"two")]
    with pytest.raises(NotFound):
        conmon.reopen_log(kept.files)
    with pytest.raises(BrokenPipeError):
        stdio.send(kept.files, b"late\n")


def test_what_a_runtime_says_when_it_fails(kept: Kept) -> None:
    with pytest.raises(RuntimeFailure, match="no such thing"):
        kept.start("", early="echo no such thing >&2; exit 1")
    with pytest.raises(RuntimeFailure, match="what is wrong"):
        kept.start("", early="printf 'what is wrong' >&3; exit 1")
    assert conmon.exit_code(kept.files) is None
    kept.start("true", early="echo careful >&2")  # that is no failure
    assert kept.end() == 0 and kept.log() == [("stderr", "F", b"careful")]


def test_input_is_counted_and_what_is_not_taken_is_given_back(kept: Kept, tmp_path: Path) -> None:
    go = fifo(tmp_path / "go")
    kept.start(f"read -r _ < '{go}'; cat", stdin=True)
    data, sent = os.urandom(1 << 20), 0
    with pytest.raises(DeadlineExceeded):
        while True:
            sent += stdio.send(kept.files, data[sent : sent + 50_000], 0.2)
    assert 0 < sent < len(data)
    go.write_text("go\n")
    while sent < len(data):
        sent += stdio.send(kept.files, data[sent:], 30)
    stdio.end_input(kept.files)
    assert kept.end() == 0
    assert b"".join(content + b"\n" * (tag == "F") for _, tag, content in kept.log()) == data


def test_clients_get_all_output_and_may_end_the_input(kept: Kept) -> None:
    kept.start("echo said; cat; echo done >&2", stdin=True)
    kept.until(lambda: bool(kept.log()))
    path = stdio.attach_path(kept.files)
    assert path.name == attachline.STREAM and path.stat().st_mode & 0o777 == 0o600
    data, got, said = os.urandom(3 << 20), bytearray(), bytearray()
    with stdio.connect(path) as quiet, stdio.connect(path) as client:

        def read(line: socket.socket, into: bytearray) -> None:
            while piece := line.recv(5000):
                assert len(piece) <= 5000 and piece[0] in (2, 3)
                (into if piece[0] == 2 else said).extend(piece[1:])

        readers = [
            threading.Thread(target=read, args=(client, got)),
            threading.Thread(target=read, args=(quiet, bytearray())),
        ]
        for reader in readers:
            reader.start()
        for start in range(0, len(data), 30_000):
            client.sendall(data[start : start + 30_000])
        client.shutdown(socket.SHUT_WR)
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
    assert kept.end() == 0
    assert bytes(got) == data and said == b"done\ndone\n"
    with pytest.raises(NotFound):
        stdio.connect(path)


def test_a_piece_that_comes_byte_by_byte_is_whole(tmp_path: Path) -> None:
    """And a time-out in the middle of its head loses nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / attachline.STREAM))
        server.listen()
        with attachline.connect(tmp_path / attachline.STREAM) as client:
            other, _ = server.accept()
            client.settimeout(0.01)
            for byte in b"\x03\x00\x00\x00":
                other.send(bytes([byte]))
                with pytest.raises(TimeoutError):
                    client.recv(100)
            other.send(b"\x03")
            with pytest.raises(TimeoutError):
                client.recv(100)
            client.settimeout(60)
            other.send(b"ab")
            assert client.recv(100) == b"\x03ab"
            other.send(b"c\x02\x00\x00\x00\x00\x02\x00\x00\x00\x01d")
            assert [client.recv(100), client.recv(100)] == [b"\x03c", b"\x02d"]
            other.close()
            assert client.recv(100) == b""


def test_a_killed_monitor_takes_its_process_along(kept: Kept) -> None:
    facts = kept.start(WATCHED)
    os.kill(facts.conmon, signal.SIGKILL)
    kept.until(lambda: pids.start_time(facts.pid) is None)
    assert conmon.exit_code(kept.files) is None


def test_it_outlives_who_started_it_and_is_found_again(kept: Kept) -> None:
    facts = kept.start("exec sleep 1000")
    assert pids.parent(facts.pid) == facts.conmon and os.getsid(facts.conmon) == facts.conmon
    assert int(kept.files.conmon_pid.read_text()) == facts.conmon and int(kept.files.pid.read_text()) == facts.pid
    conmon.send_signal(facts.pid, facts.pid_start, signal.SIGTERM, "test")
    assert kept.end() == 143
    again = kept.start("exec sleep 1000")
    conmon.kill_conmon(kept.files)  # by its command line
    kept.until(lambda: pids.start_time(again.conmon) is None)


# a runtime that hands over a terminal, as engine/runtimes/vm/pump.py does
GIVER = """
import array, fcntl, os, socket, sys, termios, tty
os.setsid()
master, slave = os.openpty()
tty.setraw(slave)
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
with socket.socket(socket.AF_UNIX) as giving:
    giving.connect(sys.argv[sys.argv.index("--console-socket") + 1])
    socket.send_fds(giving, [b"/dev/ptmx"], [master])
os.close(master)
os.write(3, b"ready")
for number in range(3):
    os.dup2(slave, number)
SCRIPT = "trap 'stty size; exit 9' WINCH; echo here; while :; do read -r line; echo got $line; done"
os.execvp("sh", ["sh", "-c", SCRIPT])
"""


def test_a_terminal_is_taken_over_and_has_a_size(kept: Kept) -> None:
    runtime = kept.place / "giver"
    runtime.write_text(f"#!{shutil.which('python3')}\n{GIVER}")
    runtime.chmod(0o755)
    monitor = str(calls.program(kept.place, "monitor", "monitor"))
    stdio.note_terminal(kept.files, True)
    kept.facts = conmon.launch(monitor, str(runtime), [], kept.files, terminal=True)
    seen = b""
    with stdio.connect(stdio.attach_path(kept.files)) as client:
        client.settimeout(60)
        client.sendall(b"typed\n")
        while b"got typed" not in seen:
            seen += client.recv(4096)[1:]
    assert stdio.send(kept.files, b"again\n") == 6  # who detaches leaves it running
    kept.until(lambda: b"got again" in kept.files.log.read_bytes())
    stdio.resize(kept.files, 101, 43)
    assert kept.end() == 9
    assert kept.log()[-1][2] == b"43 101"


def test_a_log_with_a_bound(kept: Kept, tmp_path: Path) -> None:
    """Of a session: what goes beyond it is for clients alone. Made of conmon's own command line."""
    (tmp_path / "early").write_text("\n")
    (tmp_path / "script").write_text("yes | head -c 1000000\n")
    runtime = tmp_path / "runtime"
    runtime.write_text(RUNTIME.format(place=tmp_path))
    runtime.chmod(0o755)
    monitor = str(calls.program(tmp_path, "monitor", "monitor"))
    argv = conmon.command(monitor, str(runtime), [], kept.files, terminal=False, stdin=False)
    argv += ["-e", "--exec-attach", "--exec-process-spec", "none", "--log-global-size-max", "100000"]
    ends: queue.Queue[bytes] = queue.Queue()
    told, telling = os.pipe()
    ready, readying = os.pipe()
    started, starting = os.pipe()
    environment = conmon.surroundings(_OCI_SYNCPIPE=telling, _OCI_ATTACHPIPE=readying, _OCI_STARTPIPE=started)
    process = subprocess.Popen(argv, cwd=kept.files.run, env=environment, pass_fds=[telling, readying, started])
    os.write(starting, b"1")
    assert process.wait(60) == 0
    assert json.loads(os.read(ready, 100)) == {"data": 0}
    with stdio.connect(stdio.attach_path(kept.files)) as client:  # before it is executed: it misses nothing

        def read() -> None:
            got = b""
            while piece := client.recv(70000):
                got += piece[1:]
            ends.put(got)

        reader = threading.Thread(target=read)
        reader.start()
        os.write(starting, b"1")
        pid = json.loads(os.read(told, 100))["data"]
        assert pid > 0 and len(ends.get(timeout=60)) == 1_000_000
        reader.join(60)
    kept.until(lambda: conmon.exit_code(kept.files) is not None)
    assert 100_000 <= kept.files.log.stat().st_size < 1_000_000
    for fd in (told, telling, ready, readying, started, starting):
        os.close(fd)
