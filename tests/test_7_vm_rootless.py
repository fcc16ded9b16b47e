"""Virtual machines of an ordinary user: QEMU needs no root, and what else a machine is made of does not either."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from dutchman import wait_for
from guestkernel import guest_kernels
from people import Person
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_rootless import people  # noqa: F401

from engine import hostmounts
from engine.runtimes import rootless
from engine.runtimes.vm import accel, agentbuild, driver


def given(person: Person) -> None:
    """A kernel and an agent, as if imported and built: neither is what is tried here."""
    agentbuild.build(accel.architecture(), driver.agents())  # it may have made room for others
    for source, target in (
        (guest_kernels().directory, person.store / "kernels"),
        (driver.agents(), person.home / ".cache/dutchman/agents"),
    ):
        person.sh(f"mkdir -p {target.parent}")
        ignore = shutil.ignore_patterns("templates", ".*")  # what may be in the making beside them
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)
        for entry in (target, *target.rglob("*")):
            os.chown(entry, person.uid, person.gid)


def fetched(port: int, path: str = "") -> str:
    """What is served at a port of the host; empty when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_a_machine_of_an_ordinary_user(people: tuple[Person, Person]) -> None:  # noqa: F811
    if reason := no_vm():
        skip_or_fail(reason)
    if rootless.tool("fuse2fs") is None:
        skip_or_fail("needs fuse2fs")
    me, _ = people
    given(me)
    me.sh("dutchman up --runtime vm", timeout=120)
    me.sh(f"dutchman load {me.base}/demo.tar")
    assert "runtime vm: " in me.out("cat status")
    with socket.socket() as probe:  # a port nobody has
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    me.sh(f"mkdir -p {me.home}/shared && echo from the host > {me.home}/shared/note")
    script = (
        "mkdir -p /w; [ -e /w/index.html ] || echo ahoy > /w/index.html; rm -rf /etc/group /srv; mkdir /srv; id -u;"
        "cat /shared/note; echo seen > /shared/answer; chown 1000 /shared/answer; echo kept >> /data/log;"
        "trap 'exit 3' TERM; httpd -f -p 80 -h /w & echo ready; wait"
    )
    config = {
        "image": "demo:1",
        "ports": [f"127.0.0.1:{port}:80"],
        "volumes": [f"{me.home}/shared:/shared", "data:/data"],
        "memory": "128MiB",
        "command": ["sh", "-c", script],
    }
    me.make("web", json.dumps(config))

    def start() -> None:
        me.sh(f"echo start > {me.mount}/containers/web/ctl", timeout=180)
        wait_for(lambda: "ready" in me.out("cat containers/web/logs/stdout"), 90, "it says that it is ready")

    start()
    assert me.out("head -2 containers/web/logs/stdout") == "0\nfrom the host"
    assert me.out(f"cat {me.home}/shared/answer; stat -c %u {me.home}/shared/answer") == f"seen\n{me.first + 999}"

    def page() -> str:
        return fetched(port)

    wait_for(lambda: page() == "ahoy\n", 60, "the published port answers")
    assert me.sh("echo fed | dutchman exec -i -u 1000 web sh -c 'id -u; cat; exit 4'", code=4).stdout == "1000\nfed\n"
    assert me.out("cat containers/web/rootfs/w/index.html") == "ahoy"
    me.out("echo changed > containers/web/rootfs/w/index.html")
    assert page() == "changed\n"

    # the daemon is killed: the machine goes on and is taken up again
    pid = int(re.findall(r"^pid (\d+)$", me.out("cat status"), re.M)[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not hostmounts.is_mounted(me.mount), what="the dead mount is gone")
    assert page() == "changed\n"
    me.sh("dutchman up --runtime vm", timeout=120)
    assert me.out("cat containers/web/state") == "running"
    me.sh("dutchman stop web", timeout=120)
    assert me.out("cat containers/web/state containers/web/exit_code").split() == ["stopped", "3"]
    assert not page()

    # its disk is shown, not written to
    rootfs = "containers/web/rootfs"
    assert me.out(f"cat {rootfs}/w/index.html; stat -c %u:%g {rootfs}/w") == f"changed\n{me.uid}:{me.gid}"
    names = me.out(f"ls {rootfs}/etc {rootfs}/srv").split()
    assert "passwd" in names and "group" not in names
    changes = me.out("cat containers/web/changes").splitlines()
    assert "D /etc/group" in changes and "A /w/index.html" in changes, changes
    assert "Read-only file system" in me.sh(f"echo x > {me.mount}/{rootfs}/new", code=1).stderr
    assert me.out("cat volumes/data/data/log") == "kept"

    if SLOW:  # the disk is kept
        start()
        wait_for(lambda: page() == "changed\n", 60, "it serves what it had")
        assert me.out("cat volumes/data/data/log") == "kept\nkept"
    me.sh("dutchman rm -f web", timeout=120)
    me.sh("dutchman down")
    wait_for(lambda: not me.processes(), 60, what="everything has ended")
    assert not [point for point, _, _ in hostmounts.mounts() if f"{point}/".startswith(f"{me.home}/")]
    alarms = [line for line in (me.store / "engine.log").read_text().splitlines() if " INFO " not in line]
    assert not alarms, alarms


@contextmanager
def without_ids(person: Person) -> Iterator[None]:
    """The user has no subordinate ids meanwhile."""
    ids = f"{person.first}-{person.first + 65535}"
    subprocess.run(["usermod", "--del-subuids", ids, "--del-subgids", ids, person.name], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["usermod", "--add-subuids", ids, "--add-subgids", ids, person.name], check=True, timeout=30)


def runs_alone(me: Person) -> None:
    me.sh(f"mkdir -p {me.home}/shared && echo from the host > {me.home}/shared/note")
    script = (
        "cat /shared/note; id -u; echo seen > /shared/answer; chown 1000 /shared/answer;"
        "echo 5 > /mine; chown 5 /mine; rm /etc/group; trap 'exit 3' TERM;"
        "httpd -f -p 80 -h /shared & echo ready; wait"
    )
    config = {"image": "demo:1", "volumes": [f"{me.home}/shared:/shared", "/data"], "command": ["sh", "-c", script]}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    me.make("web", json.dumps(config | {"ports": [f"127.0.0.1:{port}:80"]}))
    me.sh(f"echo start > {me.mount}/containers/web/ctl", timeout=180)
    wait_for(lambda: "ready" in me.out("cat containers/web/logs/stdout"), 90, "it says that it is ready")
    assert me.out("head -2 containers/web/logs/stdout") == "from the host\n0"
    assert me.out(f"stat -c %u {me.home}/shared/answer") == str(me.uid)
    wait_for(lambda: fetched(port, "answer") == "seen\n", 60, "the published port answers")
    assert me.out("cat containers/web/rootfs/mine") == "5"
    me.sh("dutchman stop web", timeout=120)
    assert me.out("cat containers/web/exit_code containers/web/rootfs/mine").split() == ["3", "5"]
    assert "group" not in me.out("ls containers/web/rootfs/etc").split()
    assert "D /etc/group" in me.out("cat containers/web/changes")
    me.sh("dutchman rm -f web", timeout=120)


def test_a_machine_of_a_user_without_subordinate_ids(people: tuple[Person, Person]) -> None:  # noqa: F811
    _, me = people
    given(me)
    with without_ids(me):
        said = me.sh("dutchman up", timeout=120).stderr
        assert "only containers of runtime vm: /etc/subuid has no ids" in said
        me.sh(f"dutchman load {me.base}/demo.tar")
        assert "runtime vm: " in me.out("cat status")
        me.make("no", json.dumps({"image": "demo:1", "runtime": "oci", "command": ["true"]}))
        me.sh(f"echo start > {me.mount}/containers/no/ctl", code=1)
        assert "no subordinate ids" in me.out("cat containers/no/error")
        if SLOW:
            runs_alone(me)
        me.sh("dutchman rm no")
        me.sh("dutchman down")
        wait_for(lambda: not me.processes(), 60, "everything has ended")
