"""The agent of a guest: what it runs, how it isolates, its streams and its files, driven through its client.

It is process 1 of namespaces here (agents.py), not of a guest: the same program, less what needs a kernel of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import agents
import pytest
from agentfiles import GuestFiles
from dutchman import wait_for
from runtimebench import SLOW

from engine.errors import DeadlineExceeded, InvalidArgument, RuntimeFailure
from engine.runtimes import seccomp
from engine.runtimes.vm import agentbuild, bpf, protocol
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.protocol import ProtocolError, Side, Type, fields, frame
from engine.runtimes.vm.streams import Data, Exit, Stream

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces without a user namespace need root")
WAIT = 60.0
HELLO = frame(Type.HELLO, 0, protocol.pack_words([b"version=%d" % protocol.VERSION, b"build=x"]))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[agents.Agent]:
    with agents.agent(tmp_path) as found:
        yield found


def until(stream: Stream, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        event = stream.next(deadline=WAIT)
        assert isinstance(event, Data), (event, seen)
        seen += event.data
    return seen


def test_a_process_runs_as_told(agent: agents.Agent) -> None:
    script = (
        "id; pwd; umask; ulimit -n; grep -E 'Cap(Bnd|Eff)|NoNew|Seccomp:' /proc/self/status; cat /etc/masked;"
        " cat /proc/sys/kernel/domainname; echo x > /etc/readonly/y; echo $A;"
        " read line; echo got $line; echo bad >&2; exit 3"
    )
    etc = agent.rootfs / "etc"
    (etc / "masked").write_text("secret\n")
    (etc / "readonly").mkdir()
    stream = agent.run(
        ["sh", "-c", script], uid=1000, gid=1001, group=[5, 6], cwd="/srv/made", umask="27",
        rlimit=[fields(7, 111, 222)], caps=fields("21", "21", "21", "0", "0"), no_new_privs=1,
        masked=["/etc/masked", "/not/there"], readonly=["/etc/readonly"], domainname="dom", stdin=1,
        env=[agents.PATH, "A=b c"], oom_score_adj=100,
    )  # fmt: skip
    with pytest.raises(GuestError) as caught:
        agent.client.call("SIGNAL", {"id": "other", "signal": 15})
    assert caught.value.errno == errno.ESRCH
    agent.client.call("START", {"id": "main"}, deadline=WAIT)
    stream.write(b"this\n")
    end, out, err = stream.wait(deadline=WAIT)
    lines = out.decode().splitlines()
    assert end == Exit(3, False, False)
    assert lines[:4] == ["uid=1000 gid=1001 groups=5,6", "/srv/made", "0027", "111"]
    assert [line.split()[1] for line in lines[4:8]] == ["0" * 16, f"{0x21:016x}", "1", "0"]
    assert lines[8:] == ["dom", "b c", "got this"]
    assert b"Read-only file system" in err
    assert err.endswith(b"bad\n")
    assert not (etc / "readonly/y").exists()


def test_the_container_has_its_own_root_and_pids(agent: agents.Agent) -> None:
    stream = agent.start(["sh", "-c", "ps -o pid,comm; ls /; ls /proc/1/fd; exec sleep 1000"])
    seen = until(stream, b"2\n").decode()
    assert "    1 sh" in seen
    session = agent.exec(
        "s", ["sh", "-c", "ls -l /proc/1/root/; kill -9 1; echo alive"]
    )  # as no signal of its own ends an init
    end, out, _ = session.wait(deadline=WAIT)
    assert end.code == 0
    assert "etc" in out.decode()
    assert out.endswith(b"alive\n")
    with pytest.raises(GuestError) as caught:
        agent.exec("main", ["sh"])
    assert caught.value.errno == errno.EEXIST
    agent.client.call("SIGNAL", {"id": "main", "signal": signal.SIGKILL})
    assert stream.wait(deadline=WAIT)[0] == Exit(137, False, True)
    with pytest.raises(GuestError) as caught:
        agent.exec("late", ["sh"])
    assert caught.value.errno == errno.ESRCH


def test_what_cannot_start_says_why(agent: agents.Agent) -> None:
    with pytest.raises(GuestError, match="the mount of nofs at /x") as caught:
        agent.run(["sh"], mount=[fields("nofs", "/x", "nofs", 0, "")])
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(GuestError, match="argv"):
        agent.client.open("RUN", {"id": "main", "rootfs": agent.rootfs})
    stream = agent.run(["missing"])
    with pytest.raises(GuestError, match=r"exec missing \(looked for in \$PATH\)") as caught:
        agent.client.call("START", {"id": "main"}, deadline=WAIT)
    assert caught.value.errno == errno.ENOENT
    assert stream.wait(deadline=WAIT)[0].code == 127


def test_a_terminal(agent: agents.Agent) -> None:
    main = agent.start(["sh", "-c", "stty size; tty; read x; stty size"], tty=1, size=fields(30, 100), stdin=1)
    assert until(main, b"/dev/pts/0").startswith(b"30 100")
    agent.client.call("RESIZE", {"id": "main", "rows": 40, "columns": 80})
    session = agent.exec("t", ["sh", "-c", "tty; exit 5"], tty=1, stdin=1)
    end, out, err = session.wait(deadline=WAIT)
    assert (end.code, out, err) == (5, b"/dev/pts/1\r\n", b"")
    main.write(b"\n")
    end, out, _ = main.wait(deadline=WAIT)
    assert end.code == 0
    assert b"40 80" in out


def test_init_reaps_and_forwards_signals(agent: agents.Agent) -> None:
    script = "trap 'echo term; exit 7' TERM; (sleep 0 &); echo ready $$; while :; do sleep 0.1; done"
    stream = agent.start(["sh", "-c", script], init=1)
    assert until(stream, b"ready") == b"ready 2\n"
    agent.client.call("SIGNAL", {"id": "main", "signal": signal.SIGTERM})
    end, out, _ = stream.wait(deadline=WAIT)
    assert (end.code, out) == (7, b"term\n")


def test_streams_have_credit_and_do_not_hold_up_others(agent: agents.Agent) -> None:
    agent.start(["sleep", "1000"])
    flood = agent.exec("flood", ["sh", "-c", "dd if=/dev/zero bs=64k count=64 2>/dev/null; echo end >&2"])
    agent.client.ping(deadline=WAIT)  # nobody reads the flood: it stops at the window, others are answered
    blob = os.urandom(3 << 20)
    echo = agent.exec("echo", ["cat"], stdin=1)
    feeder = threading.Thread(target=lambda: (echo.write(blob, deadline=WAIT), echo.end_input()))
    feeder.start()
    end, out, _ = echo.wait(deadline=WAIT)
    feeder.join()
    assert end.code == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(blob).digest()
    end, out, err = flood.wait(deadline=WAIT)
    assert (end.code, len(out), err) == (0, 64 << 16, b"end\n")
    behind = agent.exec("behind", ["sh", "-c", "sleep 1000 & echo x"])  # a child keeps its stdout
    assert behind.wait(deadline=WAIT)[:2] == (Exit(0, False, False), b"x\n")
    closed = agent.exec("closed", ["sh", "-c", "exec <&-; read x < /dev/null; exec sleep 1000"], stdin=1)
    closed.write(bytes(1 << 20), deadline=WAIT)  # read by nobody: taken and dropped
    agent.client.call("SIGNAL", {"id": "closed", "signal": 9})
    assert closed.wait(deadline=WAIT)[0].signaled


def test_a_port_of_the_guest(agent: agents.Agent) -> None:
    stream = agent.start(["sh", "-c", "echo up; nc -l -p 7000 -e cat"])
    until(stream, b"up")
    line = None
    for _ in range(200):
        try:
            line, _values = agent.client.open("DIAL", {"kind": "tcp", "port": 7000})
            break
        except GuestError as error:
            assert error.errno == errno.ECONNREFUSED
            time.sleep(0.05)  # until it listens
    assert line is not None
    line.write(b"over there")
    assert until(line, b"over there")
    line.end_input()
    assert stream.wait(deadline=WAIT)[0].code == 0
    with pytest.raises(GuestError, match="vsock port 9 in the guest"):
        agent.client.open("DIAL", {"kind": "vsock", "port": 9})


def test_a_seccomp_profile(agent: agents.Agent) -> None:
    rules = [
        {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOTUNIQ},
        {"names": ["getpid"], "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["kill"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 1, "value": 7, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
    ]
    code = bpf.compile_profile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}, os.uname().machine)
    stream = agent.start(
        ["sh", "-c", "mkdir /x; kill -7 1 || kill -0 1 && echo alive"],
        seccomp=code, no_new_privs=1, uid=7, caps=fields(*"00000"), init=1,
    )  # fmt: skip
    end, out, err = stream.wait(deadline=WAIT)
    assert end.code == 1, (out, err)  # init is root's: it may not be signalled either
    assert os.strerror(errno.ENOTUNIQ).encode() in err
    with pytest.raises(InvalidArgument, match="SCMP_ACT_NOTIFY"):
        bpf.compile_profile({"defaultAction": "SCMP_ACT_NOTIFY"}, "x86_64")


def test_the_default_profile_fits_every_guest() -> None:
    for caps in ((), ("CAP_SYS_ADMIN", "CAP_CHOWN")):
        profile = seccomp.default_profile(caps, os.uname().machine)
        for machine in agentbuild.ARCHITECTURES:
            assert 100 < len(bpf.compile_profile(profile, machine)) // 8 <= 4096  # what the kernel takes


def test_files_below_a_root(agent: agents.Agent) -> None:
    made = "mkdir /d; ln -s / /d/up; ln -s /etc /d/etc; mkfifo /d/fifo; echo ready; exec sleep 1000"
    (agent.rootfs / "bin/ln").symlink_to("busybox")
    (agent.rootfs / "bin/mkfifo").symlink_to("busybox")
    until(agent.start(["sh", "-c", made]), b"ready")
    files = GuestFiles(agent.client, deadline=WAIT)
    size = len("root:x:0:0:root:/root:/bin/sh\n")
    assert files.stat("d/up/../../../etc/passwd").size == files.stat("/d/etc/passwd").size == size
    assert files.readlink("d/up") == "/"
    assert {name for name, _ in files.entries("")} >= {"bin", "d", "proc"}
    for path, number in (
        ("d/fifo", errno.ENXIO),
        ("d", errno.EISDIR),
        ("d/up", errno.ELOOP),
        ("nope", errno.ENOENT),
        ("dev/null", errno.ENXIO),
        ("d/\0", errno.EINVAL),
    ):
        with pytest.raises(GuestError) as caught:
            files.open(path, "r")
        assert caught.value.errno == number, path
    for path in ("..", "d/..", "d/.", "d/"):
        with pytest.raises(GuestError) as caught:
            files.mkdir(path, 0o755)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(GuestError) as caught:
        GuestFiles(agent.client, "nowhere").stat("")
    assert caught.value.errno == errno.ENXIO
    assert not Path("/d").exists()


def test_files_are_made_changed_and_removed(agent: agents.Agent) -> None:
    agent.client.call("ROOT", {"name": "upper", "path": agent.rootfs})
    files = GuestFiles(agent.client, "upper", deadline=WAIT)
    here = agent.rootfs
    handle, attr = files.open("file", "rwcx", 0o4750, uid=5, gid=6)
    assert (attr.mode, attr.uid, attr.gid) == (0o104750, 5, 6)
    with pytest.raises(GuestError) as caught:
        files.open("file", "rwcx")
    assert caught.value.errno == errno.EEXIST
    blob = os.urandom(300_001)
    assert files.write(handle, 0, blob) == len(blob)
    assert files.read(handle, 0, 1 << 20) == blob
    assert files.read(handle, 1 << 20, 10) == b""
    files.fsync(handle)
    files.ftruncate(handle, 10)
    files.fallocate(handle, 0, 0, 100)
    assert files.fstat(handle).size == 100
    assert (here / "file").read_bytes() == blob[:10] + bytes(90)
    files.close(handle)
    with pytest.raises(GuestError) as caught:
        files.read(handle, 0, 1)
    assert caught.value.errno == errno.EBADF
    assert (files.mkdir("sub", 0o700, uid=1, gid=2).mode, files.mknod("node", 0o20640, (7, 8)).rdev_minor) == (
        0o40700,
        8,
    )
    files.symlink("link", "x/y", uid=3, gid=4)
    assert files.link("file", "sub/other").nlink == 2
    files.rename("sub/other", "moved")
    files.chmod("moved", 0o600)
    files.chown("link", 9, -1)
    files.utimens("link", 5, -1_500_000_001)
    info = os.lstat(here / "link")
    assert (info.st_uid, info.st_gid, info.st_atime_ns, info.st_mtime_ns) == (9, 4, 5, -1_500_000_001)
    assert files.stat("link").mtime_ns == -1_500_000_001
    with pytest.raises(GuestError) as caught:
        files.chmod("link", 0o600)
    assert caught.value.errno == errno.EOPNOTSUPP
    files.setxattr("file", "trusted.a", b"x\0y")
    assert (files.listxattr("file"), files.getxattr("file", "trusted.a")) == (["trusted.a"], b"x\0y")
    files.removexattr("file", "trusted.a")
    assert files.listxattr("file") == []
    files.truncate("file", 3)
    assert (here / "moved").stat().st_size == 3
    files.unlink("moved")
    files.rmdir("sub")
    assert files.statfs().namelen == 255
    agent.client.call("PUT", {"path": here / "etc/hosts", "data": "127.0.0.1 x\n", "mode": "600"})
    assert (here / "etc/hosts").read_text() == "127.0.0.1 x\n"


def test_what_the_host_has_laid_down_on_a_disk_is_written(agent: agents.Agent, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    blob = os.urandom((1 << 20) + 4096)
    disk.write_bytes(blob)
    place = agent.rootfs / "small"
    place.mkdir()
    call = agent.client.call
    call("ROOT", {"name": "upper", "path": agent.rootfs})
    call("MOUNT", {"source": "none", "target": place, "type": "tmpfs", "flags": 0, "data": "size=256k"})
    files = GuestFiles(agent.client, "upper", deadline=WAIT)
    handle, _ = files.open("big", "wc")
    late, _ = files.open("late", "wc")

    def write(at: int, offset: int, size: int, to: int = handle) -> protocol.Values:
        return call("WRITE", {"handle": to, "offset": offset, "from": at, "size": size}, deadline=WAIT)

    with pytest.raises(GuestError) as caught:
        write(0, 0, 4096)  # of no disk
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(GuestError) as caught:
        call("SCRATCH", {"disk": tmp_path / "none", "at": 0, "size": 4096})
    assert caught.value.errno == errno.ENOENT
    assert call("SCRATCH", {"disk": disk, "at": 4096, "size": 100}).need("data") == blob[4096:4196]
    assert write(0, 0, 1 << 20).number("size") == 1 << 20
    assert write(4096, 1 << 20, 777).number("size") == 777  # not of whole blocks
    assert write(8192, 3, 4096).number("size") == 4096  # nor at one
    whole = blob[: 1 << 20] + blob[4096 : 4096 + 777]
    whole = whole[:3] + blob[8192 : 8192 + 4096] + whole[4099:]
    assert (agent.rootfs / "big").read_bytes() == whole
    for at, size in ((-4096, 4096), (1, 4096), (512, 4096), (0, 0), (0, -1), (0, (1 << 20) + 1)):
        with pytest.raises(GuestError) as caught:
            write(at, 0, size)
        assert caught.value.errno == errno.EINVAL, (at, size)
    with pytest.raises(GuestError) as caught:
        write(1 << 20, 0, 8192)  # beyond its end
    assert caught.value.errno == errno.EIO
    assert (agent.rootfs / "big").read_bytes() == whole
    # a full file system takes some, and says why not all; it knows no way past the page cache
    full, _ = files.open("small/file", "wc")
    values = write(0, 0, 1 << 20, full)
    assert (values.number("size"), values.number("error")) == (256 << 10, errno.ENOSPC)
    files.close(handle)
    files.forget_handles()  # a new host: what an old one was to have written is not looked at
    with pytest.raises(GuestError) as caught:
        write(0, 0, 4096, late)
    assert caught.value.errno == errno.EBADF
    assert (agent.rootfs / "late").read_bytes() == b""


def test_a_large_folder_is_listed_whole_while_it_shrinks(agent: agents.Agent) -> None:
    many = agent.rootfs / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"n{number:05}-{'x' * 200}").touch()
    agent.client.call("ROOT", {"name": "upper", "path": agent.rootfs})
    files = GuestFiles(agent.client, "upper", deadline=WAIT)
    names = [name for name, _ in files.entries("many")]
    assert len(names) == len(set(names)) == 1000
    assert next(files.entries("many"))[0] in names  # the rest is not wanted: its handle is closed
    for name, _ in files.entries("many"):
        files.unlink(f"many/{name}")
    assert list(files.entries("many")) == []
    files.forget_handles()


def children(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stopped(pid: int) -> bool:
    """All threads: the signal does not come to them at once."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_file_workers_that_are_killed_are_replaced(agent: agents.Agent) -> None:
    """More often than there is memory for requests and answers that go through it."""
    agent.client.call("ROOT", {"name": "upper", "path": agent.rootfs}, deadline=WAIT)
    files = GuestFiles(agent.client, "upper", deadline=WAIT)
    (agent.rootfs / "many").mkdir()
    for number in range(100):
        (agent.rootfs / f"many/n{number}-{'x' * 200}").touch()
    [main] = children(agent.process.pid)
    for _ in range(12):
        assert len(list(files.entries("many"))) == 100  # a long answer, not copied
        [worker] = children(main)
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda pid=worker: stopped(pid), WAIT)
        with pytest.raises(DeadlineExceeded):
            agent.client.call("STAT", {"root": "upper", "path": "etc/passwd"}, deadline=0.05)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda gone=worker: [pid for pid in children(main) if pid != gone] != [], WAIT)
    assert files.stat("etc/passwd").size


