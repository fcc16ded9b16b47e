"""`kill -9` of the daemon at each point of a virtual machine's life, through the mount: the next one finds out what is
true, and nothing is left of what is not: no process, mount, loop device, network or file.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from guestkernel import CACHE, copy_kernels
from killing import Mortal
from leftbehind import processes_at
from mounting import can_mount
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_networks import Harbour, missing

from engine import host, hostmounts
from engine.runtimes import netns, pids

START = 120.0  # seconds for a machine to boot on a busy host
LIFE = """trap 'echo bye; exit 6' TERM
n=0
while :; do
    n=$((n+1))
    echo $n > /count
    [ -e /end ] && exit 7
    sleep 0.1
done"""
DEAF = "trap '' TERM; while :; do sleep 0.1; done"


@dataclass(frozen=True)
class Case:
    name: str
    verb: str  # what is going on when it is killed: shell commands, in the mount
    point: str = ""  # where; empty: once the verb has been carried out
    first: str = "start"  # what is done before
    state: str = "running"  # afterwards, in the end
    code: str = ""  # its exit code then
    reason: str = ""  # part of what `error` or its events say of its end
    command: str = LIFE
    config: dict[str, object] = field(default_factory=dict)
    then: str = ""  # a shell command that succeeds, sooner or later, afterwards
    meanwhile: bool = False  # its machine ends while no daemon looks
    template: bool = False  # there is one for it, and it is used


@dataclass(frozen=True)
class Made:
    """What is being made when it is killed: there afterwards as a whole, or not at all; then it can be made."""

    name: str
    verb: str
    point: str
    whole: bool
    there: str = "containers/c"
    remove: str = "rmdir containers/c"
    count: str = "containerCreated"  # the event of it, told once when it is there


START_VERB = "echo start > containers/c/ctl"
DRIVER = "engine.runtimes.vm.driver:VmRuntime"
PAUSING, UPPER = "engine.runtimes.vm.pausing:Pausing", "engine.runtimes.vm.guestupper:GuestUpper"
MOUNTS, NETWORKS, RECORDS = "engine.mounts:RootfsMounts", "engine.connections:Connections", "engine.records:Records"
SESSIONS = "engine.runtimes.oci_sessions:OciSessions"
BOOTS = "here containers/*/run/vm/qemu.pid"
ROLLED_BACK = "while it was starting"
COMMIT = "echo 'commit mine:1' > containers/c/ctl"
EXEC = (
    """echo 'run sh -c "echo one; while ! [ -e /go ]; do sleep 0.1; done; echo two; exit 3"' > containers/c/exec/ctl"""
)


def starts(name: str, point: str, **more: object) -> Case:
    more = {"state": "stopped", "reason": ROLLED_BACK} | more
    return Case(f"starting-{name}", START_VERB, point, first="", **more)  # type: ignore[arg-type]


CASES = [
    Case("created", ":", first="", state="created"),
    starts("disk-is-made", "after engine.mounts:make_upper"),
    starts("disk-is-there", f"after {MOUNTS}.use_disk"),
    starts("image-is-mounted", "after engine.treemounts:TreeMounts.ensure"),
    starts("rootfs-is-mounted", f"after {MOUNTS}.ensure", config={"volumes": ["/etc:/host:ro"]}),
    starts("network-is-promised", f"after {NETWORKS}.begin"),
    starts("network-is-made", "after engine.runtimes.netavark:Netavark.setup"),
    starts("disk-is-given", f"after {MOUNTS}.give_disk"),
    starts("plan-is-written", f"after {DRIVER}._ready"),
    starts("it-boots", BOOTS),
    starts("it-waits", f"after {DRIVER}.create"),
    starts("it-is-watched", f"after {DRIVER}.watch"),
    starts("it-is-restored", BOOTS, template=True),
    starts("restored-it-waits", f"after {DRIVER}.create", template=True),
    starts("it-runs", f"after {DRIVER}.start", state="running", reason=""),
    starts("restored-it-runs", f"after {DRIVER}.start", state="running", reason="", template=True),
    Case("running", ":"),
    Case("running-ended-meanwhile", "touch containers/c/rootfs/end", state="stopped", code="7", meanwhile=True),
    Case("pausing", "echo pause > containers/c/ctl", f"before {PAUSING}._qmp"),
    Case("pausing-done", "echo pause > containers/c/ctl", f"after {PAUSING}._qmp", state="paused"),
    Case("paused-unrecorded", "echo pause > containers/c/ctl", f"after {DRIVER}.pause", state="paused"),
    Case("paused", "echo pause > containers/c/ctl", state="paused"),
    Case("resuming", "echo resume > containers/c/ctl", f"before {PAUSING}._qmp", "start pause", state="paused"),
    Case("resuming-done", "echo resume > containers/c/ctl", f"after {PAUSING}._qmp", "start pause"),
    Case("resumed-unrecorded", "echo resume > containers/c/ctl", f"after {DRIVER}.resume", "start pause"),
    Case("stopping", "echo stop > containers/c/ctl", f"before {DRIVER}.signal", state="stopped", code="6"),
    Case("stopping-signalled", "echo stop > containers/c/ctl", f"after {DRIVER}.signal", state="stopped", code="6"),
    Case("stopping-in-grace", "echo 'stop 3' > containers/c/ctl", f"after {RECORDS}.note_stop", state="stopped",
         code="137", command=DEAF),
    Case("stopping-paused", "echo stop > containers/c/ctl", f"after {DRIVER}.signal", "start pause", state="stopped",
         code="6"),
    Case("stopping-killed", "echo 'stop 0' > containers/c/ctl", f"after {DRIVER}.signal", state="stopped", code="137",
         command=DEAF),
    Case("restarting", "echo 'restart 0' > containers/c/ctl", f"before {MOUNTS}.ensure",
         then="test $(cat containers/c/restarts) = 1"),
    Case("killed", "echo kill > containers/c/ctl", f"after {DRIVER}.signal", state="stopped", code="137"),
    Case("exec-running", f"{EXEC}; while ! grep -q running containers/c/exec/1/state; do sleep 0.1; done",
         then="touch containers/c/rootfs/go; test \"$(cat containers/c/exec/1/stdout)\" = $'one\\ntwo' && "
              "test $(cat containers/c/exec/1/exit_code) = 3"),
    Case("exec-made", EXEC, f"after {SESSIONS}.create"),
    Case("exec-started", EXEC, f"after {SESSIONS}.start"),
    Case("changes", "cat containers/c/changes", f"before {UPPER}.walk"),
    Case("changes-paused", "cat containers/c/changes", f"before {UPPER}.walk", "start pause", state="paused"),
    Case("files-paused", "ls containers/c/rootfs", f"before {PAUSING}._sleep", "start pause", state="paused"),
    Case("changes-paused-told", "cat containers/c/changes", f"before {PAUSING}._sleep", "start pause", state="paused"),
    Case("commit", COMMIT, f"before {UPPER}.walk", then="! test -e images/mine:1"),
    Case("commit-paused", COMMIT, f"before {UPPER}.walk", "start pause", state="paused",
         then="! test -e images/mine:1"),
    Case("update-paused", "echo 77 > containers/c/config/pids", f"after {PAUSING}._qmp", "start pause", state="paused",
         config={"pids": 55}),
    Case("update", "echo 77 > containers/c/config/pids", f"after {DRIVER}.update",
         then="grep -q 'pids_limit 55' containers/c/stats", config={"pids": 55}),
    Case("removing", "rmdir containers/c", f"before {DRIVER}.delete", "start kill", state=""),
    Case("removing-cleared", "rmdir containers/c", f"after {DRIVER}.delete", "start kill", state=""),
    Case("removing-unmounted", "rmdir containers/c", f"after {MOUNTS}.forget", "start kill", state=""),
    Case("template-is-made", START_VERB, "here kernels/*/templates/.making-*/ram", "", config={"fast_start": True,
         "memory": "80m"}),
]  # fmt: skip


def newest() -> str:
    """What the kernels of tests come from."""
    return str(max(CACHE.glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime, default=""))


MKDIR = "mkdir containers/c"
IMPORT = f"echo 'import {os.environ.get('DUTCHMAN_TEST_KERNEL') or newest()} again' > kernels/ctl"
KERNEL = ("kernels/again", "rmdir kernels/again", "kernelImported")
MADE = [
    Made("creating", MKDIR, "before engine.containers:Containers._make_directory", False),
    Made("creating-directory", MKDIR, "before engine.containers:os.chmod", False),
    Made("creating-unrecorded", MKDIR, "after engine.containers:Containers._make_directory", False),
    Made("created", MKDIR, f"after {RECORDS}.create", True),
    Made("importing", IMPORT, "after engine.kernelimage:read", False, *KERNEL),
    Made("importing-half", IMPORT, "here kernels/.import-*/.aside-*", False, *KERNEL),
    Made("importing-more", IMPORT, "before engine.host:fsync_dir", False, *KERNEL),
    Made("importing-unrecorded", IMPORT, "before engine.kernels:told", False, *KERNEL),
    Made("importing-done", IMPORT, "before engine.kernels:Kernels._load", True, *KERNEL),
]


class Killed(Mortal, Harbour):
    """With kernels, in a network namespace of its own."""

    def again(self) -> None:
        self.start(START)

    def waits(self, command: str, seconds: float = START) -> None:
        until = time.monotonic() + seconds
        while (done := self.run(command)).returncode:
            assert time.monotonic() < until, f"{command}: {done.stdout}{done.stderr}\n{self.log()[-3000:]}"
            time.sleep(0.1)

    def machine(self, verb: str, state: str) -> None:
        self.run(f"echo {verb} > containers/c/ctl", timeout=START)
        self.waits(f"grep -qx {state} containers/c/state")

    def lives(self) -> None:
        """The machine answers, and its process goes on."""
        self.waits("grep -q . containers/c/rootfs/count")
        before = self.sh("cat containers/c/rootfs/count", timeout=60).strip()
        self.waits(f"grep -vqx '{before}' containers/c/rootfs/count")

    def stays(self) -> list[str]:
        """Processes, devices, mounts and files there are on account of the store's containers."""
        found = [line.replace("/", " ") for line in processes_at(f"{self.store}/") if str(self.mount) not in line]
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):  # it went
                name = path.read_text().strip()
                found += [f"{path}: {name}"] if name.startswith(f"{self.store}/containers/") else []
        found += [
            f"mount {point}" for point, _, _ in hostmounts.mounts() if point.startswith(f"{self.store}/containers/")
        ]
        found += [f"tmp/{name}" for name in os.listdir(self.store / "tmp")]
        litter = [path for path in (self.store / "kernels").glob("**/.*") if path.name != ".templates"]
        litter += [path for path in (self.store / "containers").iterdir() if path.name not in self.ids()]
        return found + [str(path) for path in litter]

    def ids(self) -> list[str]:
        return self.sh("cat containers/*/id || true").split()

    def kept(self, id: str) -> list[str]:
        """Files of this boot and of the store on account of one container."""
        places = [host.runtime_dir() / "vm" / "runtime", host.runtime_dir() / "vm" / "exits", self.store / "containers"]
        return [str(path) for place in places for path in place.glob(f"{id}*")]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    if (why := missing() or can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    daemon = Killed(tmp_path_factory.mktemp("killed"), runtime="vm")
    copy_kernels(daemon.store)
    yield daemon
    daemon.stop()


@pytest.fixture
def mortal(daemon: Killed) -> Iterator[Killed]:
    """The daemon, with no container."""
    if daemon.process is None:
        daemon.again()
    yield daemon
    if daemon.process is None:
        daemon.again()
    if (daemon.mount / "containers" / "c").exists():
        daemon.run("echo kill > containers/c/ctl", timeout=START)
        daemon.waits("grep -Eqx 'created|stopped' containers/c/state && rmdir containers/c")


def killed(daemon: Killed, case: Case) -> None:
    (daemon.mount / "containers" / "c").mkdir()
    config = {"image": "busybox", "memory": "64m", "stop_grace_period": 20, "fast_start": case.template, **case.config}
    (daemon.mount / "containers" / "c" / "config.yaml").write_text(
        json.dumps({"command": ["sh", "-c", case.command], **config})
    )
    id = daemon.read("containers/c/id")
    for verb in case.first.split():
        daemon.machine(verb, {"start": "running", "pause": "paused", "kill": "stopped"}[verb])
        if verb == "start" and case.command == LIFE:
            daemon.lives()  # else a signal may come before its trap is set
    if case.template:  # the first of its shape boots, and has one made
        daemon.machine("start", "running")
        daemon.waits("grep -q memory= kernels/*/templates")
        daemon.machine("kill", "stopped")
    qemu = daemon.store / "containers" / id / "run" / "vm" / "qemu.pid"
    pid = int(qemu.read_text()) if qemu.exists() else 0
    if case.point:
        daemon.die_at(case.point)
        daemon.run(case.verb, timeout=START)
        daemon.await_death()
    else:
        daemon.sh(case.verb, timeout=START)
        daemon.kill()
    if case.meanwhile and pid:
        ended(pid)
    daemon.again()
    if not case.state:
        daemon.waits("! test -e containers/c")
    else:
        daemon.waits(f"grep -qx {case.state} containers/c/state")
    if case.code:
        assert daemon.read("containers/c/exit_code") == case.code
    if case.reason:
        assert case.reason in daemon.sh("grep stateChanged containers/c/events")
    if case.then:
        daemon.waits(case.then)
    if case.state == "paused":
        assert "A /count\n" in daemon.sh("cat containers/c/changes", timeout=60)
        daemon.machine("resume", "running")
    if case.template and case.state == "running":
        assert (qemu.parent / "how").read_text().startswith("template ")
    if case.state in ("paused", "running"):
        if case.command == LIFE:
            daemon.lives()
        daemon.machine("'stop 0'", "stopped")
    elif case.reason == ROLLED_BACK:
        nothing(lambda: [found for found in daemon.stays() if "/containers/" not in found])  # its files can be read
        daemon.machine("start", "running")
        daemon.lives()
        daemon.machine("kill", "stopped")
    if case.state:
        daemon.sh("rmdir containers/c", timeout=60)
    nothing(daemon.stays)
    nothing(lambda: daemon.kept(id))
    daemon.left_nothing()
    assert "could not be" not in daemon.log() and "Traceback" not in daemon.log(), daemon.log()[-5000:]


def made(daemon: Killed, case: Made) -> None:
    def told() -> int:
        return daemon.sh("cat events").count(f'"{case.count}"')

    before = told()
    daemon.die_at(case.point)
    daemon.run(case.verb, timeout=START)
    daemon.await_death()
    daemon.again()
    assert told() == before + case.whole
    nothing(daemon.stays)
    if not case.whole:
        daemon.refused(f"ls {case.there}", "No such file")
        daemon.sh(case.verb)
        daemon.waits(f"test -e {case.there}")
        assert told() == before + 1
    if case.there.startswith("kernels"):
        default = daemon.read("kernels/default/digest")
        assert daemon.read(f"{case.there}/digest") == default and daemon.read(f"{case.there}/version")
    daemon.sh(case.remove, timeout=60)
    nothing(daemon.stays)
    assert "could not be" not in daemon.log() and "Traceback" not in daemon.log(), daemon.log()[-5000:]


def ended(pid: int) -> None:
    until = time.monotonic() + START
    while pids.start_time(pid) is not None:
        assert time.monotonic() < until, "the machine does not end"
        time.sleep(0.05)


def nothing(left: Callable[[], list[str]]) -> None:
    until = time.monotonic() + 60
    while found := left():
        assert time.monotonic() < until, found
        time.sleep(0.1)


if SLOW:

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_killed(mortal: Killed, case: Case) -> None:
        killed(mortal, case)

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("case", MADE, ids=lambda case: case.name)
    def test_killed_while_it_is_made(mortal: Killed, case: Made) -> None:
        made(mortal, case)

    @pytest.mark.timeout(600)
    def test_the_host_is_started_anew(mortal: Killed) -> None:
        """What ran in another boot is told to have ended, and its policy starts it again: seen as far as files go, for
        its processes, mounts and namespaces are ended here by hand, and the boot it is noted with is another's."""
        daemon = mortal
        (daemon.mount / "containers" / "c").mkdir()
        config = {"image": "busybox", "fast_start": False, "memory": "64m", "restart": "always"}
        text = json.dumps({"command": ["sh", "-c", LIFE], **config})
        (daemon.mount / "containers" / "c" / "config.yaml").write_text(text)
        daemon.machine("start", "running")
        daemon.lives()
        run = daemon.store / "containers" / daemon.read("containers/c/id") / "run"
        id = run.parent.name
        facts = json.loads((run / "facts.json").read_text())
        qemu = int((run / "vm" / "qemu.pid").read_text())
        daemon.kill()
        for pid in (facts["conmon"], facts["pid"]):  # QEMU goes with its owner
            os.kill(pid, signal.SIGKILL)
        ended(qemu)
        facts["boot"] = "00000000-0000-0000-0000-000000000000"
        (run / "facts.json").write_text(json.dumps(facts))
        daemon.unmount()
        netns.remove(daemon.state / "netns" / id)
        host.remove_tree(host.runtime_dir() / "vm" / "runtime" / id)
        daemon.again()
        daemon.waits("test $(cat containers/c/restarts) = 1 && grep -qx running containers/c/state")
        daemon.lives()
        told = [json.loads(line) for line in daemon.sh("grep stateChanged containers/c/events").splitlines()]
        (over,) = [event for event in told if event["to"] == "stopped"]
        assert over["exit_code"] == 255 and "the host was restarted" in over["reason"]
        daemon.sh("echo no > containers/c/config/restart")
        daemon.machine("kill", "stopped")
        daemon.sh("rmdir containers/c", timeout=60)
        nothing(daemon.stays)
        nothing(lambda: daemon.kept(id))
        daemon.left_nothing()

    @pytest.mark.timeout(600)
    def test_a_machine_ends_under_a_writer(mortal: Killed) -> None:
        """Who writes through `rootfs/` is told; what was made durable is there after."""
        daemon = mortal
        box = daemon.mount / "containers" / "c"
        box.mkdir()
        (box / "config.yaml").write_text('{"image": "busybox", "memory": "64m", "command": ["sleep", "inf"]}')
        id = daemon.read("containers/c/id")
        daemon.machine("start", "running")
        daemon.sh("echo safe > containers/c/rootfs/safe; sync containers/c/rootfs/safe", timeout=START)
        qemu = int((daemon.store / "containers" / id / "run" / "vm" / "qemu.pid").read_text())
        written, failed = threading.Event(), list[OSError]()

        def write() -> None:
            try:
                with open(box / "rootfs" / "big", "wb", buffering=0) as file:
                    while True:
                        file.write(os.urandom(1 << 16))
                        if file.tell() >= 1 << 20:
                            written.set()
                            file.seek(0)
            except OSError as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        assert written.wait(START)
        os.kill(qemu, signal.SIGKILL)
        writer.join(START)
        assert not writer.is_alive() and failed, "the writer was not told"
        daemon.waits("grep -qx stopped containers/c/state")
        assert daemon.read("containers/c/exit_code") == "137"
        daemon.waits('test "$(cat containers/c/rootfs/safe)" = safe')
        daemon.machine("start", "running")
        daemon.waits('test "$(cat containers/c/rootfs/safe)" = safe')
        daemon.sh("echo new > containers/c/rootfs/big; cat containers/c/rootfs/big", timeout=START)
        daemon.machine("kill", "stopped")
        daemon.sh("rmdir containers/c", timeout=60)
        nothing(daemon.stays)
        nothing(lambda: daemon.kept(id))
        assert "Traceback" not in daemon.log(), daemon.log()[-5000:]
