"""Containers in networks: set up while a run's process is made, taken down after its end. Floor 2.

Only here: that everything made for a run goes again. Its rows (endpoints.py) are written first and deleted last, so
after a crash at any point the next daemon finds what there is to take down:

    crash after                     found by the next start             becomes
    the rows                        rows, no namespace                  rows deleted
    the namespace, netavark         rows of a container that is over    torn down, then deleted
    netavark's teardown             the same                            torn down again: what is gone is no error
    the rows' deletion              nothing

The backend (runtimes/netbase.py) is `netavark` for root on Linux: bridges on the host. Where it cannot be used a
container has loopback alone, and whoever asked for more gets Unsupported. One for ordinary users (pasta, slirp4netns)
keeps the same protocol and is chosen in engine.py.

Threading: any thread. Work on one container is serialised by a lock of its own; the setup runs on a thread while the
runtime makes the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from engine import host
from engine.config import ContainerConfig
from engine.endpoints import Endpoints
from engine.errors import Busy, EngineError, InvalidArgument, NotFound, Unsupported
from engine.events import Journal
from engine.netconfig import HOST, NONE, Endpoint, PortSpec
from engine.networks import Networks, default_network
from engine.ports import read_ports
from engine.runtimes import netns
from engine.runtimes.base import RunSpec, Runtime
from engine.runtimes.netbase import Backend, Link, Wiring
from engine.runtimes.netfiles import NetworkMode, RunNetwork, refresh
from engine.runtimes.vm import usernetworks
from engine.store.meta import Meta

log = logging.getLogger(__name__)

SETTLE = 10.0  # seconds a start waits for networks of ended containers to be taken down
IDLE = 2.0  # seconds without any container before what all networks share is cleared
HINT = "apt-get install netavark aardvark-dns iptables, or echo none > config/networks"


class Setup:
    """The setup of one start, going on aside. `wait` returns when it is done, or raises what it raised."""

    def __init__(self, network: RunNetwork, work: Callable[[], None] | None = None) -> None:
        self.network = network
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None
        if work is not None:
            self._work = work
            self._thread = threading.Thread(target=self._run, name="network", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failed = error

    def settle(self) -> None:
        """Wait until nothing is done for it any more."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        self.settle()
        if self._failed is not None:
            raise self._failed


