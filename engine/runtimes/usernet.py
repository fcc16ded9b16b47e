"""Networks of an engine without root: netavark in a namespace of the user's, slirp4netns as its way out. Floor 2.

Only here: the order of the two. Bridges, names and rules are as with root; a published port takes two steps, from the
host to the namespace (slirp.py), and there by netavark's rules to the container. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from engine.errors import InvalidArgument, Unsupported
from engine.netconfig import PortSpec
from engine.runtimes.netavark import Netavark
from engine.runtimes.netbase import Wiring
from engine.runtimes.slirp import Forward, Uplink

MAX_FORWARDS = 512  # each is a question to slirp4netns and a descriptor of its


def _forwards(ports: Sequence[PortSpec]) -> Iterator[Forward]:
    for port in ports:
        for offset in range(port.count):
            yield Forward(port.protocol, port.host_ip, port.host + offset)


def _inner(wiring: Wiring) -> Wiring:
    """Where a port is asked for at is the host's affair; inside, it comes in at the one address there is."""
    return replace(wiring, ports=[port.model_copy(update={"host_ip": ""}) for port in wiring.ports])


class UserNetworks:
    """A Backend (netbase.py). `state` is a directory of its own, `runtime` the user's runtime directory."""

    def __init__(self, state: Path, runtime: Path) -> None:
        self._uplink = Uplink(runtime)
        self._netavark = Netavark(state, self._uplink)

    inside = False

    @property
    def summary(self) -> str:
        return self._netavark.summary

    @property
    def resolves(self) -> bool:
        return self._netavark.resolves

    def missing(self) -> str:
        return self._netavark.missing()

    def setup(self, wiring: Wiring) -> None:
        if sum(port.count for port in wiring.ports) > MAX_FORWARDS:
            raise InvalidArgument(
                f"ports: an engine without root publishes at most {MAX_FORWARDS} of a container", at="ports"
            )
        if six := next((port.host_ip for port in wiring.ports if ":" in port.host_ip), ""):
            raise Unsupported(
                f"ports: {six}: an engine without root publishes no ports at IPv6 addresses of the host", at=six,
                hint="slirp4netns forwards IPv4 only: publish without an address, or at 127.0.0.1",
            )  # fmt: skip
        self._uplink.ensure()
        self._netavark.setup(_inner(wiring))
        self._uplink.forward(_forwards(wiring.ports))

    def teardown(self, wiring: Wiring, *, stays: bool = False) -> None:
        if not stays:  # one way in serves all networks
            self._uplink.unforward(_forwards(wiring.ports))
        self._netavark.teardown(_inner(wiring))

    def clear(self, idle: Callable[[], bool]) -> None:
        if self._uplink.missing() or not idle():
            return
        self._netavark.clear(idle)
        if idle() and not self._uplink.used():
            self._uplink.stop()
