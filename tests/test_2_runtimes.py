"""The contract of runtime drivers, kept by `fake` and by `oci` (runc under conmon; needs root on Linux)."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Busy, DeadlineExceeded, InvalidArgument, NotFound, RuntimeFailure
from engine.logs import ContainerLogs
from engine.model import ContainerConfig, MountKind
from engine.runtimes import cgroups, conmon
from engine.runtimes.base import Exit, Mount, RunSpec, Runtime, State, make_spec
from engine.runtimes.fake import FakeRuntime
from engine.runtimes.oci import OciRuntime
from engine.runtimes.select import host_report, open_runtime
from engine.runtimes.spec import Cgroups

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "echo", "cat", "true", "false", "seq", "id", "head", "yes", "tty", "dd", "touch", "grep")
COMMANDS: dict[str, dict[str, tuple[str, ...]]] = {
    "fake": {"true": ("true",), "exit 3": ("exit", "3"), "hello": ("echo", "hello"), "sleep": ("sleep", "inf")}
    | {"deaf": ("trap", "inf"), "oom": ("oom",), "warn": ("warn", "careful"), "lines": ("lines", "2000")},
    "oci": {
        "true": ("true",),
        "exit 3": ("sh", "-c", "exit 3"),
        "hello": ("echo", "hello"),
        "sleep": ("sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.02; done"),
        "deaf": ("sh", "-c", "trap '' TERM INT; while :; do sleep 0.05; done"),
        "oom": ("sh", "-c", "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"),
        "warn": ("sh", "-c", "echo careful >&2"),
        "lines": ("sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"),
    },
}


def no_oci() -> str | None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if not BUSYBOX.exists():
        return "needs busybox-static"
    probe = OciRuntime(Path("/nonexistent")).probe()
    return None if probe.ok else probe.reason


def skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Bench:
    """One driver, one directory of containers, everything deleted at the end."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind, self.place, self.ids = kind, place, list[str]()
        self.ends: queue.Queue[tuple[str, Exit]] = queue.Queue()
        self.runtime: Runtime = self.connect()

    def connect(self) -> Runtime:
        if self.kind == "fake":
            return FakeRuntime()
        return OciRuntime(self.place / "containers", state=self.place / "state")

    def spec(
        self, command: str | tuple[str, ...], id: str = "", mounts: tuple[Mount, ...] = (), **fields: Any
    ) -> RunSpec:
        id = id or uuid.uuid4().hex * 2
        argv = COMMANDS[self.kind].get(command, (command,)) if isinstance(command, str) else command
        directory = self.place / "containers" / id
        directory.mkdir(parents=True, exist_ok=True)
        if id not in self.ids:
            self.ids.append(id)
        config = ContainerConfig(command=argv, **fields)
        return make_spec(id=id, name="n", directory=directory, rootfs=self.rootfs(), config=config, mounts=mounts)

    def rootfs(self) -> Path:
        root = self.place / "rootfs"
        if not root.exists():
            (root / "bin").mkdir(parents=True)
            (root / "etc").mkdir()
            (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
            (root / "etc" / "group").write_text("root:x:0:\nweb:x:34:\nadm:x:4:web\n")
            if self.kind == "oci":
                (root / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
                (root / "bin" / "busybox").chmod(0o755)
                for name in APPLETS:
                    (root / "bin" / name).symlink_to("busybox")
        return root

    def watch(self, id: str) -> None:
        self.runtime.watch(id, lambda id, end: self.ends.put((id, end)))

    def end(self, seconds: float = 15) -> Exit:
        return self.ends.get(timeout=seconds)[1]

    def run(self, command: str | tuple[str, ...], **fields: Any) -> str:
        run = self.spec(command, **fields)
        self.runtime.create(run)
        self.watch(run.id)
        self.runtime.start(run.id)
        return run.id

    def output(self, id: str, view: str = "stdout") -> bytes:
        logs = ContainerLogs(self.place / "containers" / id / "logs")
        try:
            assert logs.caught_up(view, 10)
            return logs.read(view, 0, 1 << 30)
        finally:
            logs.close()

    def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)

    def close(self) -> None:
        for id in self.ids:
            self.runtime.delete(id)
        self.runtime.close()


def bench_of(kind: str, place: Path) -> Bench:
    if kind == "oci" and (reason := no_oci()):
        skip_or_fail(reason)
    return Bench(kind, place)


@pytest.fixture(params=["fake", "oci"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of(request.param, tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of("oci", tmp_path)
    yield bench
    bench.close()


# --- the contract ---------------------------------------------------------------------------------------------------


def test_probe_says_which_and_why(bench: Bench) -> None:
    probe = bench.runtime.probe()
    assert probe.ok and probe.reason and probe.version


def test_create_then_start_then_end(bench: Bench) -> None:
    run = bench.spec("exit 3")
    assert bench.runtime.status(run.id).state is State.ABSENT
    pid = bench.runtime.create(run)
    status = bench.runtime.status(run.id)
    assert (status.state, status.pid, status.exit_code) == (State.CREATED, pid, None)
    bench.watch(run.id)
    with pytest.raises(queue.Empty):
        bench.end(0.05)
    before = time.time_ns()
    bench.runtime.start(run.id)
    end = bench.end()
    assert (end.exit_code, end.oom, end.reason) == (3, False, "")
    assert before - 10**9 < end.finished_ns < time.time_ns() + 10**9
    status = bench.runtime.status(run.id)
    assert (status.state, status.pid, status.exit_code, status.finished_ns) == (State.STOPPED, None, 3, end.finished_ns)
    bench.runtime.delete(run.id)
    assert bench.runtime.status(run.id).state is State.ABSENT


def test_argv_is_not_executed_before_start(bench: Bench) -> None:
    run = bench.spec("hello")
    bench.runtime.create(run)
    time.sleep(0.1)
    assert bench.output(run.id) == b""
    bench.watch(run.id)
    bench.runtime.start(run.id)
    assert bench.end().exit_code == 0
    assert bench.output(run.id) == b"hello\n"


def test_streams_are_told_apart(bench: Bench) -> None:
    id = bench.run("warn")
    bench.end()
    assert (bench.output(id), bench.output(id, "stderr")) == (b"", b"careful\n")


def test_signals_end_it_with_128_and_their_number(bench: Bench) -> None:
    id = bench.run("sleep")
    if bench.kind == "oci":
        time.sleep(0.2)  # until the shell has its trap: process 1 ignores a signal it has no handler for
    assert bench.runtime.status(id).state is State.RUNNING
    bench.runtime.signal(id, signal.SIGTERM)
    assert bench.end().exit_code == 143
    with pytest.raises(Busy):
        bench.runtime.signal(id, signal.SIGTERM)


def test_sigkill_works_where_sigterm_is_ignored(bench: Bench) -> None:
    id = bench.run("deaf")
    time.sleep(0.2)
    bench.runtime.signal(id, signal.SIGTERM)
    with pytest.raises(queue.Empty):
        bench.end(0.3)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    assert bench.runtime.status(id).exit_code == 137


def test_created_can_be_killed_and_deleted(bench: Bench) -> None:
    run = bench.spec("sleep")
    bench.runtime.create(run)
    bench.watch(run.id)
    bench.runtime.signal(run.id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    assert bench.runtime.status(run.id).state is State.STOPPED


def test_pause_and_resume(bench: Bench) -> None:
    id = bench.run("sleep")
    with pytest.raises(Busy):
        bench.runtime.resume(id)
    bench.runtime.pause(id)
    assert bench.runtime.status(id).state is State.PAUSED
    with pytest.raises(Busy):
        bench.runtime.pause(id)
    bench.runtime.resume(id)
    assert bench.runtime.status(id).state is State.RUNNING
    bench.runtime.pause(id)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137


def test_oom_is_recorded(bench: Bench) -> None:
    id = bench.run("oom", memory="16m")
    end = bench.end()
    assert (end.exit_code, end.oom) == (137, True) and "memory" in end.reason
    assert bench.runtime.status(id).oom


def test_no_such_executable(bench: Bench) -> None:
    run = bench.spec(("no-such-program",))
    with pytest.raises(RuntimeFailure, match=r"no-such-program.*executable file not found"):
        bench.runtime.create(run)
    assert bench.runtime.status(run.id).state is State.ABSENT
    run = bench.spec("true", id=run.id)  # nothing is in the way of the next attempt
    bench.runtime.create(run)


def test_wrong_states_are_busy_and_unknown_ids_not_found(bench: Bench) -> None:
    id = bench.run("sleep")
    with pytest.raises(Busy):
        bench.runtime.start(id)
    with pytest.raises(Busy):
        bench.runtime.create(bench.spec("true", id=id))
    for call in (bench.runtime.start, bench.runtime.pause, bench.runtime.resume, bench.runtime.reopen_log):
        with pytest.raises(NotFound):
            call("unknown")
    with pytest.raises(NotFound):
        bench.runtime.signal("unknown", 15)
    assert bench.runtime.status("unknown").state is State.ABSENT


def test_watch_calls_once_also_when_it_has_ended_already(bench: Bench) -> None:
    id = bench.run("exit 3")
    assert bench.end().exit_code == 3
    bench.watch(id)
    assert bench.end().exit_code == 3
    with pytest.raises(queue.Empty):
        bench.end(0.2)
    bench.watch("unknown")
    end = bench.end()
    assert end.exit_code == 255 and end.reason


def test_a_later_watch_replaces_the_earlier(bench: Bench) -> None:
    id = bench.run("sleep")
    calls: list[int] = []
    bench.runtime.watch(id, lambda id, end: calls.append(1))
    bench.watch(id)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    time.sleep(0.1)
    assert calls == []


def test_a_callback_that_raises_does_not_end_the_watching(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fail(id: str, end: Exit) -> None:
        raise ValueError("a bug in the caller")

    first = bench.run("sleep")
    bench.runtime.watch(first, fail)
    bench.runtime.signal(first, signal.SIGKILL)
    bench.until(lambda: "a bug in the caller" in caplog.text)
    bench.run("exit 3")
    assert bench.end().exit_code == 3


def test_delete_kills_is_idempotent_and_calls_nobody(bench: Bench) -> None:
    id = bench.run("sleep")
    bench.runtime.delete(id)
    bench.runtime.delete(id)
    assert bench.runtime.status(id).state is State.ABSENT
    with pytest.raises(queue.Empty):
        bench.end(0.2)
    bench.runtime.delete("unknown")


def test_logs_go_on_after_a_restart_of_the_container(bench: Bench) -> None:
    id = bench.run("hello")
    bench.end()
    bench.run("hello", id=id)
    bench.end()
    bench.runtime.delete(id)
    assert bench.output(id) == b"hello\nhello\n"


def test_a_torn_record_does_not_harm_the_next_run(bench: Bench) -> None:
    run = bench.spec("hello")
    run.log.parent.mkdir(parents=True)
    run.log.write_bytes(b"2026-03-25T13:20:42.000000000+00:00 stdout F tor")
    bench.runtime.create(run)
    bench.watch(run.id)
    bench.runtime.start(run.id)
    bench.end()
    assert bench.output(run.id) == b"tor\nhello\n"


def test_rotation_while_it_writes_loses_no_line(bench: Bench) -> None:
    run = bench.spec("lines")
    bench.runtime.create(run)
    logs = ContainerLogs(run.log.parent)
    bench.watch(run.id)
    bench.runtime.start(run.id)
    rotations = 0
    while bench.runtime.status(run.id).state is not State.STOPPED:
        rotations += logs.maybe_rotate(5000, None, lambda: bench.runtime.reopen_log(run.id))
        time.sleep(0.002)
    bench.end()
    rotations += logs.maybe_rotate(1, None, lambda: bench.runtime.reopen_log(run.id))
    assert logs.caught_up("stdout", 10)
    assert logs.read("stdout", 0, 1 << 30) == b"".join(b"line %d\n" % n for n in range(2000))
    assert rotations >= 1
    logs.close()


def test_many_at_once(bench: Bench) -> None:
    ids = {bench.run("exit 3") for _ in range(6)}
    ended = {bench.ends.get(timeout=15)[0] for _ in ids}
    assert ended == ids


# --- fake -----------------------------------------------------------------------------------------------------------


def test_fake_sleeps_only_while_it_runs(tmp_path: Path) -> None:
    bench = Bench("fake", tmp_path)
    id = bench.run(("sleep", "0.2"))
    bench.runtime.pause(id)
    with pytest.raises(queue.Empty):
        bench.end(0.4)
    bench.runtime.signal(id, signal.SIGTERM)  # waits until it is resumed
    assert bench.runtime.status(id).state is State.PAUSED
    bench.runtime.resume(id)
    assert bench.end().exit_code == 143
    assert bench.run(("sleep", "0.05")) and bench.end().exit_code == 0
    with pytest.raises(InvalidArgument):
        bench.runtime.create(bench.spec(("exit", "x")))
    bench.close()


def test_choosing_a_driver(tmp_path: Path) -> None:
    assert open_runtime("fake", tmp_path).name == "fake"
    with pytest.raises(InvalidArgument, match="vm2"):
        open_runtime("vm2", tmp_path)
    if sys.platform.startswith("linux"):
        assert open_runtime("auto", tmp_path).name == open_runtime("oci", tmp_path).name == "oci"
    for name, ok, detail, hint in host_report():
        assert name and detail and (ok or hint)


# --- oci ------------------------------------------------------------------------------------------------------------


def test_what_a_process_sees(oci: Bench) -> None:
    source = oci.place / "data"
    source.mkdir()
    (source / "f").write_text("from the host\n")
    mounts = (Mount(MountKind.BIND, source, "/mnt/data", read_only=True), Mount(MountKind.TMPFS, None, "/scratch"))
    script = (
        "id; echo $HOME $HOSTNAME $A; cat /proc/sys/kernel/hostname /mnt/data/f; pwd; touch /mnt/data/x || echo ro;"
        "touch /scratch/x && echo rw; cat /etc/hostname; grep -c . /etc/hosts; echo $$; cat /proc/kcore | head -c 1;"
        "grep CapEff /proc/self/status; grep Seccomp: /proc/self/status"
    )
    run = oci.spec(
        ("sh", "-c", script), mounts=mounts, user="web", workdir="/new/dir", hostname="ship", env={"A": "b c"}
    )
    oci.runtime.create(run)
    oci.watch(run.id)
    oci.runtime.start(run.id)
    oci.end()
    lines = oci.output(run.id).decode().splitlines()
    assert lines[:5] == [
        "uid=33(web) gid=34(web) groups=4(adm),34(web)",
        "/srv ship b c",
        "ship",
        "from the host",
        "/new/dir",
    ]
    assert lines[5:9] == ["ro", "rw", "ship", "6"]
    assert lines[9] == "1"
    assert lines[10].split() == ["CapEff:", "0000000000000000"]
    assert lines[11].split() == ["Seccomp:", "2"]


def test_root_has_dockers_capabilities(oci: Bench) -> None:
    id = oci.run(("grep", "CapEff", "/proc/self/status"))
    oci.end()
    assert oci.output(id).split() == [b"CapEff:", b"00000000a80425fb"]


def test_privileged_and_read_only(oci: Bench) -> None:
    id = oci.run(
        ("sh", "-c", "grep Seccomp: /proc/self/status; touch /x || echo read only"), privileged=True, read_only=True
    )
    oci.end()
    assert oci.output(id).split() == [b"Seccomp:", b"0", b"read", b"only"]


def test_limits_hold(oci: Bench) -> None:
    script = "i=0; while [ $i -lt 40 ]; do sleep 3 & i=$((i+1)); done; echo all"
    id = oci.run(("sh", "-c", script), pids=10)
    assert oci.end().exit_code != 0
    assert b"all" not in oci.output(id)


def test_a_tty(oci: Bench) -> None:
    id = oci.run(("sh", "-c", "tty; echo $TERM"), tty=True)
    assert oci.end().exit_code == 0
    assert oci.output(id).split() == [b"/dev/pts/0", b"xterm"]


def test_not_executable_and_is_a_directory(oci: Bench) -> None:
    (oci.rootfs() / "plain").write_text("x")
    for path in ("/plain", "/etc"):
        with pytest.raises(RuntimeFailure, match=r"permission denied|is a directory"):
            oci.runtime.create(oci.spec((path,)))
    (oci.rootfs() / "garbage").write_text("no format")
    (oci.rootfs() / "garbage").chmod(0o755)
    id = oci.run(("/garbage",))
    assert oci.end().exit_code != 0
    assert b"exec format error" in oci.output(id, "stderr")


def test_unknown_user_names_the_field(oci: Bench) -> None:
    run = oci.spec("true", user="nobody")
    with pytest.raises(InvalidArgument, match="user"):
        oci.runtime.create(run)
    assert oci.runtime.status(run.id).state is State.ABSENT


def test_a_directory_name_of_200_letters_with_a_colon(tmp_path: Path) -> None:
    """conmon splits its log option at colons, and its sockets have short paths."""
    place = tmp_path / ("d" * 200) / "a:b"
    place.mkdir(parents=True)
    bench = bench_of("oci", place)
    id = bench.run("hello")
    assert bench.end().exit_code == 0
    assert bench.output(id) == b"hello\n"
    bench.close()


def test_conmon_killed_is_reported_and_the_container_with_it(oci: Bench) -> None:
    id = oci.run("sleep")
    pid = oci.runtime.status(id).pid
    assert pid is not None
    os.kill(int((oci.place / "containers" / id / "run" / "conmon.pid").read_text()), signal.SIGKILL)
    end = oci.end()
    assert end.exit_code == 137 and "conmon was killed" in end.reason
    assert oci.runtime.status(id).state is State.STOPPED
    oci.until(lambda: not _alive(pid))


def test_conmon_killed_while_no_daemon_watches(oci: Bench) -> None:
    id = oci.run("sleep")
    oci.runtime.close()
    os.kill(int((oci.place / "containers" / id / "run" / "conmon.pid").read_text()), signal.SIGKILL)
    oci.runtime = oci.connect()
    oci.watch(id)
    assert oci.end().exit_code == 137


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


DAEMON = """
    import sys, time
    from pathlib import Path
    from engine.model import ContainerConfig
    from engine.runtimes.base import make_spec
    from engine.runtimes.oci import OciRuntime
    place, id, script = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    runtime = OciRuntime(place / "containers", state=place / "state")
    config = ContainerConfig(command=("sh", "-c", script))
    directory = place / "containers" / id
    runtime.create(make_spec(id=id, name="n", directory=directory, rootfs=place / "rootfs", config=config))
    runtime.watch(id, lambda id, end: None)
    runtime.start(id)
    print("started", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("ends_first", [False, True])
def test_a_container_outlives_a_killed_daemon(oci: Bench, ends_first: bool) -> None:
    run = oci.spec("true")
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; sleep 0.001; i=$((i+1)); done; exit 9"
    argv = [sys.executable, "-c", textwrap.dedent(DAEMON), str(oci.place), run.id, script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as daemon:
        assert daemon.stdout is not None and daemon.stdout.readline() == b"started\n"
        daemon.kill()
    if ends_first:
        oci.until(lambda: oci.runtime.status(run.id).state is State.STOPPED)
    else:
        assert oci.runtime.status(run.id).state is State.RUNNING
    oci.watch(run.id)
    assert oci.end().exit_code == 9
    assert oci.output(run.id) == b"".join(b"line %d\n" % n for n in range(300))


ROTATING = """
    import sys, time
    from pathlib import Path
    from engine.logs import ContainerLogs
    from engine.runtimes.oci import OciRuntime
    place, id = Path(sys.argv[1]), sys.argv[2]
    runtime = OciRuntime(place / "containers", state=place / "state")
    runtime.watch(id, lambda id, end: None)
    logs, offset = ContainerLogs(place / "containers" / id / "logs"), 0
    print("attached", flush=True)
    while True:
        logs.maybe_rotate(150_000, None, lambda: runtime.reopen_log(id))
        offset += len(logs.read("stdout", offset, 1 << 20))
        time.sleep(0.001)
"""


def test_daemons_killed_one_after_another_in_a_burst_with_rotation(oci: Bench) -> None:
    """Wherever the kill falls (rename, reopen, index, compression): every line is there, once, in order."""
    lines = 30_000
    script = (
        f"i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); [ $((i % 100)) = 0 ] && sleep 0.005; done; exit 5"
    )
    id = oci.run(("sh", "-c", script))
    argv = [sys.executable, "-c", textwrap.dedent(ROTATING), str(oci.place), id]
    for round in range(5):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as daemon:
            assert daemon.stdout is not None and daemon.stdout.readline() == b"attached\n"
            time.sleep(0.05 + 0.037 * round)
            daemon.kill()
    assert oci.end(30).exit_code == 5
    logs = ContainerLogs(oci.place / "containers" / id / "logs")
    assert logs.caught_up("stdout", 10)
    assert logs.read("stdout", 0, 1 << 30) == b"".join(b"line %d\n" % n for n in range(lines))
    logs.close()
    names = os.listdir(oci.place / "containers" / id / "logs")
    assert len([name for name in names if name[8:].split(".")[0].isdigit()]) >= 2, "it was not rotated"


def test_killed_in_the_middle_of_create_is_cleared(oci: Bench) -> None:
    """The daemon died before it wrote facts.json: the container is found as created, and can be deleted."""
    run = oci.spec("sleep")
    pid = oci.runtime.create(run)
    (run.directory / "run" / "facts.json").unlink()
    status = oci.runtime.status(run.id)
    assert (status.state, status.pid) == (State.CREATED, pid)
    oci.runtime.delete(run.id)
    assert not _alive(pid) and oci.runtime.status(run.id).state is State.ABSENT


def test_facts_of_another_boot_are_not_believed(oci: Bench) -> None:
    id = oci.run("sleep")
    path = oci.place / "containers" / id / "run" / "facts.json"
    saved = path.read_text()
    from engine.runtimes.conmon import boot_id

    path.write_text(saved.replace(boot_id(), "another"))
    assert oci.runtime.status(id).state is State.STOPPED
    oci.watch(id)
    end = oci.end()
    assert end.exit_code == 255 and "restarted" in end.reason
    (oci.place / "containers" / id / "run" / "exits" / id).unlink()
    path.write_text(saved)


def test_nothing_is_left_after_delete(oci: Bench) -> None:
    id = oci.run("sleep")
    pid = oci.runtime.status(id).pid
    monitor = int((oci.place / "containers" / id / "run" / "conmon.pid").read_text())
    oci.runtime.delete(id)
    assert pid and not _alive(pid) and not _alive(monitor)
    assert list(Path("/sys/fs/cgroup").glob(f"**/dutchman/{id}")) == []
    assert not (oci.place / "state" / id).exists()
    assert sorted(os.listdir(oci.place / "containers" / id)) == ["hostname", "hosts", "logs", "resolv.conf"]


def test_a_runtime_that_refuses_is_passed_over(tmp_path: Path) -> None:
    if reason := no_oci():
        skip_or_fail(reason)
    probe = OciRuntime(tmp_path, state=tmp_path / "state", runtimes=("no-such-runtime", "runc")).probe()
    assert probe.ok and "runc works" in probe.reason and "no-such-runtime is not installed" in probe.reason
    probe = OciRuntime(tmp_path, state=tmp_path / "state", runtimes=("false",)).probe()
    assert not probe.ok and "false refuses" in probe.reason


def test_a_runtime_that_hangs_or_fails_leaves_no_conmon(oci: Bench) -> None:
    slow, bad = oci.place / "slow", oci.place / "bad"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    bad.write_text('#!/bin/sh\necho \'time="x" level=error msg="runc create failed: no \\"luck\\""\' >&2\nexit 1\n')
    monitor = shutil.which("conmon") or "/usr/bin/conmon"
    for path, error, words in ((slow, DeadlineExceeded, "0 s"), (bad, RuntimeFailure, '^no "luck"$')):
        path.chmod(0o755)
        files = conmon.Files(oci.place / "containers" / path.name, path.name)
        for place in (files.bundle, files.exit.parent, files.run / "persist", files.log.parent):
            place.mkdir(parents=True)
        with pytest.raises(error, match=words):
            conmon.launch(monitor, str(path), [], files, terminal=False, deadline=0.4)
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        oci.until(lambda path=path, pids=pids: not any(str(path) in _command(pid) for pid in pids))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace") if _alive(pid) else ""
    except OSError:
        return ""


ON_VERSION_2 = """
    import queue, signal, sys
    from pathlib import Path
    from engine.model import ContainerConfig
    from engine.runtimes.base import State, make_spec
    from engine.runtimes.oci import OciRuntime
    place = Path(sys.argv[1])
    runtime, ends = OciRuntime(place / "containers", state=place / "state", runtimes=("runc",)), queue.Queue()
    print(runtime.probe().reason)
    for number in range(2):
        directory = place / "containers" / f"v2-{number}"
        directory.mkdir(parents=True)
        config = ContainerConfig(command=("sleep", "100"))
        id = directory.name
        runtime.create(make_spec(id=id, name=id, directory=directory, rootfs=place / "rootfs", config=config))
        runtime.watch(id, lambda id, end: ends.put(end))
        runtime.start(id)
        if number == 0:
            runtime.pause(id)
            assert runtime.status(id).state is State.PAUSED
        runtime.signal(id, signal.SIGKILL)
        print(ends.get(timeout=10).exit_code)
        runtime.delete(id)
    print(list(Path("/sys/fs/cgroup/dutchman").glob("v2-*")))
"""


def test_on_cgroup_version_2_alone(oci: Bench) -> None:
    """The same host, seen from a mount namespace with nothing but the unified tree."""
    if Cgroups.detect().version == 2:
        return  # every other test here has run on it
    oci.rootfs()
    script = 'mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
    python = [sys.executable, "-c", textwrap.dedent(ON_VERSION_2), str(oci.place)]
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", *python]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["runc works here (cgroup v2)", "137", "137", "[]"]


# --- what Docker shows for the same commands --------------------------------------------------------------------------

DOCKER = Path(__file__).parents[2] / "shared" / "fixtures" / "logs" / "docker-json-file"


def test_the_output_is_what_docker_records(oci: Bench) -> None:
    """Each fixture's command is run; stream by stream, the text of all.jsonl equals that of Docker's own log file."""
    if not (DOCKER / "cases.json").exists():
        skip_or_fail("fixtures are not here")
    for name in ("printf", "tr", "od"):
        (oci.rootfs() / "bin" / name).symlink_to("busybox")
    compared = 0
    for case in json.loads((DOCKER / "cases.json").read_text()):
        path = DOCKER / case["name"] / "ID-json.log"
        if case["run_options"] or not path.exists() or "multibyte" in case["name"]:  # parts are cut elsewhere there
            continue
        id = oci.run(tuple(case["command"]))
        assert oci.end().exit_code == case["exit"]
        wanted, found = dict[str, str](), dict[str, str]()
        for line in path.read_text().splitlines():
            item = json.loads(line)
            wanted[item["stream"]] = wanted.get(item["stream"], "") + item["log"]
        for line in oci.output(id, "all.jsonl").decode().split("\n")[:-1]:
            item = json.loads(line)
            text = item["line"] + ("" if item.get("partial") else "\n")
            found[item["stream"]] = found.get(item["stream"], "") + text
        assert found == wanted, case["name"]
        compared += 1
    assert compared >= 5


# --- cgroups of both versions, as files -------------------------------------------------------------------------------


def test_cgroup_files_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    one, two = Cgroups(1, True), Cgroups(2, True)
    for version in (one, two):  # nothing is there: nothing is claimed
        assert not cgroups.frozen(version, "c") and cgroups.oom_kills(version, "c") == 0
        cgroups.thaw(version, "c")
    group = tmp_path / "dutchman" / "c"
    group.mkdir(parents=True)
    (group / "cgroup.freeze").write_text("1\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert cgroups.frozen(two, "c") and cgroups.oom_kills(two, "c") == 2
    cgroups.thaw(two, "c")
    assert not cgroups.frozen(two, "c")
    for controller, name, text in (
        ("freezer", "freezer.state", "FROZEN\n"),
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
    ):
        place = tmp_path / controller / "dutchman" / "c"
        place.mkdir(parents=True)
        (place / name).write_text(text)
    assert cgroups.frozen(one, "c") and cgroups.oom_kills(one, "c") == 1
    cgroups.thaw(one, "c")
    assert not cgroups.frozen(one, "c")
    assert cgroups.own_group(one).startswith("/")
    monkeypatch.setattr(cgroups, "own_group", lambda version: "/")
    cgroups.adopt_monitor(two, 1)
    assert not (tmp_path / "dutchman" / "monitors").exists()
    monkeypatch.setattr(cgroups, "own_group", lambda version: "/system.slice/dutchman.service")
    cgroups.adopt_monitor(two, 1)
    assert (tmp_path / "dutchman" / "monitors" / "cgroup.procs").read_text() == "1"
    (tmp_path / "cgroup.controllers").touch()
    assert Cgroups.detect(tmp_path).version == 2
