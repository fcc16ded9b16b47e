"""A guest in the network namespace of its run: what netavark made for a process, handed on to a VM. Floor 2.

Only here: the tap devices QEMU is given, and the bridge that joins each with the namespace's interface. The guest takes
over the interface's hardware address, its addresses and its routes, so that names, published ports and other containers
work by what was made for the interface. Linux, with the rights of whoever made the namespace (root, or root of the user
namespace of runtimes/rootless.py).

    netavark's veth ── eth0 ── guest0 (bridge) ── tap0 ── QEMU ── eth0 of the guest

A machine has more taps than networks, for microvm takes no further device while it runs: a network that is connected
later gets the next one. At the end nothing is to be taken down: the tap ends with QEMU, everything else with the
namespace. Stateless.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RuntimeFailure, Unsupported
from engine.programs import run_helper
from engine.runtimes.netns import inside

PATHS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
DEADLINE = 10.0  # seconds for one call of ip
MAX_ANSWER = 1 << 20
TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@dataclass(frozen=True, slots=True)
class Route:
    to: str  # CIDR, or "default"
    via: str = ""  # gateway; empty: on the link
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Interface:
    """What an interface of the guest is to have."""

    name: str  # eth0, eth1, …: in the order of the taps
    mac: str
    mtu: int
    addresses: tuple[str, ...]  # with their prefix lengths
    routes: tuple[Route, ...]


def make_taps(namespace: Path, count: int) -> list[int]:
    """`count` new tap devices tap0, tap1, … in the namespace bound at `namespace`: their descriptors, for QEMU
    (`-netdev tap,fd=`), not inherited unless passed on. Unsupported where the host has no tun; OSError otherwise."""
    made: list[int] = []

    def work() -> None:
        for number in range(count):
            try:
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise Unsupported("this host has no /dev/net/tun", hint="modprobe tun") from error
            made.append(fd)
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", f"tap{number}".encode(), flags))

    try:
        inside(namespace, work)
    except BaseException:
        for fd in made:
            os.close(fd)
        raise
    return made


def join(namespace: Path, count: int, first: int = 0) -> list[Interface]:
    """Join `count` of eth0…, which are set up, with tap0… of the namespace, from number `first` on: what the guest's
    interfaces are to have. RuntimeFailure with the words of `ip`.
    """
    found = [_read(namespace, f"eth{number}") for number in range(first, first + count)]
    commands = []
    for number, interface in enumerate(found, first):
        port, bridge, tap = interface.name, f"guest{number}", f"tap{number}"
        commands += [
            f"link add {bridge} type bridge mcast_snooping 0 forward_delay 0",
            f"link set {bridge} mtu {interface.mtu} addrgenmode none",
            f"link set {port} down",  # takes its addresses' routes along
            f"addr flush dev {port}",
            # the guest answers for the address of old: the bridge would keep for itself what is sent to a port's own
            f"link set {port} address {_random_mac()} addrgenmode none",
            f"link set {port} master {bridge}",
            f"link set {tap} mtu {interface.mtu} addrgenmode none",
            f"link set {tap} master {bridge}",
            *(f"link set {each} up" for each in (bridge, port, tap)),
        ]
    _ip(namespace, ["-batch", "-"], "\n".join(commands) + "\n")
    return found


def part(namespace: Path, number: int) -> None:
    """Undo `join` for one: its tap is free for another. Idempotent."""
    links = json.loads(_ip(namespace, ["-json", "link", "show"]))
    if any(link["ifname"] == f"guest{number}" for link in links):
        _ip(namespace, ["link", "del", f"guest{number}"])


def _read(namespace: Path, name: str) -> Interface:
    (link,) = json.loads(_ip(namespace, ["-json", "address", "show", "dev", name]))
    addresses = tuple(
        f"{item['local']}/{item['prefixlen']}" for item in link["addr_info"] if item.get("scope") == "global"
    )
    routes: list[Route] = []
    for family in ("-4", "-6"):
        for item in json.loads(_ip(namespace, ["-json", family, "route", "show", "dev", name]) or "[]"):
            routes += _route(item)
    return Interface(name, link["address"], link["mtu"], addresses, tuple(routes))


def _route(item: dict[str, Any]) -> list[Route]:
    """What the guest does not get by itself with an address."""
    if item.get("protocol") == "kernel" or item["dst"].startswith(("fe80:", "ff00:")):
        return []
    return [Route(item["dst"], item.get("gateway", ""), item.get("metric", 0))]


def _random_mac() -> str:
    first, *rest = os.urandom(6)
    return ":".join(f"{byte:02x}" for byte in ((first & 0xFC) | 0x02, *rest))  # locally administered, one station


def _ip(namespace: Path, arguments: Sequence[str], stdin: str = "") -> str:
    import shutil  # takes a while, and machines without networks need none of it

    enter, ip = shutil.which("nsenter", path=PATHS), shutil.which("ip", path=PATHS)
    if enter is None or ip is None:
        raise Unsupported("networks of the vm runtime need ip and nsenter", hint="apt-get install iproute2 util-linux")
    argv = [enter, f"--net={namespace}", ip, *arguments]
    code, out, said = run_helper(argv, stdin.encode(), DEADLINE, MAX_ANSWER)
    if code:
        words = " ".join(said.decode(errors="replace").split())[:500]
        raise RuntimeFailure(f"ip {' '.join(arguments)}: {words or f'exit status {code}'}")
    return out.decode(errors="replace")


def words(interface: Interface) -> dict[str, Any]:
    """Of NET (verbs.py)."""
    anywhere = {False: "0.0.0.0/0", True: "::/0"}
    return {
        "iface": interface.name,
        **({"mac": interface.mac} if interface.mac else {}),
        "mtu": interface.mtu,
        "up": 1,
        "addr": list(interface.addresses),
        "route": [
            f"{anywhere[':' in route.via] if route.to == 'default' else route.to}\0{route.via}\0{route.metric}".encode()
            for route in interface.routes
        ],
    }


def empty_words(name: str, addresses: Sequence[str]) -> dict[str, Any]:
    """Of NET for an interface whose network goes: down, without the addresses it had (with their prefix lengths)."""
    return {"iface": name, "mac": _random_mac(), "gone": list(addresses)}
