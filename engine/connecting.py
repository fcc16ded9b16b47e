"""Connecting containers to networks and taking them out, whether they run or not. Floor 3.

Only here: that the config and what is set up change together. A container that runs is connected at once; its config
changes last, so that what was refused is nowhere. Stateless.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from pydantic import ValidationError

from engine import fields
from engine.config import ContainerConfig
from engine.connections import Connections
from engine.containers import Containers
from engine.errors import AlreadyExists, Busy, EngineError, InvalidArgument, NotFound
from engine.lifecycle import ALIVE, State
from engine.model import one_line
from engine.netconfig import HOST, NONE, Endpoint, is_v6
from engine.networks import Networks, default_network
from engine.records import Container

log = logging.getLogger(__name__)


def connect(
    containers: Containers,
    networks: Networks,
    connections: Connections,
    name: str,
    network: str,
    aliases: Sequence[str] = (),
    address: str = "",
) -> None:
    """AlreadyExists when it is connected; Busy when its network is the host's, or none while it runs."""
    container = containers.get(name)
    networks.get(network)
    wanted = _named(container.config)
    if network in wanted:
        raise AlreadyExists(f"{name} is connected to {network}", at=network)
    if HOST in wanted:
        raise Busy(f"{name} has the network of the host", at=network, hint="take host out of its config/networks")
    try:
        item = Endpoint(aliases=tuple(aliases), **{"ipv6_address" if is_v6(address) else "ipv4_address": address})
    except ValidationError as error:
        raise one_line(error, "connect") from error
    after = _more(container, network, item)
    if _runs(container):
        place = containers.logs(name).current.parents[1]
        connections.connect(container.id, name, network, after.networks[network], place, after)
        try:
            for interface in _interfaces(connections, container, network):
                containers.execution.driver_of(container).plug(container.id, interface)
            containers.records.configure(container.id, lambda now: _more(now, network, item))
        except BaseException:
            with suppress(EngineError, OSError):  # what it lacks cannot be taken from it
                _unplug(containers, networks, connections, container, network)
            with suppress(NotFound, Busy):  # it has ended meanwhile, and its connections with it
                connections.disconnect(container.id, name, network, place, container.config)
            raise
        return
    containers.records.configure(container.id, lambda now: _more(now, network, item))


def disconnect(containers: Containers, networks: Networks, connections: Connections, name: str, network: str) -> None:
    """NotFound when it is not connected. Without any network left it has `none`."""
    container = containers.get(name)
    networks.get(network)
    if network not in _named(container.config):
        raise NotFound(f"{name} is not connected to {network}", at=network)
    _leave(containers, networks, connections, container, network)


def _interfaces(connections: Connections, container: Container, network: str) -> list[str]:
    """The one a running container has in a network."""
    return [item.interface for item in connections.endpoints.addresses(container.id) if item.network == network]


def _unplug(
    containers: Containers, networks: Networks, connections: Connections, container: Container, network: str
) -> None:
    """Have whatever runs it let go of its interface there."""
    lengths = [subnet.partition("/")[2] for subnet, _ in networks.get(network).subnets]
    for item in connections.endpoints.addresses(container.id):
        if item.network == network:
            there = zip(filter(None, (item.address, item.address6)), lengths, strict=False)
            addresses = [f"{address}/{length}" for address, length in there]
            containers.execution.driver_of(container).unplug(container.id, item.interface, addresses)


def _leave(
    containers: Containers, networks: Networks, connections: Connections, container: Container, network: str
) -> None:
    """Noted first: `finish` goes on where a killed daemon stopped."""
    records = containers.records
    if _runs(container):
        place = containers.logs(container.name).current.parents[1]
        records.note_leaving(container.id, network)
        try:
            _unplug(containers, networks, connections, container, network)
            connections.disconnect(container.id, container.name, network, place, _less(container, network))
        except Exception:
            records.forget_leaving(container.id, network)
            raise
    records.configure(container.id, lambda now: _less(now, network))
    records.forget_leaving(container.id, network)


def finish(containers: Containers, networks: Networks, connections: Connections) -> None:
    """After a restart: what `disconnect` had begun. The host may have let go while the config still names the network,
    which nobody but the note could tell from one that was added for the next start. And a connection that was made, but
    not recorded, was never acknowledged: it is undone."""
    for id, network in containers.records.leaving():
        try:
            container = containers.records.by_id(id)
            if network in _named(container.config):
                try:
                    _leave(containers, networks, connections, container, network)
                except (NotFound, Busy):  # the host had let go, or the container is ending
                    containers.records.configure(id, partial(_less, network=network))
                log.warning("container %s leaves network %s, as was begun", container.name, network)
        except (EngineError, OSError) as error:
            log.warning("container %s, network %s: leaving it was begun and is not finished: %s", id, network, error)
        containers.records.forget_leaving(id, network)
    for id, network in connections.endpoints.added():
        try:
            container = containers.records.by_id(id)
            if network not in _named(container.config):
                place = containers.logs(container.name).current.parents[1]
                _unplug(containers, networks, connections, container, network)
                connections.disconnect(id, container.name, network, place, container.config)
                log.warning("container %s: joining network %s was begun, and is undone", container.name, network)
        except (EngineError, OSError) as error:
            log.warning("container %s, network %s: joining it was begun and is not undone: %s", id, network, error)


def _named(config: ContainerConfig) -> Mapping[str, Endpoint]:
    """The networks of its config, the default one written out."""
    return config.networks or {default_network(): Endpoint()}


def _more(now: Container, network: str, item: Endpoint) -> ContainerConfig:
    """Its config as it is now, which somebody else may have changed meanwhile, with one network more."""
    return _with(now, {**{key: value for key, value in _named(now.config).items() if key != NONE}, network: item})


def _less(now: Container, network: str) -> ContainerConfig:
    """The same without one."""
    left = {key: value for key, value in _named(now.config).items() if key != network}
    return _with(now, left or {NONE: Endpoint()})


def _with(container: Container, networks: Mapping[str, Endpoint]) -> ContainerConfig:
    data = container.config.model_dump()
    data["networks"] = networks
    return fields.validated(data, "networks")


def _runs(container: Container) -> bool:
    if container.state in (State.CREATED, State.STOPPED):
        return False
    if container.state not in ALIVE or container.state is State.STOPPING:
        raise Busy(f"the container is {container.state}", at=container.name)
    if container.runtime == "fake":
        raise InvalidArgument(f"the {container.runtime} driver has no networks", at=container.name)
    return True
