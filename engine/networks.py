"""Networks: bridges containers share, with subnets, and the addresses taken in them. Floor 2.

Only here: the rows of `networks`, the choice of subnets, and which address is free. Nothing here touches the host but
to read its routes: bridges and rules exist while containers are connected (connections.py). Thread-safe; readers see
the last commit and never wait.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network as V4
from ipaddress import IPv6Network as V6
from pathlib import Path
from typing import Any

from engine import userids
from engine.errors import AlreadyExists, Busy, InvalidArgument, NoSpace, NotFound
from engine.events import Journal
from engine.model import check_name
from engine.netconfig import HOST, NONE
from engine.runtimes import slirp
from engine.store.meta import Meta
from engine.volumes import check_labels

DEFAULT = "dutchman"  # what containers whose config names no network are in
POOL = V4("10.89.0.0/16")
POOL_BITS = 24
LEAST_BITS, MOST_BITS = 8, 29  # prefixes a network may have


@dataclass(frozen=True, slots=True)
class Network:
    name: str
    id: str
    driver: str
    subnet: str
    gateway: str
    subnet6: str
    gateway6: str
    internal: bool
    chosen: bool
    labels: Mapping[str, str]
    created_ns: int

    @property
    def object(self) -> str:
        return f"network/{self.name}"

    @property
    def bridge(self) -> str:
        """The interface on the host; at most 15 characters (IFNAMSIZ)."""
        return f"dutch{self.id}"

    @property
    def subnets(self) -> tuple[tuple[str, str], ...]:
        """(subnet, gateway), IPv4 first."""
        first = (self.subnet, self.gateway)
        return (first, (self.subnet6, self.gateway6)) if self.subnet6 else (first,)


def default_network() -> str:
    """$DUTCHMAN_DEFAULT_NETWORK: the network of containers whose config names none; `none` for loopback alone."""
    return os.environ.get("DUTCHMAN_DEFAULT_NETWORK") or DEFAULT


def _network(row: Any) -> Network:
    return Network(
        row["name"],
        row["id"],
        row["driver"],
        row["subnet"],
        row["gateway"],
        row["subnet6"],
        row["gateway6"],
        bool(row["internal"]),
        bool(row["chosen"]),
        json.loads(row["labels"]),
        row["created_ns"],
    )


def host_routes(table: Path = Path("/proc/net/route")) -> list[tuple[str, V4]]:
    """(interface, destination) of this host's IPv4 routes, the default ones left out."""
    out = []
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        words = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(words[place]), "little") for place in (1, 7))
        if mask:
            out.append((words[0], V4((address, bin(mask).count("1")), strict=False)))
    return out


