"""A guest's place in the network namespace of its run: real devices and bridge; the guest is a packet on the tap."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import no_oci, skip_or_fail

from engine.errors import RuntimeFailure
from engine.runtimes import netns
from engine.runtimes.vm.network import Route, join, make_taps

HEADER = 10  # bytes of struct virtio_net_hdr before each frame
ARP = 0x0806
ARP_TARGET = slice(38, 42)  # of a frame: the address that is asked for


def sh(line: str) -> None:
    subprocess.run(["sh", "-c", line], check=True, timeout=20)


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Path]:
    """eth0 as netavark leaves it, 10.213.7.2 and fd13::2 with default routes; its other end is in a second one."""
    if reason := no_oci():
        skip_or_fail(reason)
    run, outside = tmp_path / "run", tmp_path / "outside"
    netns.make(run)
    netns.make(outside)
    try:
        sh(
            f"nsenter --net={outside} sh -ec 'ip link add veth0 type veth peer name eth0;"
            "ip addr add 10.213.7.1/24 dev veth0; ip link set veth0 up'"
        )
        with open(run) as held:
            sh(f"nsenter --net={outside} ip link set eth0 netns /proc/{os.getpid()}/fd/{held.fileno()}")
        sh(
            f"nsenter --net={run} sh -ec 'ip addr add 10.213.7.2/24 dev eth0; ip addr add fd13::2/64 dev eth0 nodad;"
            "ip link set eth0 mtu 1400; ip link set eth0 up; ip route add default via 10.213.7.1 metric 100;"
            "ip -6 route add default via fd13::1 metric 100'"
        )
        yield run
    finally:
        netns.remove(run)
        netns.remove(outside)


def test_the_guest_takes_over_address_and_routes(namespace: Path) -> None:
    (tap,) = make_taps(namespace, 1)
    try:
        (interface,) = join(namespace, 1)
        assert (interface.name, interface.mtu) == ("eth0", 1400)
        assert interface.addresses == ("10.213.7.2/24", "fd13::2/64")
        assert interface.routes == (Route("default", "10.213.7.1", 100), Route("default", "fd13::1", 100))
        # the namespace itself does not answer for the address any more
        out = subprocess.run(
            ["nsenter", f"--net={namespace}", "ip", "-brief", "address"], capture_output=True, text=True, check=True
        ).stdout
        assert "10.213.7.2" not in out and "fd13::2" not in out
        # who asks for the address from outside is heard by the guest; its answer arrives
        mac = bytes.fromhex(interface.mac.replace(":", ""))
        asked = ask(namespace.with_name("outside"), tap)
        assert asked[ARP_TARGET] == socket.inet_aton("10.213.7.2")
        answer = asked[6:12] + mac + asked[12:20] + struct.pack("!H", 2) + mac + asked[38:42] + asked[22:32]
        os.write(tap, b"\0" * HEADER + answer)
        deadline = time.monotonic() + 40
        while interface.mac not in neighbours(namespace.with_name("outside")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.close(tap)


def ask(outside: Path, tap: int) -> bytes:
    """Have the outside look for 10.213.7.2: the frame that the guest hears."""
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('10.213.7.2', 9))"
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        subprocess.run(["nsenter", f"--net={outside}", "python3", "-c", code], check=False, timeout=10)
        while select.select([tap], [], [], 0.5)[0]:
            frame = os.read(tap, 4096)[HEADER:]
            if struct.unpack("!H", frame[12:14])[0] == ARP:
                return frame
    raise AssertionError("the guest heard nothing")


def neighbours(outside: Path) -> str:
    done = subprocess.run(
        ["nsenter", f"--net={outside}", "ip", "neighbour"], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout


def test_what_is_not_there_is_named(namespace: Path) -> None:
    with pytest.raises(RuntimeFailure, match="eth1"):
        join(namespace, 2)
    with pytest.raises(OSError, match="setns"):
        make_taps(Path("/proc/self/ns/mnt"), 1)
