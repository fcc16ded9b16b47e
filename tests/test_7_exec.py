"""`exec` through the real mount and with the `dutchman` command: shells, pipes, terminals, a killed daemon."""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import ROOT, Dutchman, demo_archive, needs_oci, wait_for

from fdfs.cli_exec import merged

LIVE = "trap 'exit 0' TERM; while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path_factory.mktemp("exec")) as engine:
        engine.up()
        engine.cli("load", str(demo_archive()))
        engine.make("web", LIVE)
        engine.write("containers/web/ctl", "start")
        yield engine


def run(engine: Dutchman, line: str, name: str = "web") -> str:
    """`run LINE` in exec/ctl: the session's number."""
    fd = os.open(engine.mount / "containers" / name / "exec" / "ctl", os.O_RDWR)
    try:
        os.write(fd, f"run {line}\n".encode())
        return os.read(fd, 100).decode().strip().removeprefix("exec/")
    finally:
        os.close(fd)


def ended(engine: Dutchman, number: str, name: str = "web") -> str:
    """Its exit code once it is over."""
    return str(wait_for(lambda: engine.read(f"containers/{name}/exec/{number}/wait"), 30, f"session {number}"))


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_session_is_a_directory(engine: Dutchman) -> None:
    number = run(engine, "env=A=1 env='B=x y' workdir=/etc sh -c 'pwd; echo $A $B; echo err >&2; exit 4' a=b")
    assert ended(engine, number) == "4"
    web = f"containers/web/exec/{number}"
    assert engine.read(f"{web}/stdout") == "/etc\n1 x y" and engine.read(f"{web}/stderr") == "err"
    assert engine.read(f"{web}/argv").split("\n")[-1] == "a=b"
    assert engine.read(f"{web}/state") == "stopped" and engine.read(f"{web}/ctl") == "remove"
    assert engine.read(f"{web}/started_at") < engine.read(f"{web}/finished_at")
    events = engine.sh(f"grep '\"exec\":{number},' containers/web/events").stdout
    assert "execStarted" in events and '"exit_code":4' in events
    engine.sh(f"rmdir {web} && ! test -e {web}")
    assert int(run(engine, "true")) == int(number) + 1


def test_what_cannot_be_executed_fails_at_the_write(engine: Dutchman) -> None:
    for line, code in (("nope x", "127"), ("/etc/passwd", "126")):
        done = engine.sh(f"echo 'run {line}' > containers/web/exec/ctl", code=1)
        assert "Remote I/O error" in done.stderr
        number = max(os.listdir(engine.mount / "containers/web/exec"), key=lambda n: int(n) if n.isdigit() else 0)
        web = f"containers/web/exec/{number}"
        assert (engine.read(f"{web}/state"), engine.read(f"{web}/exit_code")) == ("failed", code)
        assert line.split()[0] in engine.read(f"{web}/error") and line.split()[0] in engine.read(f"{web}/reason")
    for line, word in (("tty=perhaps true", "tty"), ("workdir=etc true", "workdir"), ("user=nobody2 true", "user")):
        engine.sh(f"echo 'run {line}' > containers/web/exec/ctl", code=1)
        assert word in engine.read("containers/web/exec/error").split("\n\n")[0]


def test_input_is_written_and_ended_and_never_blocks_the_mount(engine: Dutchman) -> None:
    number = run(engine, "stdin=true sh -c 'while read x; do echo got $x; done; echo end'")
    web = f"containers/web/exec/{number}"
    engine.sh(f"echo one > {web}/stdin; printf 'two\\nthr' > {web}/stdin; echo ee >> {web}/stdin; echo eof > {web}/ctl")
    assert ended(engine, number) == "0"
    assert engine.read(f"{web}/stdout") == "got one\ngot two\ngot three\nend"
    number = run(engine, "stdin=true sleep 1000")
    web = f"containers/web/exec/{number}"
    assert "timed out" in engine.sh(f"head -c 3000000 /dev/zero > {web}/stdin", code=1).stderr
    assert "does not read" in engine.read(f"{web}/error")
    engine.sh(f"echo kill > {web}/ctl")
    assert ended(engine, number) == "137"
    number = run(engine, "sleep 1000")
    assert "busy" in engine.sh(f"echo x > containers/web/exec/{number}/stdin", code=1).stderr
    engine.sh(f"echo kill TERM > containers/web/exec/{number}/ctl")
    assert ended(engine, number) == "143"


