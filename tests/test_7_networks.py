"""Containers in networks for real: netavark, aardvark-dns and busybox, in a network namespace made here.

The daemon and every command "from the host" run in that namespace: the networks of this machine stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import add_busybox
from mounting import Daemon, can_mount

from engine import host, hostmounts
from engine.connections import state_directory
from engine.engine import Engine
from engine.runtimes import netns
from engine.runtimes.netavark import Netavark, find


def missing() -> str | None:
    if not (host.LINUX and host.is_root()):
        return "networks need root on Linux"
    for program in ("netavark", "aardvark-dns", "iptables", "ip", "nsenter", "runc", "conmon"):
        if find(program) is None:
            return f"{program} is not installed"
    return can_mount()


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

WEB = "sh -c 'echo $0 >/index.html; busybox httpd -p 81 -h /; exec busybox httpd -f -p 80 -h /'"
FETCH = """
import sys, time, urllib.request as request
open = request.build_opener(request.ProxyHandler({})).open
until = time.monotonic() + 20
while True:
    try:
        print(open("http://" + sys.argv[1], timeout=20).read().decode(), end="")
        break
    except OSError as error:  # it has started, and may not listen yet
        if time.monotonic() > until or "refused" not in str(error):
            raise
        time.sleep(0.05)
"""  # not busybox: its static wget needs a C library that fits


class Harbour(Daemon):
    """A daemon in a network namespace of its own, on a store with busybox."""

    def __init__(self, place: Path, runtime: str = "oci") -> None:
        self.netns = place / "net" / "host"
        netns.make(self.netns)
        super().__init__(
            place,
            runtime=runtime,
            within=[shutil.which("nsenter") or "nsenter", f"--net={self.netns}"],
            env={"DUTCHMAN_DEFAULT_NETWORK": "dutchman"},
        )
        with Engine(self.store, runtime="oci") as engine:
            add_busybox(engine)
        self.state = state_directory(self.store)
        self.host("ip link set lo up")

    def host(self, command: str) -> str:
        done = subprocess.run([*self._within, "sh", "-c", command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def make(self, name: str, command: str = "sleep inf", **config: object) -> None:
        (self.mount / "containers" / name).mkdir()
        text = json.dumps({"image": "busybox", "stop_grace_period": 0, **config, "command": command})
        (self.mount / "containers" / name / "config.yaml").write_text(text)

    def serve(self, name: str, command: str = WEB, **config: object) -> None:
        self.make(name, command.replace("$0", name), **config)
        self.sh(f"echo start > containers/{name}/ctl")

    def fetch(self, address: str, name: str = "") -> str:
        """What is served at an address, as the host sees it, or a container."""
        where = f"--net=/proc/{self.read(f'containers/{name}/pid')}/ns/net" if name else f"--net={self.netns}"
        command = ["nsenter", where, sys.executable, "-c", FETCH, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{address} from {name or 'the host'}: {done.stderr[-300:]}"
        return done.stdout

    def inside(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """In the container's namespaces, with its busybox and its resolv.conf."""
        pid = self.read(f"containers/{name}/pid")
        return subprocess.run(
            ["nsenter", "-t", pid, "-n", "-m", "-r", "/bin/busybox", "sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=30,
            env={"PATH": "/bin"},
        )

    def read(self, path: str) -> str:
        return (self.mount / path).read_text().strip()

    def ip(self, name: str) -> str:
        return self.read(f"containers/{name}/ip").split()[0]

    def finds(self, name: str, other: str, address: str) -> None:
        """`name` finds `other` by name: the resolver reads its files a moment after the start has returned."""
        deadline = time.monotonic() + 60
        while True:
            done = self.inside(name, f"busybox nslookup {other}")
            said = done.stdout + done.stderr
            if address in said:
                return
            assert time.monotonic() < deadline, f"{name} does not find {other} at {address}: {said}"
            time.sleep(0.1)

    def gone(self, *names: str) -> None:
        for name in names:
            if self.read(f"containers/{name}/state") == "running":
                self.run(f"echo kill > containers/{name}/ctl")
                self.until(f"cat containers/{name}/state", "stopped")
            self.sh(f"rmdir containers/{name}")

    def bare(self) -> bool:
        """Nothing of any network is left on the host."""
        links = [line.split()[0] for line in self.host("ip -br link").splitlines()]
        rules = self.host("iptables-save; ip6tables-save")
        names = list((self.state / "netns").glob("*")) if self.state.exists() else []
        resolver = Netavark(self.state / "netavark").resolver_pid()
        self.left = f"{links} {names} {resolver}\n{rules}"
        return links == ["lo"] and "NETAVARK" not in rules and not names and resolver is None

    def left_nothing(self) -> None:
        deadline = time.monotonic() + 40
        while not self.bare():
            assert time.monotonic() < deadline, self.left
            time.sleep(0.1)
        while self.state.exists():
            assert time.monotonic() < deadline, list(self.state.rglob("*"))
            time.sleep(0.1)
        points = [point for point, _, _ in hostmounts.mounts() if point.startswith(str(self.state))]
        assert not points

    def stop(self) -> None:
        super().stop()
        if self.netns.exists():
            netns.remove(self.netns)


@contextmanager
def harboured(place: Path) -> Iterator[Harbour]:
    harbour = Harbour(place)
    with harbour:
        yield harbour
        for name in os.listdir(harbour.mount / "containers"):
            if (harbour.mount / "containers" / name).is_dir():
                harbour.gone(name)


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harbour]:
    with harboured(tmp_path_factory.mktemp("sea")) as harbour:
        yield harbour


