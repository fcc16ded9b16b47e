"""Virtual machines in networks for real: what netavark made for a process serves a guest, beside a process's own.

Two machines serve the whole module; a container of the oci runtime, the host and a server outside are the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestkernel import share_kernels
from runtimebench import no_vm, skip_or_fail
from test_7_networks import Harbour, missing

from engine.runtimes import netns
from engine.runtimes.vm import accel

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PEER = r"""
/* Answers datagrams to port 81 with the same and an exclamation mark. No C library: that takes a minute to make. */
#if defined(__x86_64__)
enum { SOCKET = 41, BIND = 49, SENDTO = 44, RECVFROM = 45 };
static long call(long n, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return n;
}
#else
enum { SOCKET = 198, BIND = 200, SENDTO = 206, RECVFROM = 207 };
static long call(long n, long a, long b, long c, long d, long e, long f) {
    register long x8 __asm__("x8") = n, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
#endif
void _start(void) {
    static unsigned char any[28] = {10, 0, 0, 81}, from[28]; /* struct sockaddr_in6 */
    static char text[1500];
    long s = call(SOCKET, 10, 2, 0, 0, 0, 0);
    call(BIND, s, (long)any, sizeof any, 0, 0, 0);
    for (;;) {
        int size = sizeof from;
        long n = call(RECVFROM, s, (long)text, sizeof text - 1, 0, (long)from, (long)&size);
        if (n >= 0) text[n] = '!', call(SENDTO, s, (long)text, n + 1, 0, (long)from, size);
    }
}
"""
SEND = """
import socket, sys
family, _, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
speaking = socket.socket(family, socket.SOCK_DGRAM)
speaking.settimeout(2)
for _ in range(10):
    speaking.sendto(b"ahoy", address)
    try:
        print(speaking.recv(99).decode())
        break
    except TimeoutError:
        pass
"""
SERVER = """
import http.server, socket
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"outside saw {self.client_address[0]}\\n".encode())
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 80), Answer).serve_forever()
"""
WEB = "sh -c 'echo $0 > /index.html; peer & httpd -p 82 -h /; echo up; exec httpd -f -p 80 -h /'"
OUTSIDE, OUTSIDE6 = "203.0.113.1", "2001:db8:113::1"


def peer(architecture: str, path: Path) -> Path:
    """PEER for that processor, at `path`."""
    source = path.with_suffix(".c")
    source.write_text(PEER)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl"]
    bare = ["-static", "-nostdlib", "-ffreestanding", "-O1", "-fno-stack-protector", "-fno-sanitize=all"]
    subprocess.run([*zig, *bare, "-o", path, source], check=True, timeout=300)
    return path


class Fleet(Harbour):
    """With a server somewhere outside, and a kernel for guests."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, "vm")
        share_kernels(self.store)
        self.peer = peer(accel.architecture(), place / "peer")
        self.outside = place / "net" / "outside"
        netns.make(self.outside)
        self.host("ip link add way type veth peer name eth0")
        with open(self.outside) as there:
            self.host(f"ip link set eth0 netns /proc/{os.getpid()}/fd/{there.fileno()}")
        self.host(f"ip addr add {OUTSIDE}00/24 dev way; ip addr add {OUTSIDE6}00/64 dev way nodad; ip link set way up")
        enter = ["nsenter", f"--net={self.outside}"]
        for line in (f"addr add {OUTSIDE}/24 dev eth0", f"addr add {OUTSIDE6}/64 dev eth0 nodad", "link set eth0 up"):
            subprocess.run([*enter, "ip", *line.split()], check=True, timeout=20)
        self.server = subprocess.Popen(
            [*enter, sys.executable, "-c", SERVER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        self.server.kill()
        self.server.wait()
        super().stop()
        if self.outside.exists():
            netns.remove(self.outside)

    def launch(self, name: str, **config: object) -> None:
        """A server in a machine, or where `runtime` says."""
        self.make(name, WEB.replace("$0", name), volumes=[f"{self.peer}:/bin/peer:ro"], **config)
        self.sh(f"echo start > containers/{name}/ctl", timeout=120)
        self.until(f"cat containers/{name}/logs/stdout", "up", seconds=60)

    def exec(self, name: str, command: str) -> str:
        """Output of a shell command in a container, whatever runs it."""
        done = self.run(f"{sys.executable} -m fdfs exec --mount {self.mount} {name} sh -c '{command}'", timeout=120)
        return done.stdout + done.stderr

    def get(self, name: str, address: str) -> str:
        """What a container sees at an address."""
        return self.exec(name, f'printf "GET / HTTP/1.0\\r\\n\\r\\n" | nc -w 20 {address} 80 | tail -n 1')

    def sends(self, address: str, port: int) -> str:
        """What comes back when the host sends a datagram."""
        done = subprocess.run(
            [*self._within, sys.executable, "-c", SEND, address, str(port)], capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    def knows(self, name: str, other: str, address: str) -> None:
        """By name; the resolver reads its files a moment after a start has returned."""
        deadline = time.monotonic() + 60
        while address not in (said := self.exec(name, f"nslookup {other}")):
            assert time.monotonic() < deadline, said


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := no_vm():
        skip_or_fail(reason)
    place = tmp_path_factory.mktemp("fleet")
    with Fleet(place) as fleet:
        fleet.sh("mkdir networks/front; echo 'create back ipv6=true' > networks/ctl")
        fleet.sh("echo 'create vault internal=true' > networks/ctl")
        ports = ["8080:80", "127.0.0.2:9000-9002:80-82", "9090:81/udp", f"[{OUTSIDE6}00]:8081:80"]
        fleet.launch("one", ports=ports, networks={"front": {"aliases": ["www"]}, "back": {"aliases": ["sea"]}})
        fleet.launch("two", networks=["back", "vault"])
        fleet.launch("three", runtime="oci", networks=["front", "vault"])
        yield fleet
        for name in os.listdir(fleet.mount / "containers"):
            if (fleet.mount / "containers" / name).is_dir():
                fleet.gone(name)
        fleet.host("ip link del way")
        fleet.left_nothing()


def test_machines_and_processes_find_each_other(fleet: Fleet) -> None:
    front, back, back6 = fleet.read("containers/one/ip").split()
    two, two6, vault = fleet.read("containers/two/ip").split()
    for name in ("one", "sea", fleet.read("containers/one/id")[:12]):
        fleet.knows("two", name, back)
    fleet.knows("one", "two", two)
    fleet.knows("three", "www", front)
    fleet.knows("one", "three", fleet.ip("three"))
    assert fleet.get("two", back) == "one\n" and fleet.get("two", back6) == "one\n"
    assert fleet.get("one", two) == "two\n" and fleet.get("one", two6) == "two\n"
    assert fleet.get("three", front) == "one\n" and fleet.get("one", fleet.ip("three")) == "three\n"
    assert fleet.get("three", vault) == "two\n"
    hosts = fleet.exec("one", "cat /etc/hosts /etc/resolv.conf")
    assert f"{front}\t" in hosts and hosts.count("nameserver") == 3, hosts
    # an internal network leads nowhere, and whoever is in no common one is not found
    routes = fleet.exec("two", "ip route")
    assert routes.count("default") == 1 and "default via " in routes and "dev eth0" in routes.splitlines()[0], routes
    assert front not in fleet.exec("two", "nslookup three; nslookup www")


def test_published_ports_and_the_way_out(fleet: Fleet) -> None:
    for place in ("127.0.0.1:8080", "127.0.0.2:9000", "127.0.0.2:9002", f"[{OUTSIDE6}00]:8081", f"{OUTSIDE}00:8080"):
        assert fleet.fetch(place) == "one\n", place
    assert fleet.sends(f"{OUTSIDE}00", 9090) == "ahoy!\n"
    assert fleet.get("one", OUTSIDE) == f"outside saw ::ffff:{OUTSIDE}00\n"
    assert fleet.get("two", OUTSIDE6) == f"outside saw {OUTSIDE6}00\n"


def test_a_machine_that_runs_joins_and_leaves_networks(fleet: Fleet) -> None:
    fleet.sh("echo 'create side ipv6=true' > networks/ctl; echo 'create far' > networks/ctl")
    fleet.sh("echo 'connect two alias=guest' > networks/side/ctl; echo 'connect three' > networks/side/ctl")
    here, here6 = fleet.read("containers/two/ip").split()[3:]
    fleet.knows("three", "guest", here)
    assert fleet.get("three", here) == "two\n" and fleet.get("three", here6) == "two\n"
    inside = fleet.exec("two", "ip addr show eth2; ip route; cat /etc/resolv.conf /etc/hosts")
    assert f"\n{here}\t" in inside and f"\n{here6}\t" in inside, inside
    assert f"inet {here}/24" in inside and f"inet6 {here6}/64" in inside and ",UP," in inside, inside
    assert "dev eth0" in inside[inside.index("default") :].splitlines()[0], inside
    assert inside.count("nameserver") == 5, inside
    assert "side" in fleet.read("containers/two/config/networks")
    fleet.kill()  # a daemon that was killed meanwhile makes no difference
    fleet.unmount()
    fleet.start()
    fleet.sh("echo 'disconnect two' > networks/side/ctl")
    left = fleet.exec("two", "ip addr show eth2; cat /etc/resolv.conf /etc/hosts")
    assert here not in left and here6 not in left and ",UP," not in left and left.count("nameserver") == 3, left
    assert "side" not in fleet.read("containers/two/config/networks")
    fleet.sh("echo 'connect two' > networks/side/ctl")  # the interface is used again
    assert fleet.get("three", fleet.read("containers/two/ip").split()[3]) == "two\n"
    # what it has of interfaces is used up
    fleet.sh("echo 'connect one' > networks/side/ctl; echo 'connect one' > networks/vault/ctl")
    fleet.refused("echo 'connect one' > networks/far/ctl", "busy")
    assert "4 network interfaces" in fleet.read("networks/far/error")
    assert "far" not in fleet.read("containers/one/config/networks")
    assert len(fleet.read("containers/one/ip").split()) == 6
    fleet.sh("echo 'disconnect one' > networks/side/ctl; echo 'disconnect one' > networks/vault/ctl")
    assert fleet.fetch("127.0.0.1:8080") == "one\n" and fleet.sends(f"{OUTSIDE}00", 9090) == "ahoy!\n"


def test_what_a_killed_machine_had_is_free_again(fleet: Fleet) -> None:
    """QEMU of one, the process that owns it of the other, while no daemon looks."""
    store = fleet.store / "containers"
    machine = int((store / fleet.read("containers/one/id") / "run/vm/qemu.pid").read_text())
    os.kill(machine, signal.SIGKILL)
    fleet.until("cat containers/one/state", "stopped", seconds=60)
    assert fleet.read("containers/one/exit_code") == "137"
    fleet.until('echo "($(cat containers/one/ip))"', "()", seconds=60)
    fleet.until('echo "($(cat containers/one/ports))"', "()", seconds=60)
    owner = int(fleet.read("containers/two/pid"))
    fleet.kill()
    os.kill(owner, signal.SIGKILL)
    fleet.unmount()
    fleet.start()
    fleet.until("cat containers/two/state", "stopped", seconds=60)
    assert fleet.get("three", OUTSIDE).startswith("outside saw")