def test_sessions_that_are_over_are_kept_bounded_and_go_with_the_next_start(engine: Dutchman) -> None:
    (engine.mount / "containers" / "brief").mkdir()
    config = "{image: 'demo:1', command: [sleep, inf], runtime: fake}"  # forty real processes would take long
    (engine.mount / "containers" / "brief" / "config.yaml").write_text(config)
    engine.sh("echo start > containers/brief/ctl")
    lines = "\n".join(["run true"] * 40)
    engine.sh(f"echo '{lines}' > containers/brief/exec/ctl", timeout=120)
    place = engine.mount / "containers" / "brief" / "exec"
    wait_for(lambda: len([name for name in os.listdir(place) if name.isdigit()]) == 32, 30)
    last = run(engine, "sleep 1000", "brief")
    assert int(last) == 41
    engine.sh("echo stop > containers/brief/ctl")
    engine.await_state("brief", "stopped")
    assert ended(engine, last, "brief") == "137"
    engine.sh("echo 'run true' > containers/brief/exec/ctl", code=1)
    engine.sh("echo start > containers/brief/ctl")
    assert not [name for name in os.listdir(place) if name.isdigit()]
    assert int(run(engine, "true", "brief")) == 42
    engine.sh("echo stop 0 > containers/brief/ctl; rmdir containers/brief")


def test_a_containers_own_input_through_the_mount(engine: Dutchman) -> None:
    (engine.mount / "containers" / "fed").mkdir()
    (engine.mount / "containers" / "fed" / "config.yaml").write_text("{image: 'demo:1', command: [cat], stdin: true}")
    engine.sh("echo start > containers/fed/ctl; echo hello > containers/fed/stdin; grep -q eof containers/fed/ctl")
    engine.sh("echo eof > containers/fed/ctl")
    engine.await_state("fed", "stopped")
    assert engine.read("containers/fed/logs/stdout") == "hello" and engine.read("containers/fed/exit_code") == "0"
    engine.sh("rmdir containers/fed")


def test_sessions_survive_a_killed_daemon(tmp_path: Path) -> None:
    needs_oci()
    with Dutchman(tmp_path) as engine:
        engine.expect("was running, found|exec/|input")
        engine.up()
        engine.cli("load", str(demo_archive()))
        engine.make("web", LIVE)
        engine.sh("echo start > containers/web/ctl")
        script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.005; done; exit 6"
        counting = run(engine, f"sh -c '{script}'")
        feeding = run(engine, "stdin=true cat")
        engine.sh(f"echo before > containers/web/exec/{feeding}/stdin")
        brief = run(engine, "sh -c 'sleep 0.2; exit 8'")
        created = run(engine, "attach=true sh -c 'echo > /touched'")
        engine.kill()
        engine.up()
        web = "containers/web/exec"
        assert ended(engine, brief) == "8"
        assert ended(engine, counting) == "6"
        assert engine.read(f"{web}/{counting}/stdout") == "\n".join(f"line {i}" for i in range(300))
        assert engine.read(f"{web}/{feeding}/state") == "running"
        engine.sh(f"echo after > {web}/{feeding}/stdin; echo eof > {web}/{feeding}/ctl")
        assert ended(engine, feeding) == "0"
        assert engine.read(f"{web}/{feeding}/stdout") == "before\nafter"
        assert engine.read(f"{web}/{created}/state") == "failed"  # nobody is left to start it
        assert "nothing of it had run" in engine.read(f"{web}/{created}/reason")
        engine.sh("test ! -e containers/web/rootfs/touched")
        assert engine.sh("grep -c execEnded containers/web/events").stdout == "4\n"


# --- the command ----------------------------------------------------------------------------------------------------


def piped(engine: Dutchman, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "fdfs", *words], env=engine.env, cwd=ROOT, input=data, capture_output=True, timeout=90
    )