class Peer:
    """Plays an agent for the client."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.sendall(HELLO)
        self.client = AgentClient(theirs, deadline=WAIT)

    def request(self) -> protocol.Frame:
        parser = protocol.Parser(Side.HOST)
        while True:
            for found in parser.feed(self.sock.recv(1 << 18)):
                return found


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 12,
        frame(Type.REQ, 1, b"\5\0\0\0abc"),
        frame(Type.REQ, 1, protocol.pack_words([b"MKDIR", b"no key"])),
        frame(Type.RESP, 1, protocol.response(0)),
        frame(Type.REQ, 1, b"x" * (protocol.MAX_PAYLOAD + 1)),
    ],
)
def test_an_agent_that_is_told_nonsense_ends_its_guest(data: bytes) -> None:
    """Whoever speaks to it is not the engine it knows: no state is kept for that."""
    ours, theirs = socket.socketpair()
    process = agents.spawn(theirs)
    with ours:
        ours.settimeout(WAIT)
        assert ours.recv(1 << 16), "its hello"
        with suppress(BrokenPipeError, ConnectionResetError):
            ours.sendall(data)
        with suppress(ConnectionResetError):
            assert ours.recv(1 << 16) == b""
    assert process.wait(WAIT) != 0


def test_a_deadline_passes_and_the_late_answer_is_dropped() -> None:
    peer = Peer()
    with pytest.raises(DeadlineExceeded, match="SYNC"):
        peer.client.call("SYNC", deadline=0.05)
    late = peer.request()
    peer.sock.sendall(frame(Type.RESP, late.stream, protocol.response(0)))
    answer = threading.Thread(
        target=lambda: peer.sock.sendall(frame(Type.RESP, peer.request().stream, protocol.response(0, {"a": "b"})))
    )
    answer.start()
    assert peer.client.call("SYNC", deadline=WAIT).text("a") == "b"
    answer.join()
    peer.client.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff" * 12, "unknown type"),
        (frame(Type.RESP, 77, protocol.response(0)), "which nobody has"),
        (frame(Type.PONG, 77), "which nobody has"),
        (frame(Type.EXIT, 1, protocol.EXITED.pack(0, 0)), "on the stream of SYNC"),
    ],
)
def test_a_guest_that_breaks_a_rule_loses_its_connection(data: bytes, reason: str) -> None:
    peer = Peer()
    failed: list[BaseException] = []

    def call() -> None:
        try:
            peer.client.call("SYNC", deadline=WAIT)
        except ProtocolError as error:
            failed.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    peer.request()
    peer.sock.sendall(data)
    caller.join(WAIT)
    assert failed, "who waits is woken"
    assert reason in str(failed[0])
    with pytest.raises(ProtocolError, match=reason):
        peer.client.call("SYNC")
    assert peer.client.closed


def test_a_closed_connection_wakes_who_waits() -> None:
    peer = Peer()
    closer = threading.Thread(target=lambda: (peer.request(), peer.sock.close()))
    closer.start()
    with pytest.raises(RuntimeFailure, match="closed the connection"):
        peer.client.call("SYNC", deadline=WAIT)
    closer.join()
    peer.client.close()


def test_an_agent_that_takes_nothing_holds_nobody_beyond_the_deadline() -> None:
    peer = Peer()
    with pytest.raises(DeadlineExceeded):
        for _ in range(100):
            peer.client.call("PUT", {"path": "/x", "data": bytes(100_000)}, deadline=0.05)
            raise AssertionError("nobody answered")
    peer.client.close()


if SLOW:  # it makes a C library twice

    @pytest.mark.timeout(1200)
    def test_the_agent_is_the_same_bytes_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("first", "again"):  # each with caches of its own: nothing is taken from the other
            monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / f"{name} cache"))
            monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path / f"{name} cache"))
            agentbuild.compile_sources(os.uname().machine, tmp_path / name)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_the_parser_of_the_agent_withstands_mutated_frames() -> None:
    fuzzer = Path(__file__).parents[1] / "tools/fuzz/agent.py"
    done = subprocess.run([sys.executable, fuzzer, "--turns", "20000"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_said_of_a_process_stays_while_more_is_said(agent: agents.Agent) -> None:
    stream = agent.run(["sh", "-c", "echo said"])
    for number in range(3):  # each as long as what RUN said, and where that was read
        agent.client.call("PUT", {"path": agent.rootfs / "tmp/f", "data": b"%d" % number * 60_000}, deadline=WAIT)
    agent.client.call("START", {"id": "main"}, deadline=WAIT)
    ended, out, _ = stream.wait(deadline=WAIT)
    assert (ended.code, out) == (0, b"said\n")
