"""What a run's network is to its runtime, and the container's hosts and resolv.conf. Floor 2; but for reads, and
`refresh`, pure.

Only here: the text of those two files, as it is first and as networks come and go. Formats: hosts(5), resolv.conf(5).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine.config import ContainerConfig
from engine.errors import InvalidArgument
from engine.netconfig import HOST_GATEWAY, PortSpec
from engine.runtimes.netbase import Link

log = logging.getLogger(__name__)

MAX_RESOLV = 64 << 10  # bytes
MAX_HOSTS = 1 << 20  # bytes: more of it, written by the container, stays as it is


class NetworkMode(StrEnum):
    OWN = "own"  # a namespace the runtime makes, with loopback alone
    JOINED = "joined"  # a namespace made beforehand
    HOST = "host"
    GUEST = "guest"  # the virtual machine makes them by itself


@dataclass(frozen=True, slots=True)
class RunNetwork:
    """The network of one run, decided before its process is made."""

    mode: NetworkMode = NetworkMode.OWN
    path: Path | None = None  # of the namespace to join
    names: tuple[str, ...] = ()  # the container's own, besides its hostname
    addresses: tuple[str, ...] = ()  # the container's own
    resolvers: tuple[str, ...] = ()  # that know the names of other containers; empty: the host's
    gateway: str = ""  # where the container reaches the host
    links: tuple[Link, ...] = ()  # of GUEST
    ports: tuple[PortSpec, ...] = ()


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
    own = _own(hostname, network.names)
    for address in network.addresses or (() if shared else ("127.0.1.1",)):
        lines.append(f"{address}\t{own}\n")
    return "".join(lines)


def _own(hostname: str, names: Sequence[str]) -> str:
    return " ".join(dict.fromkeys((hostname, *names)))


def moved_hosts(text: str, own: str, come: Sequence[str], gone: Sequence[str]) -> str:
    """hosts(5) of a container that has come to the addresses `come` and left those in `gone`. What else the container
    has written there stays."""
    ours = {f"{address}\t{own}" for address in gone}
    lines = [line for line in text.removesuffix("\n").split("\n") if line not in ours]
    lines += [line for address in come if (line := f"{address}\t{own}") not in lines]
    return "\n".join(lines) + "\n"


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


def refresh(
    place: Path,
    network: RunNetwork,
    hostname: str,
    config: ContainerConfig,
    *,
    resolves: bool,
    come: Sequence[str] = (),
    gone: Sequence[str] = (),
) -> None:
    """Both files, in `place`, of a container that runs and has come to the addresses `come` or left those in `gone`.
    `network` has its names, and with `resolves` all there is that knows the names of others."""
    if resolves:
        _rewrite(place / "resolv.conf", resolv_text(network, config))
    hosts = place / "hosts"
    with open(hosts, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read(MAX_HOSTS)
        if file.read(1):
            log.warning("%s is too long to be changed", hosts)
            return
    _rewrite(hosts, moved_hosts(text, _own(hostname, network.names), come, gone))


def _rewrite(path: Path, text: str) -> None:
    """In place, for the container has this very file; at no time is it empty."""
    with open(path, "r+b") as file:
        file.write(text.encode(errors="surrogateescape"))
        file.truncate()
