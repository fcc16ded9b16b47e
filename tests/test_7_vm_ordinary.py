"""An ordinary user's virtual machines where root's were tried first: networks from templates and from a machine
that stands by, owners of what is mounted. Slow. That one runs at all is in test_7_vm_rootless.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
from dutchman import wait_for
from people import Person, two_people
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_vm_networks import SEND, peer
from test_7_vm_rootless import fetched, given

from engine import hostmounts
from engine.runtimes import rootless
from engine.runtimes.vm import accel

pytestmark = pytest.mark.timeout(900)
ROOM = "64MiB"
WEB = (
    "trap 'exit 3' TERM; mkdir -p /w; echo $NAME > /w/index.html; peer & httpd -p 80 -h /w; echo ready;"
    "while :; do date +%s%N > /now; sleep 0.2; done"
)


@pytest.fixture(scope="module")
def me() -> Iterator[Person]:
    """With a daemon whose containers are machines."""
    if reason := no_vm():
        skip_or_fail(reason)
    if rootless.tool("fuse2fs") is None:
        skip_or_fail("needs fuse2fs")
    with two_people() as (me, _):
        given(me)
        peer(accel.architecture(), me.base / "peer").chmod(0o755)
        me.sh("dutchman up --runtime vm", timeout=120)
        me.sh(f"dutchman load {me.base}/demo.tar && mkdir {me.mount}/networks/front {me.mount}/networks/side")
        yield me
        me.sh("dutchman down --stop-containers", timeout=120)
        wait_for(lambda: not me.processes(), 60, what="everything has ended")
        assert not [point for point, _, _ in hostmounts.mounts() if f"{point}/".startswith(f"{me.home}/")]
        alarms = [line for line in (me.store / "engine.log").read_text().splitlines() if " INFO " not in line]
        assert not alarms, alarms


def free_port() -> int:
    with socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", probe.getsockname()[1]))
        return int(probe.getsockname()[1])


def start(me: Person, *names: str) -> None:
    for name in names:
        count = f"grep -c ready containers/{name}/logs/stdout || true"
        wanted = str(int(me.out(count)) + 1)
        me.sh(f"dutchman start {name}", timeout=180)
        assert me.out(f"cat containers/{name}/state") == "running", me.out(f"cat containers/{name}/error")
        wait_for(partial(says, me, count, wanted), 90, f"{name} is ready")


def says(me: Person, command: str, words: str) -> bool:
    return words in me.out(command)


def finds(me: Person, name: str, other: str, address: str) -> None:
    wait_for(lambda: address in inside(me, name, f"nslookup {other}"), 60, f"{name} finds {other}")


def again(me: Person) -> None:
    """The daemon is killed, and comes again."""
    pid = int(re.findall(r"^pid (\d+)$", me.out("cat status"), re.M)[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not hostmounts.is_mounted(me.mount), what="the dead mount is gone")
    me.sh("dutchman up --runtime vm", timeout=120)


def inside(me: Person, name: str, command: str) -> str:
    done = me.sh(f"dutchman exec {name} sh -c '{command}'", code=None, timeout=120)
    return done.stdout + done.stderr


def get(me: Person, name: str, address: str) -> str:
    return inside(me, name, f'printf "GET / HTTP/1.0\\r\\n\\r\\n" | nc -w 20 {address} 80 | tail -n 1')


def sends(port: int) -> str:
    argv = [sys.executable, "-c", SEND, "127.0.0.1", str(port)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def make(me: Person, name: str, **config: object) -> None:
    common = {"image": "demo:1", "memory": ROOM, "env": [f"NAME={name}"], "command": ["sh", "-c", WEB]}
    volumes = [f"{me.base}/peer:/bin/peer:ro"]
    me.make(name, json.dumps(common | {"volumes": volumes} | config))


if SLOW:

    def test_two_in_a_network_booted_from_a_template_and_from_one_that_stands_by(me: Person) -> None:
        port, other = free_port(), free_port()
        make(me, "one", networks=["front"], ports=[f"{port}:80", f"127.0.0.1:{port}:81/udp"])
        make(me, "two", networks={"front": {"aliases": ["www"]}}, ports=[f"127.0.0.1:{other}:80"])
        how: list[str] = []
        for _ in range(3):
            start(me, "one", "two")
            how += [re.findall("^started (\\w+)", me.out(f"cat containers/{name}/machine"), re.M)[0] for name in NAMES]
            here, there = (me.out(f"cat containers/{name}/ip") for name in NAMES)
            finds(me, "one", "www", there)
            finds(me, "two", "one", here)
            assert get(me, "one", "two") == "two\n" and get(me, "two", "one") == "one\n"
            assert fetched(port) == "one\n" and fetched(other) == "two\n" and sends(port) == "ahoy!\n"
            wait_for(lambda: re.search("^standbys 1: .*held=", me.out("cat status"), re.M), 120, "one stands by")
            me.sh("dutchman stop one two", timeout=120)
            wait_for(lambda: not fetched(port), 30, "the port is closed")
        assert how[0] == "booted" and "standby" in how[2:] and "template" in how, how

    def test_it_joins_and_leaves_networks_while_it_runs(me: Person) -> None:
        start(me, "one", "two")
        for name in ("a", "b", "c"):
            me.out(f"mkdir networks/{name}")
        me.out("echo connect one alias=sea > networks/side/ctl; echo connect two > networks/side/ctl")
        here = me.out("cat containers/one/ip").split()[1]
        finds(me, "two", "sea", here)
        assert get(me, "two", here) == "one\n"
        known = inside(me, "one", "ip addr show eth1; cat /etc/hosts /etc/resolv.conf")
        assert f"inet {here}/24" in known and f"\n{here}\t" in known and known.count("nameserver") == 2, known
        again(me)
        me.out("echo disconnect one > networks/side/ctl")
        left = inside(me, "one", "ip addr show eth1; cat /etc/hosts /etc/resolv.conf")
        assert here not in left and left.count("nameserver") == 1, left
        # what it has of interfaces is used up
        me.out("for name in a b c; do echo connect one > networks/$name/ctl; done")
        before = me.out("cat containers/one/config/networks containers/one/ip")
        files = inside(me, "one", "cat /etc/hosts /etc/resolv.conf; ip -4 addr")
        assert "busy" in me.sh(f"echo connect one > {me.mount}/networks/side/ctl", code=1).stderr
        assert "started with 4 network interfaces" in me.out("cat networks/side/error")
        assert me.out("cat containers/one/config/networks containers/one/ip") == before
        assert inside(me, "one", "cat /etc/hosts /etc/resolv.conf; ip -4 addr") == files
        me.out("for name in c b a; do echo disconnect one > networks/$name/ctl; done")
        assert get(me, "two", "one") == "one\n"
        me.sh("dutchman rm -f one two && dutchman network rm a b c", timeout=120)

    def test_owners_of_what_is_mounted(me: Person) -> None:
        src = me.home / "src"
        me.sh(f"mkdir -p {src}/d && echo a > {src}/f && echo b > {src}/d/g")
        script = (
            "stat -c '%u:%g %n' /s /s/f /s/d/g /v /v/kept 2>&1; echo mine > /s/new && echo mine > /v/kept;"
            "stat -c '%u:%g %n' /s/new /v/kept"
        )
        command = ["sh", "-c", script]
        config = {"networks": ["none"], "command": command, "user": "1000:1000"}
        make(me, "u", volumes=[f"{src}:/s:U", "owned:/v:U"], **config)
        ends(me, "u")
        said = me.out("cat containers/u/logs/stdout").splitlines()
        assert {line.split()[0] for line in said if line[:1].isdigit()} == {"1000:1000"} and len(said) == 7, said
        outside = me.sh(f"stat -c %u:%g {src} {src}/f {src}/d/g {src}/new").stdout.split()
        assert set(outside) == {f"{me.first + 999}:{me.first + 999}"}
        assert me.out("stat -c %u volumes/owned/data/kept") == str(me.first + 999)
        me.out("echo 0:0 > containers/u/config/user")  # yours again
        ends(me, "u")
        assert set(me.sh(f"stat -c %u:%g {src} {src}/f {src}/d/g {src}/new").stdout.split()) == {f"{me.uid}:{me.gid}"}

        # only the kernel's root can have owners mapped; where nothing is to be mapped it is allowed
        before = me.sh(f"stat -c %u:%g:%Z {src} {src}/f").stdout
        for number, option in enumerate(("idmap", "idmap=uids=0-1000-1;gids=0-1000-1")):
            make(me, f"i{number}", volumes=[f"{src}:/s:{option}"], **config)
            refused = me.sh(f"echo start > {me.mount}/containers/i{number}/ctl", code=None, timeout=120)
            wait_for(partial(says, me, f"cat containers/i{number}/error", "idmap"), 60, "it is refused")
            error = me.out(f"cat containers/i{number}/error")
            why = "its owners cannot be mapped: an engine without root may not"
            assert f"volumes: idmap: {src}: {why}" in error
            assert "hint: U instead of idmap" in error, refused
            assert me.out(f"cat containers/i{number}/state") == "stopped"
        assert me.sh(f"stat -c %u:%g:%Z {src} {src}/f").stdout == before
        make(me, "i2", volumes=[f"{src}:/s:idmap", "owned:/v"], **config | {"user": "0:0"})
        ends(me, "i2")
        assert "0:0 /s/f" in me.out("cat containers/i2/logs/stdout").splitlines()
        me.sh("dutchman rm u i0 i1 i2")


NAMES = ("one", "two")


def ends(me: Person, name: str) -> None:
    me.sh(f"echo start > {me.mount}/containers/{name}/ctl", timeout=180)
    wait_for(lambda: me.out(f"cat containers/{name}/state") == "stopped", 120, f"{name} has ended")
    assert me.out(f"cat containers/{name}/exit_code") == "0", me.out(f"cat containers/{name}/error")
