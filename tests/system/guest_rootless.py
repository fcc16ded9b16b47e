"""An ordinary user's engine where cgroup v2 is theirs, or half of it: limits, update, pause, figures, OOM kills."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from dutchman import wait_for
from people import Person, two_people

from engine import hostmounts

TOP = Path("/sys/fs/cgroup")
LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def me() -> Iterator[Person]:
    with two_people() as people:
        people[0].sh(f"dutchman up && dutchman load {people[0].base}/demo.tar && dutchman down")
        yield people[0]


def delegate(person: Person, name: str, controllers: str) -> Path:
    """A group that is this user's, with these controllers, their shells in it."""
    slice_ = TOP / f"slice-{name}"
    slice_.mkdir()
    words = "".join(f" +{controller}" for controller in controllers.split())
    (TOP / "cgroup.subtree_control").write_text(words)
    (slice_ / "cgroup.subtree_control").write_text(words)
    group = slice_ / "mine"
    for place in (group, group / "shell"):
        place.mkdir()
        for path in (place, *(place / file for file in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"))):
            os.chown(path, person.uid, person.gid)
    person.group = group / "shell"
    return group


def take_back(person: Person, group: Path) -> None:
    person.group = None
    for base, _, _ in os.walk(group.parent, topdown=False):
        for pid in Path(base, "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (TOP / "cgroup.procs").write_text(pid)
        os.rmdir(base)


@pytest.fixture
def group(me: Person) -> Iterator[Path]:
    made = delegate(me, "all", "cpu cpuset io memory pids")
    yield made
    take_back(me, made)


def start(me: Person, name: str) -> None:
    done = me.sh(f"dutchman start {name}", code=None)
    assert done.returncode == 0, (
        f"{done.stderr}\n{me.out(f'cat containers/{name}/error')}\n"
        + me.sh(f"tail -n 30 {me.store}/engine.log; find {TOP} -name 'cgroup.procs' | grep slice-").stdout
    )


def await_ready(me: Person, name: str) -> None:
    """With all that is known of it when it does not come to that."""
    place = me.mount / "containers" / name
    for _ in range(60):
        if "ready" in me.sh(f"cat {place}/logs/stdout").stdout:
            return
        time.sleep(0.5)
    group = me.sh(f"cat /proc/$(cat {place}/pid)/cgroup; cat /proc/$(cat {place}/pid)/status", code=None).stdout
    files = "state exit_code reason error top stats events logs/stderr"
    raise AssertionError(
        me.sh(f"cd {place}; tail -n 20 {files}; tail -n 20 {me.store}/engine.log", code=None).stdout + group
    )


def stats(me: Person, name: str) -> dict[str, int]:
    rows = (line.split() for line in me.out(f"cat containers/{name}/stats").splitlines())
    return {key: int(value) for key, value in rows}


def test_limits_update_pause_figures_and_oom_without_root(me: Person, group: Path, runtime: str) -> None:
    assert re.search(r"^ok +limits .*all of them", me.sh("dutchman doctor").stdout, re.M)
    me.sh("dutchman up")
    assert f"runtime oci: {runtime} works here (cgroup v2)" in me.out("cat status")
    assert (group / "dutchman/cgroup.subtree_control").read_text().split() == ["cpuset", "cpu", "io", "memory", "pids"]
    limits = {"memory": "64MiB", "cpus": 1.5, "cpuset": "0", "pids": 50}
    me.make("web", json.dumps({"image": "demo:1", "command": ["sh", "-c", LOOP], **limits}))
    start(me, "web")
    await_ready(me, "web")
    place = group / "dutchman" / me.out("cat containers/web/id")
    files = {"memory.max": str(64 << 20), "cpu.max": "150000 100000", "cpuset.cpus": "0", "pids.max": "50"}
    assert {name: (place / name).read_text().strip() for name in files} == files
    assert "0::/\n" in me.sh("dutchman exec web cat /proc/self/cgroup").stdout
    found = stats(me, "web")
    assert (found["memory_limit_bytes"], found["cpu_limit_percent"], found["pids_limit"]) == (64 << 20, 150, 50)
    assert found["memory_bytes"] > 0 and found["cpu_usec"] > 0 and found["pids"] >= 2 and found["oom_kills"] == 0
    assert "sh -c trap" in me.out("cat containers/web/top")

    me.sh("dutchman update web --memory 96m --cpus 2")
    assert (place / "memory.max").read_text().strip() == str(96 << 20)
    assert (place / "cpu.max").read_text().strip() == "200000 100000"
    me.out("echo pause > containers/web/ctl")
    assert me.out("cat containers/web/state") == "paused" and (place / "cgroup.freeze").read_text() == "1\n"
    wait_for(lambda: "frozen 1" in (place / "cgroup.events").read_text(), what="they are frozen")

    # a killed daemon: the next one finds it paused, where it is
    pid = int(re.findall(r"^pid (\d+)$", me.out("cat status"), re.M)[0])
    assert (group / "dutchman/daemon/cgroup.procs").read_text().split().count(str(pid)) == 1
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not hostmounts.is_mounted(me.mount), what="the dead mount is gone")
    me.sh("dutchman up")
    assert me.out("cat containers/web/state") == "paused"
    me.out("echo resume > containers/web/ctl")
    me.sh("dutchman update web --pids 60")
    assert (place / "pids.max").read_text().strip() == "60"
    assert "refused" not in me.sh("dutchman exec web echo it goes on").stdout

    fat = "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    little = {"memory": "16MiB", "memory_swap": "16MiB"}
    me.make("fat", json.dumps({"image": "demo:1", "command": ["sh", "-c", fat], **little}))
    me.out("echo start > containers/fat/ctl")
    me.await_state("fat", "stopped")
    assert me.out("cat containers/fat/oom containers/fat/exit_code").split() == ["1", "137"]
    me.sh("dutchman stop web")
    assert me.out("cat containers/web/exit_code") == "3"
    me.sh("dutchman rm web fat")
    assert [entry.name for entry in (group / "dutchman").iterdir() if entry.is_dir() and len(entry.name) == 64] == []
    me.sh("dutchman down")
    wait_for(lambda: not me.processes(), what="everything has ended")


def test_controllers_that_are_not_given_are_named(me: Person) -> None:
    group = delegate(me, "some", "memory pids")
    # what another test has handed on is still there for others, but not for this one
    (group.parent / "cgroup.subtree_control").write_text("-cpu -cpuset -io")
    try:
        said = me.sh("dutchman doctor").stdout
        assert re.search(r"^no +limits .*yours: memory, pids; refused: .*cpus", said, re.M), said
        me.group = group  # a shell in the group itself is moved down: a group with processes hands on no controllers
        me.sh("dutchman up; grep -q /outside$ /proc/self/cgroup")
        me.group = group / "outside"
        me.make("cpu", json.dumps({"image": "demo:1", "command": ["true"], "cpus": 0.5}))
        me.sh(f"echo start > {me.mount}/containers/cpu/ctl", code=None)
        wait_for(lambda: "cpus: an engine without root has no cpu controller" in me.out("cat containers/cpu/error"), 30)
        me.make("ram", json.dumps({"image": "demo:1", "command": ["sh", "-c", LOOP], "memory": "64m", "pids": 20}))
        start(me, "ram")
        await_ready(me, "ram")
        assert stats(me, "ram")["memory_limit_bytes"] == 64 << 20
        me.sh("dutchman update ram --memory 80m")
        assert stats(me, "ram")["memory_limit_bytes"] == 80 << 20
        me.out("echo pause > containers/ram/ctl; echo resume > containers/ram/ctl")
        me.sh("dutchman rm -f cpu ram; dutchman down")
        wait_for(lambda: not me.processes(), what="everything has ended")
    finally:
        take_back(me, group)


def test_without_a_group_of_their_own_figures_are_of_processes(me: Person) -> None:
    said = me.sh("dutchman doctor").stdout
    assert re.search(r"^no +limits +cgroup v2: none of your own", said, re.M) and "chown" in said
    me.sh("dutchman up")
    me.make("web", json.dumps({"image": "demo:1", "command": ["sh", "-c", LOOP]}))
    start(me, "web")
    await_ready(me, "web")
    assert stats(me, "web")["memory_bytes"] > 0
    me.sh(f"echo pause > {me.mount}/containers/web/ctl", code=1)
    me.sh("dutchman rm -f web; dutchman down")
    wait_for(lambda: not me.processes(), what="everything has ended")