def test_containers_find_each_other_and_the_host_finds_what_is_published(sea: Harbour) -> None:
    sea.serve(
        "web", ports=["8080:80", "127.0.0.2:9000-9001:80-81", "90:80/udp"], networks={"dutchman": {"aliases": ["www"]}}
    )
    sea.serve("cl", "sleep inf", extra_hosts=["store:10.9.9.9", "harbour:host-gateway"])
    address = sea.ip("web")
    assert sea.read("containers/web/addresses") == f"dutchman {address}"
    assert sea.read("containers/web/ports").split("\n") == [
        "80/tcp 0.0.0.0:8080",
        "80/tcp 127.0.0.2:9000",
        "81/tcp 127.0.0.2:9001",
        "80/udp 0.0.0.0:90",
    ]
    # whoever joins or leaves, the bridge keeps its address: else the others would send to the one of old
    bridge = sea.read("networks/dutchman/bridge")
    link = sea.host(f"ip -o link show {bridge}")
    sea.host(f"ip link add low address 00:00:00:00:00:02 type veth peer name high; ip link set low up master {bridge}")
    assert sea.host(f"ip -o link show {bridge}").split("link/")[1] == link.split("link/")[1]
    sea.host("ip link del low")
    gateway = sea.read("networks/dutchman/gateway")
    for name in ("web", "www", sea.read("containers/web/id")[:12]):
        sea.finds("cl", name, address)
    assert sea.fetch(address, "cl") == "web\n"
    hosts = sea.inside("cl", "busybox cat /etc/hosts").stdout
    assert "10.9.9.9\tstore\n" in hosts and f"{gateway}\tharbour\n" in hosts and f"{sea.ip('cl')}\t" in hosts
    assert sea.inside("cl", "busybox cat /etc/resolv.conf").stdout.startswith(f"nameserver {gateway}\n")
    for place in (address, "127.0.0.1:8080", f"{gateway}:8080", "127.0.0.2:9000", "127.0.0.2:9001"):
        assert sea.fetch(place) == "web\n", place
    # datagrams: a receiver in the container's network, a sender on the host
    receiver = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 80));"
        "s.settimeout(20); print('up', flush=True);"
        "d, who = s.recvfrom(9); s.sendto(d + b'!', who)"
    )
    pid = sea.read("containers/web/pid")
    with subprocess.Popen(["nsenter", "-t", pid, "-n", "python3", "-c", receiver], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        sender = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(20);"
        sender += f"s.sendto(b'ahoy', ('{gateway}', 90)); print(s.recv(9).decode())"
        assert sea.host(f'python3 -c "{sender}"') == "ahoy!\n"
    assert sea.sh("ls networks/dutchman/containers").split() == ["cl", "web"]
    assert sea.read("networks/dutchman/containers/web/state") == "running"
    said = sea.refused("rmdir networks/dutchman", "busy")
    assert "used by cl, web" in sea.read("networks/dutchman/error"), said
    sea.gone("web", "cl")


def test_a_taken_port_is_refused_by_name(sea: Harbour) -> None:
    sea.serve("one", ports=["8081:80"])
    sea.make("two", WEB.replace("$0", "two"), ports=["8081:80"])
    sea.refused("echo start > containers/two/ctl", "busy")
    assert "host port 8081/tcp is published by one" in sea.read("containers/two/error")
    assert sea.read("containers/two/state") == "stopped" and "8081" in sea.read("containers/two/reason")
    sea.sh("echo kill > containers/one/ctl")
    sea.sh("echo start > containers/two/ctl")  # it waits for what the other one leaves
    assert sea.fetch("127.0.0.1:8081") == "two\n"
    sea.gone("one", "two")


def test_networks_keep_apart_what_is_not_in_both(sea: Harbour) -> None:
    sea.sh("mkdir networks/front; echo 'create back ipv6=true label=a=1' > networks/ctl")
    assert sea.read("networks/back/labels") == "a=1" and len(sea.read("networks/back/subnet").split()) == 2
    sea.serve("f", networks=["front"])
    sea.serve("b", networks=["back"])
    sea.serve("both", "sleep inf", networks={"front": {}, "back": {"aliases": ["bridge"]}})
    front, back, back6 = sea.ip("f"), *sea.read("containers/b/ip").split()
    sea.finds("both", "f", front)
    sea.finds("both", "b", back)
    sea.finds("b", "bridge", sea.read("containers/both/ip").split()[1])
    assert sea.fetch(front, "both") == "f\n"
    assert sea.fetch(f"[{back6}]", "both") == "b\n"
    assert sea.fetch(f"[{back6}]") == "b\n"
    assert front not in sea.inside("b", "busybox timeout 2 busybox nslookup -type=a f").stdout
    assert sea.read("containers/both/addresses").split("\n")[0].startswith("front ")

    # connected and disconnected while it runs
    sea.sh("echo 'connect f alias=fore' > networks/back/ctl")
    sea.finds("b", "fore", sea.read("containers/f/ip").split()[1])
    assert sea.sh("ls networks/back/containers").split() == ["b", "both", "f"]
    assert sea.read("containers/f/config/networks").startswith("front: null\nback:\n")
    assert sea.fetch(back, "f") == "b\n"
    assert sea.inside("f", "busybox cat /etc/resolv.conf").stdout.count("nameserver") == 3
    own = sea.read("containers/f/id")[:12] + " f"
    there = sea.inside("f", "echo 10.1.2.3 mine >> /etc/hosts; busybox cat /etc/hosts").stdout.splitlines()
    came = [f"{address}\t{own}" for address in sea.read("containers/f/ip").split()[1:]]
    assert there[-4:] == [f"{front}\t{own}", *came, "10.1.2.3 mine"]
    sea.refused("echo 'connect f' > networks/back/ctl", "File exists")
    sea.sh("echo 'disconnect f' > networks/back/ctl")
    assert sea.inside("f", "busybox cat /etc/hosts").stdout.splitlines() == [*there[:-3], "10.1.2.3 mine"]
    assert (
        sea.read("containers/f/addresses") == f"front {front}" and sea.read("containers/f/config/networks") == "front"
    )
    assert "eth1" not in sea.inside("f", "busybox ip -o link").stdout
    sea.refused("echo 'disconnect f' > networks/back/ctl", "No such file")
    sea.gone("f", "b", "both")
    assert sea.sh("exec 3<> networks/ctl; echo prune >&3; cat <&3").split() == ["back", "front"]
    sea.refused("ls networks/front", "No such file")


def test_internal_host_and_none(sea: Harbour) -> None:
    sea.sh("echo 'create vault internal=true subnet=10.66.0.0/24 gateway=10.66.0.254' > networks/ctl")
    sea.refused("echo 'create v2 subnet=10.66.0.0/16' > networks/ctl", "busy")
    assert "overlaps 10.66.0.0/24 of network vault" in sea.read("networks/error")
    sea.serve("in1", networks={"vault": {"ipv4_address": "10.66.0.77", "mac_address": "02:42:00:00:00:07"}})
    sea.serve("in2", "sleep inf", networks=["vault"])
    assert sea.ip("in1") == "10.66.0.77" and sea.ip("in2") == "10.66.0.1"
    assert "02:42:00:00:00:07" in sea.inside("in1", "busybox ip link show eth0").stdout
    assert sea.fetch("10.66.0.77", "in2") == "in1\n"
    assert "default" not in sea.inside("in2", "busybox ip route").stdout
    sea.make("in3", networks=["vault"], ports=["8085:80"])
    sea.refused("echo start > containers/in3/ctl", "Invalid argument")
    assert "internal network" in sea.read("containers/in3/error")

    sea.serve("h", "sh -c 'echo h > /index.html; exec busybox httpd -f -p 8086 -h /'", networks=["host"])
    sea.until('python3 -c \'import socket; socket.create_connection(("127.0.0.1", 8086), 5); print("open")\'', "open")
    assert sea.fetch("127.0.0.1:8086") == "h\n"
    assert sea.read("containers/h/ip") == "" and sea.inside("h", "busybox ip -o link").stdout == sea.host(
        "busybox ip -o link"
    )
    sea.serve("n", "sleep inf", networks=["none"])
    assert [line.split()[1] for line in sea.inside("n", "busybox ip -o link").stdout.splitlines()] == ["lo:"]
    sea.refused("echo '80:80' > containers/n/config/ports", "Invalid argument|busy")
    sea.gone("in1", "in2", "in3", "h", "n")


def test_the_command_does_the_same(sea: Harbour) -> None:
    dutchman = f"{sys.executable} -m fdfs"
    at = f"--mount {sea.mount}"
    assert (
        sea.sh(f"{dutchman} network create {at} --internal --ipv6 --subnet 10.44.0.0/24 --label a=b inner") == "inner\n"
    )
    done = sea.run(f"{dutchman} network create {at} inner")
    assert done.returncode == 1 and "a network named inner exists" in done.stderr
    options = "-p 8087:80 --network dutchman --network-alias shop --dns 192.0.2.53 --add-host far:10.8.8.8"
    command = "-- sh -c 'echo cli > /index.html; exec busybox httpd -f -p 80 -h /'"
    assert sea.sh(f"{dutchman} run {at} -d --name cli {options} busybox {command}") == "cli\n"
    config = {name: sea.read(f"containers/cli/config/{name}") for name in ("ports", "dns", "extra_hosts")}
    assert config == {"ports": "8087:80", "dns": "192.0.2.53", "extra_hosts": "far:10.8.8.8"}
    assert "0.0.0.0:8087->80/tcp" in sea.sh(f"{dutchman} ps {at}")
    sea.finds("cli", "shop", sea.ip("cli"))
    assert (sea.state / "netavark/aardvark-dns" / sea.read("networks/dutchman/bridge")[5:]).read_text().count(
        "192.0.2.53"
    ) == 1
    sea.until('python3 -c \'import socket; socket.create_connection(("127.0.0.1", 8087), 5); print("open")\'', "open")
    sea.sh(f"{dutchman} network connect {at} --alias back --ip 10.44.0.9 inner cli")
    listed = [line.split() for line in sea.sh(f"{dutchman} network ls {at}").splitlines()]
    assert listed[0] == ["NAME", "DRIVER", "SUBNET", "ACCESS", "CONTAINERS"]
    inner = next(row for row in listed if row[0] == "inner")
    assert inner[2].startswith("10.44.0.0/24,fd") and inner[3:] == ["internal", "cli"]
    done = sea.run(f"{dutchman} network rm {at} inner")
    assert done.returncode == 1 and "used by cli" in done.stderr and "hint:" in done.stderr
    sea.sh(f"{dutchman} network disconnect {at} inner cli; {dutchman} network rm {at} inner")
    sea.gone("cli")


def test_nothing_is_left_when_nobody_is_connected(sea: Harbour) -> None:
    sea.serve("web", ports=["8080:80"])
    assert not sea.bare()
    sea.serve("ends", "true")
    sea.until("cat containers/ends/state", "stopped")
    sea.make("never", "/nonexistent/program")
    sea.refused("echo start > containers/never/ctl", ".")
    sea.gone("web")
    sea.sh("rmdir containers/ends containers/never")
    sea.left_nothing()
    deadline = time.monotonic() + 30  # the host has let go before that is told
    while True:
        types = [json.loads(line)["type"] for line in sea.read("events").splitlines()]
        if types.count("networkConnected") == types.count("networkDisconnected") >= 3:
            break
        assert time.monotonic() < deadline, types
        time.sleep(0.05)


def test_the_resolver_that_was_killed_comes_back_with_the_next_container(sea: Harbour) -> None:
    sea.serve("a", "sleep inf")
    backend = Netavark(sea.state / "netavark")
    pid = backend.resolver_pid()
    assert pid is not None
    os.kill(pid, 9)
    while backend.resolver_pid() == pid:  # its end
        time.sleep(0.01)
    sea.serve("b", "sleep inf")
    sea.finds("a", "b", sea.ip("b"))
    sea.gone("a", "b")


def test_networks_outlive_the_daemon_and_are_taken_down_by_the_next(tmp_path: Path) -> None:
    with harboured(tmp_path) as sea:
        sea.serve("stays", ports=["8080:80"])
        sea.serve("dies", ports=["8082:80"])
        sea.serve("cl", "sleep inf")
        address, pid = sea.ip("stays"), int(sea.read("containers/dies/pid"))
        sea.kill()
        assert sea.fetch("127.0.0.1:8080") == "stays\n"
        os.kill(pid, 9)
        sea.unmount()
        sea.start()
        assert sea.ip("stays") == address and sea.fetch("127.0.0.1:8080") == "stays\n"
        sea.finds("cl", "stays", address)
        sea.until("cat containers/dies/state", "stopped")
        deadline = time.monotonic() + 60
        while sea.read("containers/dies/ip") or "8082" in sea.host("iptables-save"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sea.sh("echo restart > containers/dies/ctl")
        assert sea.fetch(sea.ip("dies")) == "dies\n"
        sea.gone("stays", "dies", "cl")
        assert sea.process is not None
        sea.process.terminate()  # at once: what all networks share goes with the daemon then
        sea.process.wait(20)
        sea.left_nothing()
        sea.unmount()
        sea.start()


def await_netavark(sea: Harbour) -> None:
    """Until netavark is at work for this store, or was too fast to be seen."""
    wanted = os.fsencode(sea.state)
    for _ in range(2000):
        for entry in Path("/proc").iterdir():
            try:
                if (
                    entry.name.isdigit()
                    and wanted in (words := (entry / "cmdline").read_bytes())
                    and b"netavark" in words
                ):
                    return
            except OSError:
                continue


@pytest.mark.timeout(600)
def test_a_daemon_killed_while_it_connects_and_disconnects(tmp_path: Path) -> None:
    late = [number * 0.05 for number in range(1, 9)] if os.environ.get("DUTCHMAN_SLOW_TESTS") else []
    with harboured(tmp_path) as sea:
        sea.sh("echo 'create front' > networks/ctl; echo 'create back' > networks/ctl")
        sea.serve("a", "sleep inf", networks=["front"])
        for seconds in [None, *late]:
            for verb in ("connect", "disconnect"):
                asked = subprocess.Popen(
                    ["sh", "-c", f"echo '{verb} a' > networks/back/ctl"], cwd=sea.mount, stderr=subprocess.DEVNULL
                )
                if seconds is None:
                    await_netavark(sea)
                else:
                    time.sleep(seconds)
                sea.kill()
                sea.unmount()
                asked.wait(30)
                sea.start()
                told = "back" in sea.read("containers/a/config/networks")
                rows = "back " in sea.read("containers/a/addresses")
                there = "eth1" in sea.inside("a", "busybox ip -o link").stdout
                assert told == rows == there, (
                    f"{verb}, killed after {seconds}: {told} {rows} {there}\n{sea.log()[-2000:]}"
                )
                if told != (verb == "connect"):
                    sea.sh(f"echo '{verb} a' > networks/back/ctl")
                assert ("eth1" in sea.inside("a", "busybox ip -o link").stdout) == (verb == "connect")
        sea.gone("a")