class Networks:
    """The networks of a store."""

    def __init__(self, meta: Meta, journal: Journal) -> None:
        self._meta = meta
        self._journal = journal

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Network:
        row = self._meta.row("SELECT * FROM networks WHERE name = ?", (name,))
        if row is None:
            raise NotFound(f"no network named {name[:140]!r}", at=name[:140], hint="mkdir networks/NAME creates one")
        return _network(row)

    def all(self) -> list[Network]:
        """Sorted by name."""
        return [_network(row) for row in self._meta.query("SELECT * FROM networks ORDER BY name")]

    def names(self) -> list[str]:
        return [row["name"] for row in self._meta.query("SELECT name FROM networks ORDER BY name")]

    def users(self, name: str) -> list[str]:
        """Names of the containers whose config names it or that are connected, sorted."""
        rows = self._meta.query(
            "SELECT c.name, c.config, e.network FROM containers AS c "
            "LEFT JOIN endpoints AS e ON e.container = c.id AND e.network = ? ORDER BY c.name",
            (name,),
        )
        return [row["name"] for row in rows if row["network"] or _names(row["config"], name)]

    def connected(self, name: str) -> list[str]:
        """Names of the containers that are connected now, sorted."""
        rows = self._meta.query(
            "SELECT c.name FROM endpoints AS e JOIN containers AS c ON c.id = e.container WHERE e.network = ? "
            "ORDER BY c.name",
            (name,),
        )
        return [row["name"] for row in rows]

    # --- making and removing ------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        driver: str = "bridge",
        subnets: tuple[str, ...] = (),
        gateway: str = "",
        internal: bool = False,
        ipv6: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Network:
        """A network nobody is in. AlreadyExists, or InvalidArgument and Busy naming what cannot be."""
        check_name(name, "network")
        if name in (HOST, NONE):
            raise AlreadyExists(f"{name} is no network of the engine's but stands for the host's, or none", at=name)
        if driver != "bridge":
            raise InvalidArgument(f"driver: unknown driver {driver!r}", at=driver[:80], hint="bridge")
        labels = dict(labels or {})
        check_labels(labels)
        four, six = _subnets(subnets)
        with self._meta.tx() as db:
            if db.execute("SELECT 1 FROM networks WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"a network named {name} exists", at=name)
            chosen = four is None
            four = self._free_subnet(db) if four is None else self._check_subnet(db, four)
            if ipv6 and six is None:
                six = V6((b"\xfd" + secrets.token_bytes(5) + bytes(10), 64))  # RFC 4193: 40 random bits
            if six is not None:
                self._check_subnet6(db, six)
            first = _gateway(gateway, four)
            row = {
                "name": name,
                "id": secrets.token_hex(5),
                "driver": driver,
                "subnet": str(four),
                "gateway": first,
                "subnet6": "" if six is None else str(six),
                "gateway6": "" if six is None else str(six[1]),
                "internal": int(internal),
                "chosen": int(chosen and not gateway),
                "labels": json.dumps(labels),
                "created_ns": time.time_ns(),
            }
            db.execute(
                f"INSERT INTO networks ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", (*row.values(),)
            )
            data = {key: row[key] for key in ("name", "subnet", "subnet6") if row[key]}
            self._journal.append("networkCreated", f"network/{name}", {**data, "internal": internal})
        return self.get(name)

    def remove(self, name: str) -> None:
        """Busy, naming the containers, while one's config names it or one is connected."""
        with self._meta.tx() as db:
            self.get(name)
            if users := self.users(name):
                raise Busy(
                    f"network {name} is used by {', '.join(users[:10])}{' …' if len(users) > 10 else ''}",
                    at=name,
                    hint="remove those containers, or take it out of their config/networks",
                )
            if db.execute("SELECT 1 FROM endpoints WHERE network = ?", (name,)).fetchone():
                raise Busy(f"network {name} is being taken down", at=name, hint="try again in a moment")
            if not db.execute("DELETE FROM networks WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"no network named {name[:140]!r}", at=name[:140])
            db.execute("DELETE FROM failures WHERE object = ?", (f"network/{name}",))
            self._journal.append("networkRemoved", f"network/{name}", {"name": name})

    def prune(self) -> list[str]:
        """Remove every network that no container uses, but for the default one; their names."""
        removed = []
        for name in self.names():
            if name == default_network() or self.users(name):
                continue
            try:
                self.remove(name)
            except (Busy, NotFound):
                continue  # taken into use, or removed, since we looked
            removed.append(name)
        return removed

    def set_labels(self, name: str, labels: Mapping[str, str]) -> None:
        check_labels(labels)
        with self._meta.tx() as db:
            changed = db.execute("UPDATE networks SET labels = ? WHERE name = ?", (json.dumps(dict(labels)), name))
            if not changed.rowcount:
                raise NotFound(f"no network named {name[:140]!r}", at=name[:140])
            self._journal.append("networkConfigured", f"network/{name}", {"name": name, "labels": dict(labels)})

    def ensure_default(self) -> None:
        """Make the default network when it is not there."""
        name = default_network()
        if name != NONE and name != HOST and name not in self.names():
            try:
                self.create(name)
            except AlreadyExists:
                pass  # by another start at the same time

    # --- subnets ------------------------------------------------------------------------------------------------

    def _taken(self, db: sqlite3.Connection, but: str = "") -> Iterator[tuple[str, V4]]:
        if userids.rootless() is not None:
            yield "slirp4netns, the way out without root", V4(slirp.NETWORK)
        for row in db.execute("SELECT name, subnet FROM networks"):
            if row["name"] != but:
                yield f"network {row['name']}", V4(row["subnet"])

    def _free_subnet(self, db: sqlite3.Connection, but: str = "") -> V4:
        """The first of the pool that overlaps neither another network nor a route of the host."""
        taken = [net for _, net in self._taken(db, but)] + [net for _, net in host_routes()]
        for subnet in POOL.subnets(new_prefix=POOL_BITS):
            if not any(subnet.overlaps(net) for net in taken):
                return subnet
        raise NoSpace(f"no free subnet is left in {POOL}", hint="give one: subnet=10.1.2.0/24")

    def _check_subnet(self, db: sqlite3.Connection, subnet: V4) -> V4:
        for owner, net in self._taken(db):
            if subnet.overlaps(net):
                raise Busy(f"subnet {subnet} overlaps {net} of {owner}", at=str(subnet))
        for interface, net in host_routes():
            if subnet.overlaps(net):
                raise Busy(f"subnet {subnet} overlaps {net}, which this host reaches by {interface}", at=str(subnet))
        return subnet

    @staticmethod
    def _check_subnet6(db: sqlite3.Connection, subnet: V6) -> None:
        for row in db.execute("SELECT name, subnet6 FROM networks WHERE subnet6 != ''"):
            if subnet.overlaps(V6(row["subnet6"])):
                raise Busy(f"subnet {subnet} overlaps {row['subnet6']} of network {row['name']}", at=str(subnet))

    def usable(self, db: sqlite3.Connection, name: str) -> Network:
        """The network, about to get a container. While nobody is in it, its subnet may have come into use on the host
        by something else: then another is chosen, or Busy names the interface."""
        network = self.get_in(db, name)
        if db.execute("SELECT 1 FROM endpoints WHERE network = ?", (name,)).fetchone():
            return network
        subnet = V4(network.subnet)
        for interface, net in host_routes():
            if interface != network.bridge and subnet.overlaps(net):
                if not network.chosen:
                    raise Busy(
                        f"networks: the subnet {subnet} of {name} is in use on this host by {interface}", at=name
                    )
                other = self._free_subnet(db, name)
                db.execute(
                    "UPDATE networks SET subnet = ?, gateway = ? WHERE name = ?", (str(other), str(other[1]), name)
                )
                return self.get_in(db, name)
        return network

    @staticmethod
    def get_in(db: sqlite3.Connection, name: str) -> Network:
        """As `get`, inside a transaction."""
        row = db.execute("SELECT * FROM networks WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFound(f"networks: there is no network {name!r}", at=name, hint=f"mkdir networks/{name}")
        return _network(row)

    # --- addresses ----------------------------------------------------------------------------------------------

    @staticmethod
    def free_addresses(db: sqlite3.Connection, network: Network, four: str, six: str) -> tuple[str, str]:
        """An IPv4 and, where the network has one, an IPv6 address: those asked for, else the lowest free ones."""
        rows = db.execute("SELECT address, address6 FROM endpoints WHERE network = ?", (network.name,)).fetchall()
        taken = (
            {row["address"] for row in rows} | {row["address6"] for row in rows} | {network.gateway, network.gateway6}
        )
        if six and not network.subnet6:
            raise InvalidArgument(f"networks: {network.name} has no IPv6 for ipv6_address", at=six)
        out = []
        for (subnet, _), wanted in zip(network.subnets, (four, six), strict=False):
            net = ipaddress.ip_network(subnet)
            if wanted:
                address = ipaddress.ip_address(wanted)
                if address not in net or address in (net.network_address, net.broadcast_address):
                    raise InvalidArgument(f"networks: {wanted} is not of {subnet} ({network.name})", at=wanted)
                if wanted in taken:
                    raise Busy(f"networks: {wanted} is taken in {network.name}", at=wanted)
                out.append(wanted)
                continue
            found = next((str(item) for item in net.hosts() if str(item) not in taken), None)
            if found is None:
                raise NoSpace(f"networks: no address is left in {subnet} ({network.name})", at=network.name)
            out.append(found)
        return out[0], out[1] if len(out) > 1 else ""


def _names(config: str, network: str) -> bool:
    return network in json.loads(config).get("networks", {})


def _subnets(texts: tuple[str, ...]) -> tuple[V4 | None, V6 | None]:
    """At most one of each family. InvalidArgument names what is wrong."""
    four: V4 | None = None
    six: V6 | None = None
    for text in texts:
        try:
            net = ipaddress.ip_network(text)
        except ValueError as error:
            raise InvalidArgument(f"subnet: {error}", at=text[:80], hint="10.1.2.0/24, say") from None
        if isinstance(net, V4) and four is None:
            if not LEAST_BITS <= net.prefixlen <= MOST_BITS or net.is_loopback or net.is_multicast:
                raise InvalidArgument(f"subnet: {text} cannot be a network of containers", at=text)
            four = net
        elif isinstance(net, V6) and six is None:
            if not 16 <= net.prefixlen <= 120 or net.is_multicast or net.is_link_local:
                raise InvalidArgument(f"subnet: {text} cannot be a network of containers", at=text)
            six = net
        else:
            raise InvalidArgument("subnet: one of IPv4 and one of IPv6 at most", at=text[:80])
    return four, six


def _gateway(text: str, subnet: V4) -> str:
    if not text:
        return str(subnet[1])
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError as error:
        raise InvalidArgument(f"gateway: {error}", at=text[:80]) from None
    if address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
        raise InvalidArgument(f"gateway: {text} is not an address of {subnet}", at=text)
    return str(address)