class Connections:
    """Those of one store. `state` is a directory of this boot for the namespaces."""

    def __init__(self, meta: Meta, journal: Journal, networks: Networks, backend: Backend, state: Path) -> None:
        self._networks = networks
        self.endpoints = Endpoints(meta, journal, networks)
        self._backend = backend
        self._netns = state / "netns"
        self._guard = threading.Condition()
        self._locks: dict[str, threading.RLock] = {}
        self._releasing: set[str] = set()
        self._closed = False
        self._timer: threading.Timer | None = None

    def summary(self) -> str:
        """For `status`."""
        why = self._backend.missing()
        return f"loopback only: {why}" if why else self._backend.summary

    @property
    def usable(self) -> bool:
        return not self._backend.missing()

    # --- start --------------------------------------------------------------------------------------------------

    def create(self, driver: Runtime, spec: RunSpec) -> int:
        """Have `driver` make the process of a run while its network is set up: its pid. Failing leaves nothing."""
        try:
            setup = Setup(RunNetwork())  # the fake driver has none
            if driver.name != "fake":
                setup = self.begin(spec.id, spec.name, spec.hostname, spec.config)
            try:
                pid = driver.create(replace(spec, network=setup.network))
            finally:
                setup.settle()
            try:
                setup.wait()
            except BaseException:
                driver.delete(spec.id)
                raise
        except BaseException:
            self.release(spec.id)
            raise
        return pid

    def begin(self, id: str, name: str, hostname: str, config: ContainerConfig) -> Setup:
        """Decide on the network of a run and begin to make it. Busy names the host port or address that is taken.

        Whatever happens afterwards, `release` takes it down again.
        """
        wanted = dict(config.networks)
        if HOST in wanted:
            return Setup(RunNetwork(NetworkMode.HOST))
        default = default_network()
        if not wanted:
            if not config.ports and (default == NONE or self._backend.missing()):
                return Setup(RunNetwork())
            if default == HOST and not config.ports:
                return Setup(RunNetwork(NetworkMode.HOST))
            wanted = {default: Endpoint()}
        if NONE in wanted and not config.ports:
            return Setup(RunNetwork())
        if why := self._backend.missing():
            raise Unsupported(f"{'ports' if config.ports else 'networks'}: {why}", hint=HINT)
        if NONE in wanted or HOST in wanted:
            raise InvalidArgument(f"ports: none can be published with networks: {default}", at="ports")
        if default in wanted:
            self._networks.ensure_default()
        self._settle()
        with self._locked(id):
            self._release(id)  # what an earlier run left
            links, ports = self.endpoints.allocate(id, name, hostname, wanted, config)
        path = self._netns / id
        wiring = Wiring(path, id, name, links, ports, config.dns)
        if self._backend.inside:
            self._backend.setup(wiring)
            return Setup(usernetworks.of_run(wiring))
        resolvers = tuple(gateway for link in links for _, gateway in link.subnets) if self._backend.resolves else ()
        network = RunNetwork(
            NetworkMode.JOINED,
            path,
            (name,),
            tuple(address for link in links for address in link.addresses),
            resolvers,
            links[0].subnets[0][1],
        )
        netns.make(path)

        def work() -> None:
            with self._locked(id):
                self._backend.setup(wiring)

        return Setup(network, work)

    # --- the end ------------------------------------------------------------------------------------------------

    def release(self, id: str) -> None:
        """Take down what is there of a container's network; idempotent. Never raises for what is gone already."""
        with self._locked(id):
            self._release(id)
        with self._guard:
            self._releasing.discard(id)
            self._guard.notify_all()

    def release_later(self, id: str) -> None:
        """The same, on a thread of its own. A start, of any container, waits for it."""
        if self.endpoints.run(id) is None:
            return
        with self._guard:
            self._releasing.add(id)
        threading.Thread(target=self._release_logged, args=(id,), name="network-down", daemon=True).start()

    def _release_logged(self, id: str) -> None:
        try:
            self.release(id)
        except (EngineError, OSError, sqlite3.Error) as error:
            if self._closed:
                log.info("the network of container %s is left to the next daemon: %s", id, error)
            else:
                log.exception("the network of container %s could not be taken down; the next start tries again", id)
        finally:
            with self._guard:
                self._releasing.discard(id)
                self._guard.notify_all()

    def _settle(self) -> None:
        """Wait until what has ended is taken down: its addresses and ports are free then."""
        with self._guard:
            self._guard.wait_for(lambda: not self._releasing, SETTLE)

    def _release(self, id: str) -> None:
        """The container's lock is held."""
        row = self.endpoints.run(id)
        path = self._netns / id
        if row is None:
            netns.remove(path)
            return
        endpoints = self.endpoints.rows(id)
        if path.parent.exists():  # else the host was restarted: nothing of it is there
            if not netns.present(path):
                netns.make(path)  # the interfaces are gone; rules and names are taken down all the same
            for started in (True, False):
                links = [self.endpoints.link(item) for item in endpoints if bool(item["started"]) is started]
                if links:
                    self._teardown(row, path, links, read_ports(row["ports"]) if started else [])
        netns.remove(path)
        self.endpoints.remove(row, endpoints, over=True)
        self._idle_soon()

    def _wiring(self, row: sqlite3.Row, links: Sequence[Link], ports: Sequence[PortSpec]) -> Wiring:
        id = row["container"]
        return Wiring(self._netns / id, id, row["name"], links, ports, json.loads(row["dns"]))

    def _teardown(self, row: sqlite3.Row, path: Path, links: list[Link], ports: Sequence[PortSpec]) -> None:
        try:
            self._backend.teardown(self._wiring(row, links, ports))
        except EngineError as error:
            # what it lists was not there (the setup had failed, say); the interfaces go with the namespace
            log.info("network of container %s: %s", row["container"], error.reason)
            netns.remove(path)
            for link in links:
                if self.endpoints.alone(row["container"], link.network):
                    netns.delete_bridge(link.bridge)

    def _idle_soon(self) -> None:
        """When nobody is connected any more, and stays so for a moment, clear what all networks share."""
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if not self._closed:
                self._timer = threading.Timer(IDLE, self._clear_if_idle)
                self._timer.daemon = True
                self._timer.start()

    def _clear_if_idle(self) -> None:
        try:
            self._backend.clear(self.endpoints.nobody)
            netns.leave(self._netns)
        except (EngineError, OSError, OverflowError, sqlite3.Error):
            log.warning("what all networks share could not be cleared", exc_info=True)

    # --- while it runs ------------------------------------------------------------------------------------------

    def connect(self, id: str, name: str, network: str, item: Endpoint, place: Path, config: ContainerConfig) -> None:
        """One more network for a container that runs; its resolv.conf and hosts, in `place`, learn of it."""
        with self._locked(id):
            row = self._attached(id)
            link = self.endpoints.add(id, name, network, item)
            try:
                self._backend.setup(self._wiring(row, [link], []))
            except BaseException:
                self._drop(row, network)
                raise
            self._refresh(row, place, config, come=link.addresses)

    def disconnect(self, id: str, name: str, network: str, place: Path, config: ContainerConfig) -> None:
        """Take a container that runs out of a network; ports published there go with it."""
        with self._locked(id):
            row = self._attached(id)
            gone = [there for there in self.endpoints.rows(id) if there["network"] == network]
            if not gone:
                raise NotFound(f"{name} is not connected to {network}", at=network)
            self._drop(row, network)
            self._refresh(row, place, config, gone=self.endpoints.link(gone[0]).addresses)

    def _attached(self, id: str) -> sqlite3.Row:
        row = self.endpoints.run(id)
        if row is None:
            raise Busy("the container has no namespace that networks could be connected to", hint="restart it")
        return row

    def _drop(self, row: sqlite3.Row, network: str) -> None:
        id, rows = row["container"], self.endpoints.rows(row["container"])
        (item,) = (there for there in rows if there["network"] == network)
        ports = read_ports(row["ports"]) if item["started"] else []
        stays = any(there["started"] for there in rows if there is not item)
        try:
            self._backend.teardown(self._wiring(row, [self.endpoints.link(item)], ports), stays=stays)
        except EngineError as error:
            log.info("network of container %s: %s", id, error.reason)
        self.endpoints.remove(row, [item], over=False)

    def _refresh(self, row: sqlite3.Row, place: Path, config: ContainerConfig, **moved: Sequence[str]) -> None:
        id, links = row["container"], [self.endpoints.link(item) for item in self.endpoints.rows(row["container"])]
        network = RunNetwork(names=(row["name"],), resolvers=tuple(at for link in links for _, at in link.subnets))
        refresh(place, network, config.hostname or id[:12], config, resolves=self._backend.resolves, **moved)

    # --- start and end of the daemon ------------------------------------------------------------------------------

    def reconcile(self, alive: Set[str]) -> None:
        """Take down, aside, what belongs to containers that do not run; `alive` are the ids of those that do."""
        known = self.endpoints.containers()
        for id in known - alive:
            self.release_later(id)
        with suppress(FileNotFoundError):  # no network was used in this boot
            for path in [path for path in self._netns.iterdir() if path.name not in known]:
                netns.remove(path)
            if not known:  # else whoever goes last sees to it
                self._idle_soon()

    def close(self) -> None:
        """Networks of running containers stay."""
        with self._guard:
            self._closed = True
            ending = bool(self._releasing)  # the last of these sets no timer any more
            self._guard.wait_for(lambda: not self._releasing, 1.0)
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if timer is not None or ending:
            self._clear_if_idle()
        netns.leave(self._netns)

    @contextmanager
    def _locked(self, id: str) -> Iterator[None]:
        with self._guard:
            lock = self._locks.setdefault(id, threading.RLock())
        with lock:
            yield

    def forget(self, id: str) -> None:
        with self._guard:
            self._locks.pop(id, None)


def state_directory(store: Path) -> Path:
    """Of this boot, and of this store alone: two daemons keep apart."""
    return host.runtime_dir() / "networks" / hashlib.sha256(str(store).encode()).hexdigest()[:16]
