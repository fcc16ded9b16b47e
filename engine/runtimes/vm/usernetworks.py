"""Networks where the host can make none for a machine: QEMU's own (libslirp), in each machine for itself. Floor 2.

Only here: what such a network is to have, and the words the guest is told. A container has the address it was given, a
gateway, names of the outside, and its published ports; containers do not reach each other, for every machine has a
network of its own of that name. Source: QEMU's `-netdev user` (net/slirp.c). Stateless.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import Unsupported
from engine.netconfig import PortSpec, is_v6
from engine.runtimes.netbase import Link, Wiring
from engine.runtimes.netfiles import NetworkMode, RunNetwork
from engine.runtimes.vm import network
from engine.runtimes.vm.network import Interface, Route

MTU = 1500
SUMMARY = "QEMU's own, in each virtual machine: the outside and published ports, but not each other"


class GuestNetworks:
    """The backend (netbase.py): nothing is made on the host."""

    resolves = False
    summary = SUMMARY
    inside = True  # the machine itself makes them

    def missing(self) -> str:
        return ""

    def setup(self, wiring: Wiring) -> None:
        """Unsupported for what QEMU cannot do."""
        for link in wiring.links:
            if any(":" in subnet for subnet, _ in link.subnets):
                raise Unsupported(f"networks: {link.bridge} has IPv6, which machines of this host have not")
        for port in wiring.ports:
            if port.protocol not in ("tcp", "udp") or is_v6(port.host_ip):
                raise Unsupported(f"ports: {port}: machines of this host publish tcp and udp, by IPv4", at=str(port))

    def teardown(self, wiring: Wiring, *, stays: bool = False) -> None:
        """They end with the machine."""

    def clear(self, idle: Callable[[], bool]) -> None:
        """Nothing is shared."""


def resolver(link: Link) -> str:
    """Where names are asked for in a network: the last address before that for all."""
    return str(ipaddress.ip_network(link.subnets[0][0])[-2])


def of_run(wiring: Wiring) -> RunNetwork:
    """Of a container's run in those networks."""
    links = wiring.links
    resolvers = () if wiring.dns else (resolver(links[0]),)
    addresses = tuple(address for link in links for address in link.addresses)
    gateway = links[0].subnets[0][1]
    return RunNetwork(
        NetworkMode.GUEST, None, (wiring.name,), addresses, resolvers, gateway, tuple(links), tuple(wiring.ports)
    )


def _words(name: str, link: Link, leads: bool) -> dict[str, Any]:
    """Of NET, as JSON can hold them."""
    (subnet, gateway), *_ = link.subnets
    address = f"{link.addresses[0]}/{ipaddress.ip_network(subnet).prefixlen}"
    routes = (Route("default", gateway),) if leads else ()
    words = network.words(Interface(name, link.mac, MTU, (address,), routes))
    return words | {"route": [route.decode() for route in words["route"]]}


def describe(links: Sequence[Link], ports: Sequence[PortSpec]) -> list[dict[str, Any]]:
    """What the machine is to have for each of `links`, as plain values: of qemu.UserNet, and what the guest is
    told. Ports are published by the first network that leads out."""
    out: list[dict[str, Any]] = []
    leads = next((number for number, link in enumerate(links) if not link.internal), -1)
    for number, link in enumerate(links):
        (subnet, gateway), *_ = link.subnets
        address = link.addresses[0]
        forwards = [
            [port.protocol, port.host_ip, port.host + one, port.container + one]
            for port in (ports if number == leads else ())
            for one in range(port.count)
        ]
        out.append(
            {
                "ports": forwards,
                "subnet": subnet,
                "gateway": gateway,
                "resolver": resolver(link),
                "address": address,
                "internal": link.internal,
                "mac": link.mac,
                "words": _words(f"eth{number}", link, number == leads),
            }
        )
    return out
