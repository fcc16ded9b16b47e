"""networks/: bridges that containers share. Floor 5."""

from __future__ import annotations

from typing import Any

from engine.connecting import connect as connect_container
from engine.connecting import disconnect as disconnect_container
from engine.errors import InvalidArgument, NotFound
from fdfs.ctl import Call, Verb, table
from fdfs.entry import Dir, File, Link, Row
from fdfs.tree.errors import error_file
from fdfs.tree.text import line, lines, pairs, stamp

FLAGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def object_of(engine: Any, name: str) -> str:
    return f"network/{name}"


def networks_object(engine: Any) -> str:
    return "networks"


# --- values -----------------------------------------------------------------------------------------------------


def subnet(engine: Any, name: str) -> str:
    return lines(item for item, _ in engine.networks.get(name).subnets)


def gateway(engine: Any, name: str) -> str:
    return lines(item for _, item in engine.networks.get(name).subnets)


def driver(engine: Any, name: str) -> str:
    return line(engine.networks.get(name).driver)


def internal(engine: Any, name: str) -> str:
    return "true\n" if engine.networks.get(name).internal else "false\n"


def bridge(engine: Any, name: str) -> str:
    return line(engine.networks.get(name).bridge)


def created(engine: Any, name: str) -> str:
    return stamp(engine.networks.get(name).created_ns)


def labels(engine: Any, name: str) -> str:
    return lines(f"{key}={value}" for key, value in engine.networks.get(name).labels.items())


def set_labels(engine: Any, name: str, text: str) -> None:
    engine.networks.set_labels(name, pairs(text))


def used_by(engine: Any, name: str) -> str:
    return lines(engine.networks.users(name))


def _connected(engine: Any, name: str) -> list[str]:
    return list(engine.networks.connected(name))


def _member(engine: Any, name: str, container: str) -> Row | None:
    return MEMBER if container in _connected(engine, name) else None


def member_target(engine: Any, name: str, container: str) -> str:
    return f"../../../containers/{container}"


# --- of containers ----------------------------------------------------------------------------------------------


def container_ip(engine: Any, name: str) -> str:
    found = engine.connections.endpoints.addresses(engine.containers.get(name).id)
    return lines(address for item in found for address in (item.address, item.address6) if address)


def container_addresses(engine: Any, name: str) -> str:
    found = engine.connections.endpoints.addresses(engine.containers.get(name).id)
    return lines(f"{item.network} {address}" for item in found for address in (item.address, item.address6) if address)


def container_ports(engine: Any, name: str) -> str:
    out = []
    for port in engine.connections.endpoints.ports(engine.containers.get(name).id):
        address = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "0.0.0.0"
        for step in range(port.count):
            out.append(f"{port.container + step}/{port.protocol} {address}:{port.host + step}")
    return lines(out)


# --- verbs ------------------------------------------------------------------------------------------------------


def _flag(call: Call, name: str) -> bool:
    text = call.options.get(name, "false")
    if text not in FLAGS:
        raise InvalidArgument(f"{name}: true or false expected, not {text[:80]!r}", at=f"{name}={text}"[:80])
    return FLAGS[text]


def create(engine: Any, call: Call) -> str:
    options = call.options
    engine.networks.create(
        call.args[0],
        driver=options.get("driver", "bridge"),
        subnets=tuple(options.get("subnet", "").split()),
        gateway=options.get("gateway", ""),
        internal=_flag(call, "internal"),
        ipv6=_flag(call, "ipv6"),
        labels=pairs(options.get("label", "")),
    )
    return call.args[0]


def make(engine: Any, name: str) -> None:
    engine.networks.create(name)


def remove(engine: Any, name: str, call: Call | None = None) -> None:
    engine.networks.remove(name)


def prune(engine: Any, call: Call) -> str:
    return "\n".join(engine.networks.prune())


def connect(engine: Any, name: str, call: Call) -> None:
    aliases = tuple(filter(None, call.options.get("alias", "").split("\n")))
    parts = engine.containers, engine.networks, engine.connections
    connect_container(*parts, call.args[0], name, aliases, call.options.get("ip", ""))


def disconnect(engine: Any, name: str, call: Call) -> None:
    disconnect_container(engine.containers, engine.networks, engine.connections, call.args[0], name)


# --- rows -------------------------------------------------------------------------------------------------------


def _names(engine: Any) -> list[str]:
    return list(engine.networks.names())


def _find(engine: Any, name: str) -> Row | None:
    try:
        engine.networks.get(name)
    except (NotFound, InvalidArgument):
        return None
    return NETWORK


MEMBER = Link(name="<name>", doc="a container that is connected now", target=member_target)

CONTAINER_FILES = (
    File(name="ip", doc="its addresses while it runs in networks, one per line", show=container_ip),
    File(name="addresses", doc="the same, each after the name of its network", show=container_addresses),
    File(name="ports", doc="what is published now: 80/tcp 0.0.0.0:8080", show=container_ports),
)

NETWORK = Dir(
    name="<name>",
    doc="one network",
    rmdir=remove,
    object=object_of,
    rows=(
        File(name="subnet", doc="its addresses: of IPv4, and of IPv6 where it has that, one per line", show=subnet),
        File(name="gateway", doc="the host's address in each", show=gateway),
        File(name="driver", doc="bridge", show=driver),
        File(name="internal", doc="true: no way out, and in only from the host", show=internal),
        File(name="bridge", doc="its interface on the host while a container is connected", show=bridge),
        File(name="labels", doc="KEY=VALUE lines", show=labels, set=set_labels, object=object_of),
        File(name="created", doc="when it was created", show=created),
        File(name="used_by", doc="containers that are connected or whose config names it, one per line", show=used_by),
        Dir(name="containers", doc="those connected now", names=_connected, find=_member, kinds=(MEMBER,)),
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            verbs=table(
                Verb(
                    name="connect",
                    args="CONTAINER [alias=…]* [ip=…]",
                    doc="into this network too, at once when it runs",
                    run=connect,
                ),
                Verb(name="disconnect", args="CONTAINER", doc="out of this network", run=disconnect),
                Verb(name="remove", doc="delete it, as rmdir does", run=remove),
            ),
        ),
        error_file(object_of),
    ),
)

NETWORKS = Dir(
    name="networks",
    doc="networks; mkdir creates one, rmdir removes it",
    names=_names,
    find=_find,
    kinds=(NETWORK,),
    mkdir=make,
    object=networks_object,
    rows=(
        File(
            name="ctl",
            doc="create and clean up networks",
            object=networks_object,
            verbs=table(
                Verb(
                    name="create",
                    args="NAME [subnet=…]* [gateway=…] [internal=…] [ipv6=…] [label=…]* [driver=…]",
                    doc="a network; internal=true: no way out; ipv6=true: with IPv6 addresses too",
                    run=create,
                ),
                Verb(name="prune", doc="remove every network no container uses, but the default one", run=prune),
            ),
        ),
        error_file(networks_object),
    ),
)
