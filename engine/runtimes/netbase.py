"""What makes networks on a host, as connections.py sees it. Floor 2.

Only here: the protocol a backend keeps. `Netavark` is the one for root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.netconfig import PortSpec


@dataclass(frozen=True, slots=True)
class Link:
    """One network and how one container is in it, as netavark wants to know it."""

    network: str  # unique on this host
    bridge: str  # interface on the host
    subnets: tuple[tuple[str, str], ...]  # (CIDR, gateway)
    internal: bool
    interface: str  # in the container
    addresses: tuple[str, ...]
    aliases: tuple[str, ...]
    mac: str = ""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a container has of networks, or comes to have. `dns` answers what the networks' resolver does not know."""

    netns: Path  # where its namespace is bound
    id: str
    name: str
    links: Sequence[Link]
    ports: Sequence[PortSpec]
    dns: Sequence[str]


class Backend(Protocol):
    """What makes networks on the host. Errors: RuntimeFailure with its words, DeadlineExceeded, Unsupported."""

    @property
    def summary(self) -> str:
        """For `status`, when nothing is missing."""
        ...

    @property
    def resolves(self) -> bool:
        """Whether containers find each other by name."""
        ...

    @property
    def inside(self) -> bool:
        """Whether virtual machines have their networks in themselves, and the host makes no namespace for them."""
        ...

    def missing(self) -> str:
        """Why it cannot be used here, '' when it can. Runs no program."""
        ...

    def setup(self, wiring: Wiring) -> None:
        """Connect the namespace."""
        ...

    def teardown(self, wiring: Wiring, *, stays: bool = False) -> None:
        """Take down what `setup` was given; what is gone already may be an error, everything else is gone then.
        `stays`: other networks that were set up with the same ports stay, and these published."""
        ...

    def clear(self, idle: Callable[[], bool]) -> None:
        """Unless somebody has come meanwhile: remove what all networks of this store share."""
        ...
