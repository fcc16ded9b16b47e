"""Host ports of a run: those asked for when they are free, others chosen. Floor 2.

Only here: what "in use" means: another container publishes it, or a program of this host listens there. No state.
"""

from __future__ import annotations

import errno
import json
import random
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from engine.errors import Busy, InvalidArgument
from engine.netconfig import PortSpec, is_v6
from engine.store.meta import Meta

FIRST, LAST = 32768, 60999  # host ports the engine chooses from
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}  # host ports of which can be tried; sctp's cannot


def choose_ports(db: sqlite3.Connection, wanted: Sequence[PortSpec], v6: bool) -> list[PortSpec]:
    """Each with its host port decided. Busy names the one that is taken."""
    taken = [
        (row["name"], port)
        for row in db.execute("SELECT name, ports FROM connections")
        for port in read_ports(row["ports"])
    ]
    out: list[PortSpec] = []
    for spec in wanted:
        if is_v6(spec.host_ip) and not v6:
            raise InvalidArgument(f"ports: {spec}: no network of the container has IPv6", at=str(spec))
        if spec.host and spec.host_last - spec.host + 1 == spec.count:
            candidates: Iterable[int] = (spec.host,)
        elif spec.host:
            candidates = range(spec.host, spec.host_last + 1)
        else:
            candidates = _random_ports(spec.count)
        why = ""
        for first in candidates:
            chosen = spec.model_copy(update={"host": first, "host_last": first + spec.count - 1})
            why = why if (now := _in_use(chosen, taken, v6)) and why else now
            if not now:
                out.append(chosen)
                taken.append(("this container", chosen))
                break
        else:
            raise Busy(f"ports: {why}", at=str(spec), hint="publish another host port, or stop what has this one")
    return out


def read_ports(text: str) -> list[PortSpec]:
    return [PortSpec.model_validate(item) for item in json.loads(text)]


def all_ports(meta: Meta) -> dict[str, list[PortSpec]]:
    """What is published now, every host port decided, by container id."""
    rows = meta.query("SELECT container, ports FROM connections")
    return {row["container"]: ports for row in rows if (ports := read_ports(row["ports"]))}


def _random_ports(count: int) -> Iterator[int]:
    """Some first ports to try, of the range Docker takes. InvalidArgument when that is too small."""
    if count > LAST - FIRST:
        raise InvalidArgument(
            f"ports: the engine chooses at most {LAST - FIRST} host ports in a row, not {count}",
            at=str(count),
            hint="say which: HOST-LAST:CONTAINER-LAST",
        )
    for _ in range(64):
        yield random.randrange(FIRST, LAST - count + 1)


def _in_use(spec: PortSpec, taken: Iterable[tuple[str, PortSpec]], v6: bool) -> str:
    """Why these host ports cannot be published, '' when they can."""
    for name, other in taken:
        same = not spec.host_ip or not other.host_ip or spec.host_ip == other.host_ip
        same = same or (spec.host_ip in ("0.0.0.0", "::") or other.host_ip in ("0.0.0.0", "::"))
        if same and spec.protocol == other.protocol and spec.host <= other.host_last and other.host <= spec.host_last:
            return f"host port {spec.host}/{spec.protocol} is published by {name} ({other})"
    if spec.protocol not in KINDS:
        return ""
    families = [spec.host_ip] if spec.host_ip else ["0.0.0.0", "::"] if v6 else ["0.0.0.0"]
    for address in families:
        for port in range(spec.host, spec.host_last + 1):
            if why := _bound(address, port, spec.protocol):
                return f"host port {port}/{spec.protocol}{f' at {address}' if spec.host_ip else ''}: {why}"
    return ""


def _bound(address: str, port: int, protocol: str) -> str:
    """Why a program could not listen there, '' when it could."""
    family = socket.AF_INET6 if is_v6(address) else socket.AF_INET
    with socket.socket(family, KINDS[protocol]) as trial:
        if protocol == "tcp":
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that only linger do not count
        if family == socket.AF_INET6:
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            trial.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "address already in use"
            return "this host has no such address" if error.errno == errno.EADDRNOTAVAIL else str(error.strerror)
    return ""
