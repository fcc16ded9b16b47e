"""Networks, addresses and host ports as rows: what is free, who has it, and that nobody gets it twice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine import connections as attaching
from engine import networks as networking
from engine import userids
from engine.config import ContainerConfig
from engine.connections import Connections
from engine.errors import AlreadyExists, Busy, EngineError, InvalidArgument, NotFound, RuntimeFailure, Unsupported
from engine.events import Journal
from engine.fields import validated
from engine.netconfig import Endpoint, PortSpec
from engine.networks import Networks, host_routes
from engine.runtimes.netbase import Link, Wiring
from engine.runtimes.netfiles import MAX_HOSTS, NetworkMode, RunNetwork, hosts_text, refresh, resolv_text
from engine.runtimes.usernet import UserNetworks
from engine.store.meta import Meta


class Recording:
    """A backend that keeps what it was asked for, and fails on demand."""

    resolves, inside, summary = True, False, "netavark"

    def __init__(self) -> None:
        self.why, self.fail = "", ""
        self.up: dict[str, tuple[Link, ...]] = {}
        self.cleared = threading.Event()
        self.unpublished: list[tuple[str, int]] = []

    def missing(self) -> str:
        return self.why

    def setup(self, wiring: Wiring) -> None:
        if self.fail:
            raise RuntimeFailure(self.fail)
        self.up[wiring.id] = self.up.get(wiring.id, ()) + tuple(wiring.links)

    def teardown(self, wiring: Wiring, *, stays: bool = False) -> None:
        if not stays:
            self.unpublished += [(wiring.id, port.host) for port in wiring.ports]
        self.up[wiring.id] = tuple(link for link in self.up.get(wiring.id, ()) if link not in wiring.links)

    def clear(self, idle: Callable[[], bool]) -> None:
        if idle():
            self.cleared.set()


class Place:
    def __init__(self, place: Path) -> None:
        self.meta = Meta(place / "db.sqlite")
        self.journal = Journal(self.meta)
        self.networks = Networks(self.meta, self.journal)
        self.backend = Recording()
        self.state = place / "state"
        self.connections = Connections(self.meta, self.journal, self.networks, self.backend, self.state)

    def begin(self, id: str, **fields: object) -> RunNetwork:
        setup = self.connections.begin(id, f"name-{id}", "", validated({**fields}))
        setup.wait()
        return setup.network


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("DUTCHMAN_DEFAULT_NETWORK", "dutchman")
    monkeypatch.setattr(attaching.netns, "make", lambda path: path.parent.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(attaching.netns, "remove", lambda path: None)
    monkeypatch.setattr(networking, "host_routes", list)
    made = Place(tmp_path)
    with contextlib.closing(made.meta):
        yield made


def test_networks_are_made_listed_and_removed(place: Place) -> None:
    made = place.networks.create("front", labels={"a": "1"})
    assert (made.subnet, made.gateway, made.subnet6, made.internal) == ("10.89.0.0/24", "10.89.0.1", "", False)
    six = place.networks.create("back", internal=True, ipv6=True)
    assert six.subnet == "10.89.1.0/24" and six.subnet6.startswith("fd") and six.gateway6.endswith("::1")
    own = place.networks.create("own", subnets=("192.168.77.0/28", "fd12::/64"), gateway="192.168.77.9")
    assert own.subnets == (("192.168.77.0/28", "192.168.77.9"), ("fd12::/64", "fd12::1"))
    assert place.networks.names() == ["back", "front", "own"] and len(made.bridge) < 16
    with pytest.raises(AlreadyExists):
        place.networks.create("front")
    place.networks.remove("front")
    with pytest.raises(NotFound):
        place.networks.remove("front")
    lines = [json.loads(line) for line in place.journal.read(0, 1 << 16).splitlines()]
    assert [line["type"] for line in lines] == ["networkCreated"] * 3 + ["networkRemoved"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subnets": ("10.0.0.1/24",)}, "host bits"),
        ({"subnets": ("10.0.0.0/30",)}, "cannot be a network"),
        ({"subnets": ("127.0.0.0/24",)}, "cannot be a network"),
        ({"subnets": ("10.1.0.0/24", "10.2.0.0/24")}, "one of IPv4"),
        ({"subnets": ("fe80::/64",)}, "cannot be a network"),
        ({"subnets": ("10.9.0.0/24",), "gateway": "10.8.0.1"}, "gateway"),
        ({"subnets": ("10.9.0.0/24",), "gateway": "x"}, "gateway"),
        ({"driver": "macvlan"}, "driver"),
        ({"labels": {"a=b": "c"}}, "labels"),
    ],
)
def test_what_cannot_be_a_network_is_refused(place: Place, fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        place.networks.create("x", **fields)  # type: ignore[arg-type]
    assert place.networks.names() == []


def test_names_that_mean_something_else_are_no_networks(place: Place) -> None:
    for name in ("host", "none"):
        with pytest.raises(AlreadyExists):
            place.networks.create(name)
    with pytest.raises(InvalidArgument):
        place.networks.create("../x")


def test_subnets_keep_clear_of_each_other_and_of_the_hosts_routes(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "route"
    table.write_text(
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n"
        "tun7 0000590A 00000000 0001 0 0 0 00FEFFFF 0 0 0\n"
    )
    routes = host_routes(table)
    assert [(name, str(net)) for name, net in routes] == [("tun7", "10.89.0.0/23")]
    monkeypatch.setattr(networking, "host_routes", lambda: [("tun7", networking.V4("10.89.0.0/23"))])
    assert place.networks.create("a").subnet == "10.89.2.0/24"
    with pytest.raises(Busy, match="network a"):
        place.networks.create("b", subnets=("10.89.0.0/16",))
    with pytest.raises(Busy, match="tun7"):
        place.networks.create("b", subnets=("10.89.1.0/24",))


def test_a_chosen_subnet_gives_way_to_a_route_that_came_later(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.networks.create("auto")
    place.networks.create("own", subnets=("10.77.0.0/24",))
    later = [("wg0", networking.V4("10.89.0.0/24")), ("wg1", networking.V4("10.77.0.0/16"))]
    monkeypatch.setattr(networking, "host_routes", lambda: later)
    assert place.begin("c1", networks=["auto"]).addresses == ("10.89.1.2",)
    with pytest.raises(Busy, match="wg1"):
        place.begin("c2", networks=["own"])


def test_a_run_gets_addresses_names_and_resolvers(place: Place) -> None:
    place.networks.create("six", ipv6=True)
    got = place.begin("c1", networks={"dutchman": {"aliases": ["db"]}, "six": {"ipv4_address": "10.89.0.9"}})
    assert (
        got.mode is NetworkMode.JOINED and got.addresses[:2] == ("10.89.1.2", "10.89.0.9") and len(got.addresses) == 3
    )
    assert got.resolvers[0] == got.gateway == "10.89.1.1" and len(got.resolvers) == 3
    first, second = place.backend.up["c1"]
    assert first.interface == "eth0" and first.aliases == ("db", "c1") and second.interface == "eth1"
    assert [item.network for item in place.connections.endpoints.addresses("c1")] == ["dutchman", "six"]
    place.connections.release("c1")
    assert place.backend.up["c1"] == () and place.connections.endpoints.addresses("c1") == []
    place.connections.release("c1")


def test_addresses_that_cannot_be_are_refused(place: Place) -> None:
    place.networks.create("n", subnets=("10.5.0.0/29",))
    place.begin("c1", networks={"n": {"ipv4_address": "10.5.0.2"}})
    for address, kind in (
        ("10.5.0.2", Busy),
        ("10.5.0.1", Busy),
        ("10.6.0.1", InvalidArgument),
        ("10.5.0.7", InvalidArgument),
    ):
        with pytest.raises(kind, match=address):
            place.begin("c2", networks={"n": {"ipv4_address": address}})
    with pytest.raises(InvalidArgument, match="no IPv6"):
        place.begin("c2", networks={"n": {"ipv6_address": "fd00::5"}})
    for number in range(3, 7):
        place.begin(f"d{number}", networks=["n"])
    with pytest.raises(EngineError, match="no address is left"):
        place.begin("e", networks=["n"])
    assert len(place.meta.query("SELECT * FROM connections")) == 5  # what was refused took nothing


def test_nobody_gets_an_address_twice(place: Place) -> None:
    place.networks.create("n")
    failed: list[BaseException] = []

    def many(first: int) -> None:
        try:
            for number in range(first, first + 10):
                place.begin(f"c{number}", networks=["n"], ports=["80"])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=many, args=(base,)) for base in range(0, 80, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    rows = place.meta.query("SELECT address FROM endpoints")
    assert len(rows) == len({row["address"] for row in rows}) == 80
    ports = {place.connections.endpoints.ports(f"c{number}")[0].host for number in range(80)}
    assert len(ports) == 80 and 0 not in ports


def test_a_host_port_in_use_is_named(place: Place) -> None:
    with socket.socket() as listening, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiving:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        receiving.bind(("127.0.0.1", 0))
        for port, protocol in ((listening.getsockname()[1], "tcp"), (receiving.getsockname()[1], "udp")):
            with pytest.raises(Busy, match=f"ports: host port {port}/{protocol}.* address already in use"):
                place.begin("c1", ports=[f"127.0.0.1:{port}:80/{protocol}"])
        taken = listening.getsockname()[1]
        last = min(taken + 9, 65535)
        place.begin("c2", ports=[f"127.0.0.1:{taken}-{last}:80"])
        assert place.connections.endpoints.ports("c2")[0].host in range(taken + 1, last + 1)
    with pytest.raises(Busy, match="has no such address"):
        place.begin("c3", ports=["203.0.113.7:8080:80"])
    free = place.connections.endpoints.ports("c2")[0].host
    with pytest.raises(Busy, match=f"host port {free}/tcp is published by name-c2"):
        place.begin("c3", ports=[f"{free}:80"])
    place.begin("c3", ports=[f"{free}:80/udp"])
    place.connections.release("c2")
    place.begin("c4", ports=[f"{free}:80"])


def test_without_a_backend_there_is_loopback_for_who_did_not_ask_for_more(place: Place) -> None:
    place.backend.why = "netavark is not installed"
    assert place.begin("c1") == RunNetwork()
    assert place.begin("c2", networks=["none"]) == RunNetwork()
    assert place.begin("c3", networks=["host"]).mode is NetworkMode.HOST
    with pytest.raises(Unsupported, match="networks: netavark is not installed") as caught:
        place.begin("c4", networks=["dutchman"])
    assert "apt-get install" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="ports: netavark"):
        place.begin("c4", ports=["80:80"])
    assert place.connections.summary() == "loopback only: netavark is not installed"


def test_a_setup_that_fails_says_so_and_leaves_nothing(place: Place) -> None:
    place.backend.fail = "netavark setup: no bridge"
    setup = place.connections.begin("c1", "web", "", ContainerConfig())
    with pytest.raises(RuntimeFailure, match="no bridge"):
        setup.wait()
    place.connections.release("c1")
    assert not place.meta.query("SELECT * FROM endpoints") and not place.meta.query("SELECT * FROM connections")


def test_ports_are_published_as_long_as_a_network_of_the_start_is_left(place: Place, tmp_path: Path) -> None:
    for name in ("front", "back", "later"):
        place.networks.create(name)
    place.begin("c", networks=["front", "back"], ports=["8080:80"])
    for name in ("resolv.conf", "hosts"):
        (tmp_path / name).touch()
    config = validated({"networks": ["front", "back"]})
    place.connections.connect("c", "name-c", "later", Endpoint(), tmp_path, config)
    for network, published in (("front", True), ("back", False), ("later", False)):
        place.connections.disconnect("c", "name-c", network, tmp_path, config)
        assert bool(place.connections.endpoints.ports("c")) is published
        assert place.backend.unpublished == ([] if published else [("c", 8080)])


def test_what_is_over_is_taken_down_by_the_next_daemon(place: Place) -> None:
    for id in ("a", "b"):
        place.begin(id)
    later = Connections(place.meta, place.journal, place.networks, place.backend, place.state)
    later.reconcile({"b"})
    later.close()
    assert not place.backend.up["a"] and place.backend.up["b"]
    assert [row["container"] for row in place.meta.query("SELECT container FROM connections")] == ["b"]


def test_what_networks_share_goes_once_nobody_is_connected(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "IDLE", 0.01)
    for id in ("a", "b"):
        place.begin(id)
    place.connections.release("a")
    assert not place.backend.cleared.wait(0.1)
    place.connections.release("b")
    assert place.backend.cleared.wait(10)


def test_hosts_and_resolv_conf() -> None:
    config = validated(
        {
            "extra_hosts": ["db:10.1.1.1", "out:host-gateway"],
            "dns": ["9.9.9.9"],
            "dns_search": ["a.test", "b.test"],
            "dns_options": ["ndots:2"],
        }
    )
    joined = RunNetwork(NetworkMode.JOINED, Path("/n"), ("web",), ("10.89.0.2", "fd00::2"), ("10.89.0.1",), "10.89.0.1")
    lines = hosts_text(joined, "abc", config).splitlines()
    assert lines[-4:] == ["10.1.1.1\tdb", "10.89.0.1\tout", "10.89.0.2\tabc web", "fd00::2\tabc web"]
    assert resolv_text(joined, config) == "nameserver 10.89.0.1\nsearch a.test b.test\noptions ndots:2\n"
    assert "nameserver 9.9.9.9\n" in resolv_text(RunNetwork(), config)
    assert "search" not in resolv_text(joined, validated({"dns_search": ["."]}))
    with pytest.raises(InvalidArgument, match="extra_hosts: out:host-gateway"):
        hosts_text(RunNetwork(), "abc", config)
    assert "127.0.1.1\tabc\n" in hosts_text(RunNetwork(), "abc", ContainerConfig())


def test_hosts_and_resolv_conf_change_in_place_and_keep_what_the_container_wrote(tmp_path: Path) -> None:
    hosts, resolv, config = tmp_path / "hosts", tmp_path / "resolv.conf", validated({"dns": ["9.9.9.9"]})
    hosts.write_bytes(b"10.0.0.2\tabc web\n10.0.0.9 db \xff\r\n10.0.1.2 abc web other")
    resolv.write_text("nameserver 10.0.0.1\nnameserver 10.0.1.1\n")
    files = [os.stat(path).st_ino for path in (hosts, resolv)]
    network = RunNetwork(names=("web",), resolvers=("10.0.0.1",))
    refresh(tmp_path, network, "abc", config, resolves=True, come=("10.0.1.2", "10.0.0.2"))
    whole = b"10.0.0.2\tabc web\n10.0.0.9 db \xff\r\n10.0.1.2 abc web other\n10.0.1.2\tabc web\n"
    assert hosts.read_bytes() == whole and resolv.read_text() == "nameserver 10.0.0.1\n"
    refresh(tmp_path, replace(network, resolvers=()), "abc", config, resolves=True, gone=("10.0.0.2", "10.0.1.2"))
    assert hosts.read_bytes() == b"10.0.0.9 db \xff\r\n10.0.1.2 abc web other\n"
    assert resolv.read_text() == "nameserver 9.9.9.9\n"
    hosts.write_text("#" * (MAX_HOSTS + 1))
    resolv.write_text("")
    refresh(tmp_path, network, "abc", config, resolves=False, come=("10.0.1.2",))
    assert hosts.stat().st_size == MAX_HOSTS + 1 and not resolv.read_text()
    assert files == [os.stat(path).st_ino for path in (hosts, resolv)]


def test_without_root_the_way_out_keeps_its_subnet(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.networks.create("a", subnets=("10.0.2.0/25",))
    monkeypatch.setattr(userids, "rootless", lambda: (1000, 1000))
    with pytest.raises(Busy, match=r"overlaps 10\.0\.2\.0/24 of slirp4netns"):
        place.networks.create("b", subnets=("10.0.2.128/25",))
    assert place.networks.names() == ["a"]


def test_ipv6_subnets_do_not_overlap_either(place: Place) -> None:
    place.networks.create("a", subnets=("fd00:1::/64",))
    with pytest.raises(Busy, match="overlaps fd00:1::/64 of network a"):
        place.networks.create("b", subnets=("fd00::/16",))
    assert place.networks.names() == ["a"]


def test_more_ports_than_there_are_to_choose_from_are_refused(place: Place) -> None:
    with pytest.raises(InvalidArgument, match="at most 28231 host ports"):
        place.begin("c", ports=["1-30000"])
    assert place.connections.endpoints.ports("c") == []


def test_ports_are_bounded(tmp_path: Path, place: Place) -> None:
    with pytest.raises(InvalidArgument, match="more than 65535 ports"):
        validated({"ports": ["1-65535:1-65535", "1-65535:1-65535/udp"]})
    outside = UserNetworks(tmp_path / "state", tmp_path)
    many = [PortSpec(host=1024, host_last=2047, container=1024, container_last=2047)]
    with pytest.raises(InvalidArgument, match="at most 512"):
        outside.setup(Wiring(tmp_path / "netns", "id", "name", [], many, []))
    six = [PortSpec(host_ip="::1", host=80, host_last=80, container=80, container_last=80)]
    with pytest.raises(Unsupported, match="::1: an engine without root publishes no ports at IPv6"):
        outside.setup(Wiring(tmp_path / "netns", "id", "name", [], six, []))
    assert list(tmp_path.glob("slirp*")) == []