def test_exec_passes_pipes_and_exit_codes_on(engine: Dutchman) -> None:
    done = piped(engine, "exec", "-e", "A=x y", "-w", "/etc", "web", "sh", "-c", "pwd\necho $A; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"/etc\nx y\n", b"err\n")
    assert piped(engine, "exec", "web", "nope").returncode == 127
    assert piped(engine, "exec", "web", "/etc/passwd").returncode == 126
    assert piped(engine, "exec", "web", "cat", data=b"unread").stdout == b""
    data = os.urandom(50 << 20)
    done = piped(engine, "exec", "-i", "web", "cat", data=data)
    assert done.returncode == 0 and done.stdout == data
    detached = piped(engine, "exec", "-d", "web", "sh", "-c", "exit 3")
    assert ended(engine, detached.stdout.decode().strip()) == "3"
    done = piped(engine, "exec", "-it", "web", "sh")
    assert done.returncode == 1 and b"not a terminal" in done.stderr


def test_a_signal_to_exec_reaches_the_process(engine: Dutchman) -> None:
    script = "trap 'exit 5' INT; echo up; while :; do sleep 0.05; done"
    command = [sys.executable, "-m", "fdfs", "exec", "web", "sh", "-c", script]
    with subprocess.Popen(
        command, env=engine.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 5


class Screen:
    """The command on a terminal of its own."""

    def __init__(self, engine: Dutchman, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.slave = slave
        self.resize(80, 24)
        self.before = termios.tcgetattr(slave)
        self.seen = b""

        def control() -> None:  # in the child: its own session, on this terminal
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "fdfs", *words],
            env=engine.env,
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=control,
        )

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def until(self, wanted: bytes, seconds: float = 30) -> bytes:
        """What is shown up to and with `wanted`."""
        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            rest = deadline - time.monotonic()
            assert rest > 0 and select.select([self.master], [], [], rest)[0], f"no {wanted!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        shown, _, self.seen = self.seen.partition(wanted)
        return shown + wanted

    def end(self) -> int:
        """Its exit code; the terminal must be as it was."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_a_terminal_of_ones_own(engine: Dutchman) -> None:
    with Screen(engine, "exec", "-it", "web", "sh") as screen:
        screen.until(b"# ")
        screen.type(b"stty size\r")
        screen.until(b"24 80")
        screen.until(b"# ")
        screen.resize(101, 33)
        screen.type(b"until [ \"$(stty size)\" = '33 101' ]; do sleep 0.05; done; echo res''ized\r")
        screen.until(b"resized")
        screen.until(b"# ")
        screen.type(b"echo rea''dy; cat\r")
        screen.until(b"ready\r\n")
        screen.type(b"typed\r")
        screen.until(b"typed\r\ntyped")
        screen.type(b"\x03")
        screen.until(b"# ")
        screen.type(b"exit 9\r")
        assert screen.end() == 9
    with Screen(engine, "exec", "-it", "web", "sh") as screen:
        screen.until(b"# ")
        screen.type(b"\x10\x11")
        assert screen.end() == 0
    number = max(int(name) for name in os.listdir(engine.mount / "containers/web/exec") if name.isdigit())
    assert engine.read(f"containers/web/exec/{number}/state") == "running"
    engine.sh(f"echo kill > containers/web/exec/{number}/ctl")
    with Screen(engine, "exec", "-it", "web", "nope") as screen:
        assert screen.end() == 127


def test_run_and_attach_with_a_terminal_and_with_pipes(engine: Dutchman) -> None:
    with Screen(engine, "run", "-it", "--name", "shell", "demo:1", "--", "sh", "-c", "echo hello; exec sh") as screen:
        assert screen.until(b"# ").count(b"hello") == 1
        screen.type(b"echo a''b\r")
        screen.until(b"ab")
        screen.type(b"\x10\x11")
        assert screen.end() == 0
    assert engine.state("shell") == "running"
    with Screen(engine, "attach", "shell") as screen:
        screen.type(b"echo c''d\r")
        screen.until(b"cd")
        screen.type(b"exit 4\r")
        assert screen.end() == 4
    engine.sh("rmdir containers/shell")
    done = piped(engine, "run", "-i", "--rm", "demo:1", "--", "cat", data=b"through\nit")
    assert (done.returncode, done.stdout) == (0, b"through\nit")


def test_cp_copies_both_ways_and_stays_inside(engine: Dutchman, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"x\0y")
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o750)
    (source / "link").symlink_to("/etc/passwd")
    engine.cli("cp", str(source), "web:/root")
    assert piped(engine, "exec", "web", "/root/src/run.sh").stdout == b"ran\n"
    engine.cli("cp", "web:/root/src", str(tmp_path / "back"))
    assert (tmp_path / "back" / "sub" / "file").read_bytes() == b"x\0y"
    assert os.readlink(tmp_path / "back" / "link") == "/etc/passwd"
    assert (tmp_path / "back" / "run.sh").stat().st_mode & 0o777 == 0o750
    engine.cli("cp", "web:/root/src/.", str(tmp_path))
    assert (tmp_path / "run.sh").exists()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("host")
    piped(engine, "exec", "web", "ln", "-s", str(outside), "/root/out")
    piped(engine, "exec", "web", "ln", "-s", str(outside / "kept"), "/root/file")
    (tmp_path / "new").write_text("new")
    assert "No such file" in engine.cli("cp", str(tmp_path / "new"), "web:/root/out/kept", code=1).stderr
    engine.cli("cp", str(tmp_path / "new"), "web:/root/file")
    assert (outside / "kept").read_text() == "host" and os.listdir(outside) == ["kept"]
    assert piped(engine, "exec", "web", "cat", "/root/file").stdout == b"new"
    assert "there is no container" in engine.cli("cp", "nope:/x", str(tmp_path), code=1).stderr


def test_cp_has_tars_on_pipes(engine: Dutchman, tmp_path: Path) -> None:
    made = "mkdir -p /root/t/sub; cd /root/t; echo a > f; ln f sub/g; ln -s /etc/passwd l; chmod 700 ."
    assert piped(engine, "exec", "web", "sh", "-c", made).returncode == 0
    out = piped(engine, "cp", "web:/root/t", "-")
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as archive:
        members = {member.name: member for member in archive}
    assert sorted(members) == ["t", "t/f", "t/l", "t/sub", "t/sub/g"] and members["t"].mode == 0o700
    assert members["t/l"].linkname == "/etc/passwd"
    assert members["t/sub/g"].islnk() and members["t/sub/g"].linkname == "t/f"
    piped(engine, "exec", "web", "ln", "-s", "t", "/root/to")
    for path, name in (("to", "to"), ("to/", "to/f"), ("to/.", "./f")):
        with tarfile.open(fileobj=io.BytesIO(piped(engine, "cp", f"web:/root/{path}", "-").stdout)) as archive:
            assert name in archive.getnames(), path
    one = piped(engine, "cp", "web:/root/t/f", "-")
    with tarfile.open(fileobj=io.BytesIO(one.stdout)) as archive:
        assert archive.getnames() == ["f"]
    piped(engine, "exec", "web", "mkdir", "/root/there")
    for data in (out.stdout, gzip.compress(out.stdout)):  # the second time over what is there
        done = piped(engine, "cp", "-", "web:/root/there", data=data)
        assert done.returncode == 0, done.stderr
    looked = piped(
        engine, "exec", "web", "sh", "-c", "cd /root/there/t; cat sub/g; stat -c %h f; stat -c %a .; readlink l"
    )
    assert looked.stdout == b"a\n2\n700\n/etc/passwd\n"
    outside = tmp_path / "outside"
    outside.mkdir()
    piped(engine, "exec", "web", "ln", "-s", str(outside), "/root/there/away")
    for name in ("away/x", "../x"):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        assert piped(engine, "cp", "-", "web:/root/there", data=raw.getvalue()).returncode == 1
    assert os.listdir(outside) == []
    assert b"bad tar header" in piped(engine, "cp", "-", "web:/root/there", data=b"text" * 500).stderr
    assert b"No such file" in piped(engine, "cp", "-", "web:/root/nowhere", data=out.stdout).stderr
    assert b"of a path in a container" in piped(engine, "cp", "-", str(tmp_path), data=out.stdout).stderr


@pytest.mark.parametrize(
    "text", [random.Random(1).randbytes(4000), b"y\n" * 2000, b"a" * 4000, b"".join(b"%d\n" % n for n in range(900))]
)
def test_what_a_log_and_a_connection_both_have_is_shown_once(text: bytes) -> None:
    """Wherever the connection began and however far the log was read: all of it once, in order."""
    for begin in (0, 1, 700, 2000):
        for least in {0, begin // 2, begin}:
            for ahead, far in ((begin, begin + 500), (begin + 300, begin + 40), (begin + 64, begin + 64), (2500, 2500)):
                shown, skip = merged(text[:ahead], text[begin:far], least)
                assert text.startswith(shown) and skip >= 0
                if text[0] == 48 or least == begin:  # one that nowhere repeats itself, or the place is known
                    assert shown == text[: max(ahead, far)] and skip == max(0, ahead - far), (begin, least, ahead, far)
