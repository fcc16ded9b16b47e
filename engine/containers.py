"""Containers: every verb, and the only writer of container state. Floor 3.

Only here: what a verb means, from its check to its end. A verb first moves the state (the check, the new state and its
event are one transaction), then carries it out on a thread of its own and waits for that a bounded time: `start` and
`remove` 5 s, `stop` and `restart` about one. What takes longer goes on by itself; a failure after the caller has left
is kept in the container's `error`.

Threading: all methods from any thread. Readers never wait; verbs on one container exclude each other by its state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal as signals
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine import configcheck, fields, host, lifecycle, updates
from engine.changes import changes
from engine.config import ContainerConfig
from engine.connections import Connections
from engine.console import Console
from engine.drivers import Drivers
from engine.errors import AlreadyExists, InvalidArgument, NotFound
from engine.events import Journal
from engine.execution import Execution
from engine.failures import Failures
from engine.guests import Guests
from engine.health import HealthChecks, machine_changed
from engine.images.catalog import Images
from engine.lifecycle import ALIVE, State, Verb
from engine.logs import ContainerLogs
from engine.logsopen import OpenLogs
from engine.meters import Meters
from engine.model import check_name
from engine.monitor import Monitor
from engine.mounts import RootfsMounts
from engine.mountspec import MountSpec
from engine.names import random_name
from engine.processes import Process
from engine.records import PINNED, Container, Records
from engine.restarts import Restarts
from engine.runtimes.base import parse_signal
from engine.runtimes.vm.guestupper import CHANGES_SECONDS
from engine.scheduler import Clock
from engine.sessions import Sessions
from engine.store.meta import Meta
from engine.store.trees import Trees
from engine.volumes import Volumes
from engine.workers import Workers

log = logging.getLogger(__name__)

START_PATIENCE = 5.0  # seconds the caller waits for a start or a removal; normally some 100 ms
STOP_PATIENCE = 1.0  # seconds for a stop or restart: a grace period may be long
MAX_GRACE = 86400.0


class Containers:
    def __init__(
        self,
        store: Path,
        meta: Meta,
        journal: Journal,
        failures: Failures,
        images: Images,
        trees: Trees,
        volumes: Volumes,
        mounts: RootfsMounts,
        drivers: Drivers,
        connections: Connections,
        clock: Clock | None = None,
    ) -> None:
        self._root = store / "containers"
        self._tmp = store / "tmp"
        self._images = images
        self._trees = trees
        self._volumes = volumes
        self._mounts = mounts
        self._connections = connections
        self._logs = OpenLogs[str]()  # by id
        self._workers = Workers(failures)
        self.records = Records(meta, journal)
        self.execution = Execution(store, meta, self.records, images, volumes, mounts, trees, drivers, connections)
        self.console = Console(self.records, self.execution)
        self.sessions = Sessions(store, meta, journal, failures, self.records, self.execution)
        self.guests = Guests(self._root, self.execution)
        self.meters = Meters(self._root, self.guests, mounts.merged)
        self.monitor = Monitor(meta, journal, self.records, self.execution, self._logs_of, self.meters)
        self.restarts = Restarts(meta, journal, self.records, self._start, clock)
        self.health = HealthChecks(meta, journal, self.records, self.execution, clock)
        self.meters.on_change = lambda id, mute: machine_changed(self.records, failures, self.health, id, mute)
        self._root.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(parents=True, exist_ok=True)

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Container:
        return self.records.get(name)

    def all(self) -> list[Container]:
        return self.records.all()

    def names(self) -> list[str]:
        return self.records.names()

    def verbs(self, name: str) -> list[str]:
        """The verbs legal now."""
        now = self.get(name)
        waits = now.state is State.STOPPED and self.restarts.due(now.id) is not None
        return [str(verb) for verb in lifecycle.legal_verbs(now.state, restarting=waits)]

    def wait(self, name: str, timeout: float | None) -> int | None:
        """The exit code once it is stopped for good (no restart is due); None after `timeout` seconds. Gone when it is
        removed meanwhile."""

        def over(now: Container) -> bool:
            return now.state is State.STOPPED and self.restarts.due(now.id) is None

        container = self.records.wait(self.get(name).id, over, timeout)
        return None if container is None else container.exit_code

    def wait_for(self, name: str, until: Callable[[Container], bool], timeout: float | None) -> Container | None:
        """The container once `until` holds of it; None after `timeout` seconds."""
        return self.records.wait(self.get(name).id, until, timeout)

    def logs(self, name: str) -> ContainerLogs:
        if name.startswith(PINNED) and (known := self._logs.known(name[1:])) is not None:  # who follows asks often
            return known
        return self._logs_of(self.get(name).id)

    def _logs_of(self, id: str) -> ContainerLogs:
        if (known := self._logs.known(id)) is not None:
            return known
        directory = self._root / id / "logs"
        if not directory.is_dir():
            raise NotFound("the container has no logs")
        return self._logs.open(id, directory)

    def rootfs(self, name: str) -> Path:
        """The merged root filesystem, mounted when it is not yet; live and writable whether it runs or not.

        NotFound while no image is set or the image is not here; Unsupported where this host cannot mount.
        """
        container = self.get(name)
        if not container.image and not container.config.image:
            raise NotFound("no image is set", hint="echo IMAGE > config/image")
        image = self.execution.image_of(container)
        return self.execution.rootfs(container.id, image.chain_id)

    def upper(self, name: str) -> Path:
        """What differs from the image, in overlay form (whiteouts are 0:0 character devices). Always there."""
        return self._mounts.upper(self.get(name).id)

    def changes(self, name: str) -> Iterator[tuple[str, bytes]]:
        """("A" | "M" | "D", path) of what differs from the image."""
        container = self.get(name)
        tree = None
        if container.image or container.config.image:
            tree = self._trees.open(self.execution.image_of(container).chain_id)
        with self.guests.changed(container, CHANGES_SECONDS) as guest:
            yield from changes(self._mounts.upper(container.id) if guest is None else guest, tree)

    def mount_specs(self, name: str) -> list[MountSpec]:
        """Its mounts: its config's, those of volumes_from, its image's VOLUMEs; anonymous volumes by their names."""
        return self.execution.attachments.shown(self.get(name))

    def stats(self, name: str) -> dict[str, int]:
        """What it uses now; empty when it does not run or its driver does not count."""
        return self.meters.stats(self.get(name))

    def processes(self, name: str) -> list[tuple[Process, str]]:
        """Those that run in it, each with its user's name in the container."""
        return self.meters.processes(self.get(name))

    def field_text(self, name: str, field: str) -> str:
        """The file `config/<field>`."""
        return fields.field_text(field, self.get(name).config)

    def config_text(self, name: str) -> str:
        """The file `config.yaml`."""
        return fields.config_text(self.get(name).config)

    # --- making and configuring ---------------------------------------------------------------------------------

    def create(self, name: str, config: ContainerConfig | None = None) -> Container:
        """A container in state created. AlreadyExists when the name is taken; NotFound for an image not here."""
        check_name(name, "container")
        config = config or fields.validated({})
        configcheck.check(config)
        if config.image:
            self.execution.find_image(config)
        return self.records.create(name, config, self._make_directory)

    def _make_directory(self, id: str) -> None:
        directory = self._root / id
        directory.mkdir(mode=0o700)
        for sub in ("upper", "work", "merged", "logs"):
            (directory / sub).mkdir()
        os.chmod(directory / "upper", 0o755)
        os.chmod(directory / "logs", 0o700)

    def run(self, image: str, name: str | None = None, argv: Sequence[str] | None = None, **more: object) -> Container:
        """Create and start. `argv` replaces the image's CMD; `more` are further config fields. It stays when the start
        fails, so that what went wrong can be seen."""
        if not image:
            raise InvalidArgument("run: an image is needed", hint="run IMAGE [name=…] [-- ARGV…]")
        data: dict[str, object] = {**more, "image": image}
        if argv:
            data["command"] = list(argv)
        config = fields.validated(data, "run")
        container = self._create_named(config) if name is None else self.create(name, config)
        self.start(container.name)
        return self.records.by_id(container.id)

    def _create_named(self, config: ContainerConfig) -> Container:
        choose = random.Random()
        for attempt in range(64):
            try:
                return self.create(random_name(choose, attempt), config)
            except AlreadyExists:
                continue
        raise AlreadyExists("no free name was found", hint="give one: run IMAGE name=NAME")

    def configure(self, name: str, config: ContainerConfig) -> Container:
        """Replace the whole config. Busy while it runs, unless only labels, stop, log settings or limits change."""
        return self._configure(name, lambda _: config)

    def set_field(self, name: str, field: str, text: str) -> Container:
        """`config/<field>` as written. NotFound for an unknown field; InvalidArgument names what is wrong."""
        fields.check_field(field)
        return self._configure(name, lambda now: fields.with_field(now.config, field, text))

    def _configure(self, name: str, new: Callable[[Container], ContainerConfig]) -> Container:
        return updates.configure(self.records, self.execution, self.get(name).id, new)

    def rename(self, name: str, to: str) -> Container:
        """Give it another name; it may run. AlreadyExists when that is taken."""
        return self.records.rename(self.get(name).id, check_name(to, "container"))

    # --- verbs --------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        container = self.records.move(self.get(name).id, State.STARTING, verb=Verb.START)
        self._workers.bounded(container.object, "start", START_PATIENCE, lambda: self._start(container.id))

    def _start(self, id: str) -> None:
        self.execution.start(id)
        self.monitor.wake()

    def stop(self, name: str, seconds: float | None = None) -> None:
        """The stop signal, `seconds` (default: its config's) of grace, SIGKILL. Returns after about a second at most,
        `stopping` then going on. One that waits for its restart is left as it is, stopped."""
        grace = _grace(seconds)
        before = self.get(name)
        if before.state is State.STOPPED and self.restarts.cancel(before):
            return
        container = self.records.move(before.id, State.STOPPING, verb=Verb.STOP)
        paused = before.state is State.PAUSED
        self._workers.bounded(container.object, "stop", STOP_PATIENCE, lambda: self._stop(container, grace, paused))

    def _stop(self, container: Container, grace: float | None, paused: bool) -> None:
        configured = container.config.stop_grace_period
        seconds = grace if grace is not None else MAX_GRACE if configured is None else configured
        self.execution.stop(container, self.execution.stop_signal(container), seconds, paused=paused)

    def restart(self, name: str, seconds: float | None = None) -> None:
        """Stop and start, or only start when it is stopped."""
        grace = _grace(seconds)
        before = self.get(name)
        lifecycle.permit(before.state, Verb.RESTART)
        if before.state is State.STOPPED:
            container = self.records.move(before.id, State.STARTING, verb=Verb.RESTART, restarts=before.restarts + 1)
            self._workers.bounded(container.object, "restart", START_PATIENCE, lambda: self._start(container.id))
            return
        container = self.records.move(before.id, State.STOPPING, verb=Verb.RESTART)

        def work() -> None:
            self._stop(container, grace, before.state is State.PAUSED)
            if not self.records.closing:  # else the next engine goes on
                self._start_again(container)

        self._workers.bounded(container.object, "restart", STOP_PATIENCE, work)

    def _start_again(self, container: Container) -> None:
        self.records.move(container.id, State.STARTING, verb=Verb.RESTART, restarts=container.restarts + 1)
        self._start(container.id)

    def kill(self, name: str, signal: str | int = "KILL") -> None:
        """Send a signal to its first process. After SIGKILL, waits up to a second for its end."""
        signum = parse_signal(str(signal))
        container = self.get(name)
        lifecycle.permit(container.state, Verb.KILL)
        asked = signum in (signals.SIGKILL, self.execution.stop_signal(container))
        with self.restarts.stopped_by_person(container.id) if asked else contextlib.nullcontext():
            self.execution.signal(container, signum)
        if signum == signals.SIGKILL:
            self.records.wait(container.id, lambda now: now.state not in ALIVE, STOP_PATIENCE)

    def pause(self, name: str) -> None:
        self._freeze(name, Verb.PAUSE)

    def resume(self, name: str) -> None:
        self._freeze(name, Verb.RESUME)

    def _freeze(self, name: str, verb: Verb) -> None:
        id = self.get(name).id
        with self.execution.locked(id):
            container = self.records.by_id(id)
            to = lifecycle.after(container.state, verb)
            driver = self.execution.driver_of(container)
            (driver.pause if verb is Verb.PAUSE else driver.resume)(id)
            self.records.move(id, to, verb=verb)

    def remove(self, name: str, force: bool = False) -> None:
        """Delete it with everything it changed and logged. Busy while it runs; `force` kills it first."""
        container = self.get(name)
        if force and container.state in ALIVE:
            self._kill_now(container)
        container = self.records.by_id(container.id)
        if container.state is not State.REMOVING:
            container = self.records.move(container.id, State.REMOVING, verb=Verb.REMOVE)
        self._workers.bounded(container.object, "remove", START_PATIENCE, lambda: self.finish_removal(container))

    def _kill_now(self, container: Container) -> None:
        if container.state is not State.STOPPING:
            container = self.records.move(container.id, State.STOPPING, reason="removed by force")
            self._workers.bounded(
                container.object,
                "remove",
                START_PATIENCE,
                lambda: self.execution.stop(container, signals.SIGKILL, START_PATIENCE, paused=False),
            )
        else:
            self.kill(container.name)

    def finish_removal(self, container: Container) -> None:
        """Carry out a removal; the state is `removing`. Every step may have been done before."""
        id = container.id
        with self.execution.locked(id, 5.0):
            self.sessions.forget(id)
            self.execution.driver_of(container).delete(id)
            self._connections.release(id)
            self._mounts.forget(id)
            self._logs.drop(id)
            aside = self._tmp / f"removed-{id}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._root / id, aside)
            self.records.move(id, State.REMOVED, only=State.REMOVING)
        self._volumes.remove_anonymous(id)
        self.monitor.forget(id)
        self.execution.forget(id)
        try:
            host.remove_tree(aside)
        except OSError:
            log.warning("not all of %s was deleted; the next start clears tmp/", aside, exc_info=True)

    # --- for reconcile.py and engine.py -------------------------------------------------------------------------------

    def resume_stop(self, container: Container, *, paused: bool) -> None:
        """Take up a stop that an earlier daemon did not finish. Nothing is asked twice to stop, if that was noted."""
        until = self.records.stop_noted(container.id)
        if until is None:
            work = lambda: self._stop(container, None, paused)  # noqa: E731
        else:
            left = min(MAX_GRACE, max(0.0, (until - time.time_ns()) / 1e9))
            work = lambda: self.execution.await_end(container, left)  # noqa: E731
        self._workers.bounded(container.object, "stop", 0.0, work)

    def resume_restart(self, container: Container) -> None:
        """Start again what an earlier daemon stopped, or was stopping, in order to start it again."""

        def work() -> None:
            now = self.records.wait(container.id, lambda now: now.state is not State.STOPPING, None)
            if now is not None and now.state is State.STOPPED and self.records.restart_noted(now.id):
                self._start_again(now)

        self._workers.bounded(container.object, "restart", 0.0, work)

    def close(self) -> None:
        """Let go of all containers; they go on running."""
        self.records.close()
        deadline = time.monotonic() + 1.0
        self.restarts.close()
        self.health.close()
        self.sessions.close()
        self.monitor.close()
        self.meters.close()
        self.guests.close()
        self._workers.join(max(0.0, deadline - time.monotonic()))
        self._logs.close()

    def discard_directory(self, id: str) -> None:
        """Delete the directory of a container that has no row."""
        self._mounts.forget(id)
        aside = self._tmp / f"removed-{id}"
        host.remove_tree(aside)
        os.rename(self._root / id, aside)
        host.remove_tree(aside)

    def directories(self) -> list[str]:
        """The ids that have a directory."""
        return sorted(path.name for path in self._root.iterdir())


def _grace(seconds: float | None) -> float | None:
    if seconds is not None and not 0 <= seconds <= MAX_GRACE:
        raise InvalidArgument(f"stop: seconds between 0 and {MAX_GRACE:.0f} expected", at=f"{seconds:g}")
    return seconds
