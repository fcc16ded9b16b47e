"""What a run's network is to its runtime, and the container's hosts and resolv.conf. Floor 2, pure but for reads.

Only here: the text of those two files. Formats: hosts(5), resolv.conf(5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine.config import ContainerConfig
from engine.errors import InvalidArgument
from engine.netconfig import HOST_GATEWAY

MAX_RESOLV = 64 << 10  # bytes


class NetworkMode(StrEnum):
    OWN = "own"  # a namespace the runtime makes, with loopback alone
    JOINED = "joined"  # a namespace made beforehand
    HOST = "host"


@dataclass(frozen=True, slots=True)
class RunNetwork:
    """The network of one run, decided before its process is made."""

    mode: NetworkMode = NetworkMode.OWN
    path: Path | None = None  # of the namespace to join
    names: tuple[str, ...] = ()  # the container's own, besides its hostname
    addresses: tuple[str, ...] = ()  # the container's own
    resolvers: tuple[str, ...] = ()  # that know the names of other containers; empty: the host's
    gateway: str = ""  # where the container reaches the host


LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def _read(path: str) -> str:
    """A file of the host, as far as it is there and text."""
    try:
        return Path(path).read_bytes()[:MAX_RESOLV].decode(errors="replace")
    except OSError:
        return ""


def hosts_text(network: RunNetwork, hostname: str, config: ContainerConfig) -> str:
    """hosts(5): the host's own with its network, else localhost; then extra_hosts, then the container itself.

    InvalidArgument when extra_hosts asks for the gateway of a network there is none of.
    """
    shared = network.mode is NetworkMode.HOST
    text = (_read("/etc/hosts") if shared else "") or LOCAL
    lines = [text if text.endswith("\n") else f"{text}\n"]
    for item in config.extra_hosts:
        name, _, address = item.partition(":")
        if address == HOST_GATEWAY:
            address = "127.0.0.1" if shared else network.gateway
        if not address:
            raise InvalidArgument(f"extra_hosts: {item}: the container has no network with a gateway", at=item)
        lines.append(f"{address}\t{name}\n")
    own = " ".join(dict.fromkeys((hostname, *network.names)))
    for address in network.addresses or (() if shared else ("127.0.1.1",)):
        lines.append(f"{address}\t{own}\n")
    return "".join(lines)


def resolv_text(network: RunNetwork, config: ContainerConfig) -> str:
    """resolv.conf(5): the networks' resolvers (which ask `dns`, or the host's, for what they do not know), else `dns`,
    else the host's; `dns_search` (`.`: none) and `dns_options` in place of the host's."""
    known = {"nameserver": list[str](), "search": list[str](), "options": list[str]()}
    for line in _read("/etc/resolv.conf").splitlines():
        key, *words = line.split() or [""]
        if key == "domain":
            key = "search"
        if key in ("search", "options"):
            known[key] = words  # the last one counts
        elif key == "nameserver":
            known[key] += words[:1]
    search: Sequence[str] = (
        [item for item in config.dns_search if item != "."] if config.dns_search else known["search"]
    )
    out = [f"nameserver {item}\n" for item in network.resolvers or config.dns or known["nameserver"]]
    out += [f"search {' '.join(search)}\n"] if search else []
    options = config.dns_options or known["options"]
    out += [f"options {' '.join(options)}\n"] if options else []
    return "".join(out)
