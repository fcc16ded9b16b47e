"""The oci driver: what a process sees, what survives, what is left. Needs root on Linux."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import Bench, bench_of, no_oci, skip_or_fail

from engine.config import MountKind
from engine.errors import DeadlineExceeded, InvalidArgument, RuntimeFailure
from engine.logs import ContainerLogs
from engine.runtimes import cgroups, conmon
from engine.runtimes.base import Mount, State
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.oci import OciRuntime


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of("oci", tmp_path)
    yield bench
    bench.close()


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
    from engine.config import ContainerConfig
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
    script = (
        "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done; while [ ! -e /go ]; do sleep 0.02; done; exit 9"
    )
    argv = [sys.executable, "-c", textwrap.dedent(DAEMON), str(oci.place), run.id, script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as daemon:
        assert daemon.stdout is not None and daemon.stdout.readline() == b"started\n"
        daemon.kill()
    if ends_first:
        (oci.rootfs() / "go").touch()
        oci.until(lambda: oci.runtime.status(run.id).state is State.STOPPED)
    else:
        assert oci.runtime.status(run.id).state is State.RUNNING
        (oci.rootfs() / "go").touch()
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
    assert logs.caught_up("stdout", 40)
    assert logs.read("stdout", 0, 1 << 30) == b"".join(b"line %d\n" % n for n in range(lines))
    logs.close()
    names = os.listdir(oci.place / "containers" / id / "logs")
    assert len([name for name in names if name[8:].split(".")[0].isdigit()]) >= 1, "it was not rotated"


def test_killed_in_the_middle_of_create_is_cleared(oci: Bench) -> None:
    """The daemon died before it wrote facts.json: the container is found as created, and can be deleted."""
    run = oci.spec("sleep")
    pid = oci.runtime.create(run)
    (run.directory / "run" / "facts.json").unlink()
    status = oci.runtime.status(run.id)
    assert (status.state, status.pid) == (State.CREATED, pid)
    oci.runtime.delete(run.id)
    assert not _alive(pid) and oci.runtime.status(run.id).state is State.ABSENT


def test_the_exit_code_survives_a_full_disk(oci: Bench) -> None:
    """The store's disk is full when the container ends: its code is known, what was logged can be read."""
    run = oci.spec(("sh", "-c", "i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; exit 7"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run.directory], check=True)
    try:
        oci.runtime.create(run)
        oci.watch(run.id)
        oci.runtime.start(run.id)
        end = oci.end()
        assert (end.exit_code, end.reason) == (7, "")
        assert (oci.runtime.status(run.id).state, oci.runtime.status(run.id).exit_code) == (State.STOPPED, 7)
        lines = oci.output(run.id).splitlines()
        assert len(lines) > 1000 and lines[:100] == [b"line %d" % n for n in range(100)]
        oci.runtime.delete(run.id)
        assert oci.runtime.status(run.id).state is State.ABSENT
    finally:
        subprocess.run(["umount", run.directory], check=True)


def test_facts_of_another_boot_are_not_believed(oci: Bench) -> None:
    id = oci.run("sleep")
    path = oci.place / "containers" / id / "run" / "facts.json"
    saved = path.read_text()
    from engine.runtimes.pids import boot_id

    path.write_text(saved.replace(boot_id(), "another"))
    assert oci.runtime.status(id).state is State.STOPPED
    oci.watch(id)
    end = oci.end()
    assert end.exit_code == 255 and "restarted" in end.reason
    (oci.place / "containers" / id / "run" / "exits" / id).unlink()
    (oci.place / "state" / "exits" / id / "exit").unlink()
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
        files = conmon.Files(oci.place / "containers" / path.name, path.name, oci.place / "exits")
        for place in (files.bundle, files.kept_exit.parent, files.spare, files.log.parent):
            place.mkdir(parents=True, exist_ok=True)
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
    from engine.config import ContainerConfig
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
