"""The rows that say who is in which network: `connections`, of runs, and `endpoints`, their interfaces. Floor 2.

Only here: these tables, and which addresses and host ports a run gets: in one transaction, so nobody else gets the
same. connections.py makes of them what they say. Thread-safe.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.config import ContainerConfig
from engine.errors import AlreadyExists, InvalidArgument
from engine.events import Journal
from engine.netconfig import LABEL, Endpoint, PortSpec
from engine.networks import Network, Networks
from engine.ports import choose_ports, read_ports
from engine.runtimes.netbase import Link
from engine.store.meta import Meta


@dataclass(frozen=True, slots=True)
class Address:
    """Where a container is in one network now."""

    network: str
    interface: str
    address: str
    address6: str


class Endpoints:
    def __init__(self, meta: Meta, journal: Journal, networks: Networks) -> None:
        self._meta = meta
        self._journal = journal
        self._networks = networks

    # --- reading ------------------------------------------------------------------------------------------------

    def addresses(self, id: str) -> list[Address]:
        """Of a container, in the order of its interfaces; empty unless it runs in networks."""
        return [Address(row["network"], row["interface"], row["address"], row["address6"]) for row in self.rows(id)]

    def ports(self, id: str) -> list[PortSpec]:
        """What is published now, every host port decided. It goes with the last of the networks of the start."""
        started = "SELECT 1 FROM endpoints AS e WHERE e.container = c.container AND e.started"
        row = self._meta.row(f"SELECT ports FROM connections AS c WHERE container = ? AND EXISTS ({started})", (id,))
        return read_ports(row["ports"]) if row is not None else []

    def rows(self, id: str) -> list[sqlite3.Row]:
        return self._meta.query(
            "SELECT * FROM endpoints WHERE container = ? ORDER BY length(interface), interface", (id,)
        )

    def run(self, id: str) -> sqlite3.Row | None:
        """The row of a container that has a network of its own: its name, its ports, its resolvers."""
        return self._meta.row("SELECT * FROM connections WHERE container = ?", (id,))

    def nobody(self) -> bool:
        return self._meta.row("SELECT 1 FROM connections") is None

    def containers(self) -> set[str]:
        return {row["container"] for row in self._meta.query("SELECT container FROM connections")}

    def alone(self, container: str, network_id: str) -> bool:
        """Whether no other container is in that network."""
        others = self._meta.row(
            "SELECT 1 FROM endpoints AS e JOIN networks AS n ON n.name = e.network WHERE n.id = ? AND e.container != ?",
            (network_id, container),
        )
        return others is None

    def added(self) -> list[tuple[str, ...]]:  # (container, network) of connections made while it ran
        return [*map(tuple, self._meta.query("SELECT container, network FROM endpoints WHERE NOT started"))]

    def link(self, item: sqlite3.Row) -> Link:
        network = self._networks.get(item["network"])
        addresses = (item["address"], item["address6"])
        return _link(network, item["interface"], addresses, json.loads(item["aliases"]), item["mac"])

    # --- writing ------------------------------------------------------------------------------------------------

    def allocate(
        self, id: str, name: str, hostname: str, wanted: Mapping[str, Endpoint], config: ContainerConfig
    ) -> tuple[list[Link], list[PortSpec]]:
        """Addresses and ports of a run. Busy names the one that is taken; InvalidArgument."""
        with self._meta.tx() as db:
            known = [self._networks.usable(db, item) for item in wanted]
            if config.ports and all(item.internal for item in known):
                raise InvalidArgument("ports: an internal network cannot publish any", at="ports")
            ports = choose_ports(db, config.ports, any(item.subnet6 for item in known))
            db.execute(
                "INSERT INTO connections (container, name, ports, dns) VALUES (?, ?, ?, ?)",
                (id, name, json.dumps([port.model_dump() for port in ports]), json.dumps(config.dns)),
            )
            links = []
            for place, (network, item) in enumerate(zip(known, wanted.values(), strict=True)):
                names = dict.fromkeys((*item.aliases, id[:12], hostname))
                aliases = tuple(alias for alias in names if alias != name and LABEL.match(alias))
                item = item.model_copy(update={"aliases": aliases})
                links.append(self._add(db, id, name, network, item, f"eth{place}", started=True))
        return links, ports

    def _add(
        self,
        db: sqlite3.Connection,
        id: str,
        name: str,
        network: Network,
        item: Endpoint,
        interface: str,
        started: bool,
    ) -> Link:
        four, six = self._networks.free_addresses(db, network, item.ipv4_address, item.ipv6_address)
        db.execute(
            "INSERT INTO endpoints (container, network, interface, address, address6, mac, aliases, started) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (id, network.name, interface, four, six, item.mac_address, json.dumps(item.aliases), int(started)),
        )
        data = {"name": network.name, "container": name, "address": four}
        self._journal.append("networkConnected", network.object, data | ({"address6": six} if six else {}))
        return _link(network, interface, (four, six), item.aliases, item.mac_address)

    def add(self, id: str, name: str, network: str, item: Endpoint) -> Link:
        """One more network for a container that runs. AlreadyExists."""
        with self._meta.tx() as db:
            found = self._networks.usable(db, network)
            endpoints = db.execute("SELECT * FROM endpoints WHERE container = ?", (id,)).fetchall()
            if any(there["network"] == network for there in endpoints):
                raise AlreadyExists(f"{name} is connected to {network}", at=network)
            used = {there["interface"] for there in endpoints}
            interface = next(f"eth{place}" for place in range(len(used) + 1) if f"eth{place}" not in used)
            item = item.model_copy(update={"aliases": tuple(dict.fromkeys((*item.aliases, id[:12])))})
            return self._add(db, id, name, found, item, interface, started=False)

    def remove(self, run: sqlite3.Row, items: Sequence[sqlite3.Row], *, over: bool) -> None:
        """What those endpoints of a run stood for is gone; with `over` the run is."""
        with self._meta.tx() as db:
            for item in items:
                data = {"name": item["network"], "container": run["name"]}
                self._journal.append("networkDisconnected", f"network/{item['network']}", data)
                db.execute(
                    "DELETE FROM endpoints WHERE container = ? AND network = ?", (run["container"], item["network"])
                )
            if over:
                db.execute("DELETE FROM connections WHERE container = ?", (run["container"],))


def _link(network: Network, interface: str, addresses: Sequence[str], aliases: Sequence[str], mac: str) -> Link:
    return Link(
        network.id,
        network.bridge,
        network.subnets,
        network.internal,
        interface,
        tuple(filter(None, addresses)),
        tuple(aliases),
        mac,
    )
