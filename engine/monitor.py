"""The thread that looks after running containers. Floor 3.

Only here: what happens by the clock: about once a second it tells of new output (logOutput, one event per container
and second, with byte ranges), rotates logs, every other second samples what is used (for pictures), and every half
minute tells of resources (resourceUpdate). After a container ended it tells of the last output and clears what the
driver keeps. Sleeps without limit while nothing runs.

    logOutput        {"name", "stdout": [from, to], "stderr": [from, to], "stdout_end", "stderr_end"}
    resourceUpdate   {"name", "memory_bytes", "cpu_usec", "pids", ...}: what `stats` says
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError, NoSpace, NotFound
from engine.events import Journal
from engine.execution import Execution
from engine.lifecycle import ALIVE, State
from engine.logs import ContainerLogs
from engine.meters import Meters
from engine.records import Container, Records
from engine.samples import Samples
from engine.store.meta import Meta

log = logging.getLogger(__name__)

TICK = 1.0  # seconds
RESOURCES_EVERY = 30.0  # seconds
BOUND_EVERY = 5.0  # seconds between two looks at how much all segments of a log take
STREAMS = ("stdout", "stderr")


class Monitor:
    def __init__(
        self,
        meta: Meta,
        journal: Journal,
        records: Records,
        execution: Execution,
        logs: Callable[[str], ContainerLogs],
        meters: Meters,
    ) -> None:
        self._meta = meta
        self._journal = journal
        self._records = records
        self._execution = execution
        self._logs = logs
        self._meters = meters
        self._wake = threading.Event()
        self._closing = False
        self._guard = threading.Lock()  # of the three below
        self._told: dict[str, dict[str, int]] = {}  # id -> bytes of each stream that events have told of
        self._ended: list[str] = []
        self._resources_at: dict[str, float] = {}
        self._bounded_at: dict[str, float] = {}
        self._telling = threading.Lock()  # one teller at a time, so that ranges neither overlap nor leave gaps
        self.samples = Samples()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        execution.before_exit = self.before_exit
        execution.after_exit = self.after_exit

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something runs now."""
        self._wake.set()

    def before_exit(self, id: str) -> None:
        """Tell of the last output, so that its event comes before the one of the end. On the driver's thread."""
        try:
            logs = self._logs(id)
            for stream in STREAMS:
                logs.caught_up(stream, 0.2)
            self._tell([self._records.by_id(id)])
        except (EngineError, OSError, sqlite3.Error) as error:
            log.warning("container %s: the last output was not told of: %s", id, error)

    def after_exit(self, id: str) -> None:
        with self._guard:
            self._ended.append(id)
        self._wake.set()

    def forget(self, id: str) -> None:
        with self._guard:
            self._told.pop(id, None)
            self._resources_at.pop(id, None)
            self._bounded_at.pop(id, None)
        self.samples.forget(id)
        self._meters.forget(id)

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(1.5)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            busy = True
            try:
                busy = self._tick()
            except NoSpace as error:
                log.warning("events of output and resources wait: %s", error)
            except Exception:
                if self._closing:
                    return
                log.exception("looking after the containers failed; going on")
            self._wake.wait(TICK if busy else None)
            if self._wake.is_set() and not self._closing:
                self._wake.clear()
                if busy and not self._ended:
                    time.sleep(0.05)  # a burst of starts is one turn

    def _tick(self) -> bool:
        """One turn; whether there is reason for another soon."""
        waiting = self._execution.try_again()
        with self._guard:
            ended, self._ended = self._ended, []
        containers = self._records.all()
        alive = [container for container in containers if container.state in ALIVE]
        over = [container for container in containers if container.id in ended]
        self._tell(alive + over)
        for container in alive + over:
            self._rotate(container)
        for container in over:
            self._clear(container)
        self._meters.watch(alive)
        self._sample(alive)
        self._resources(alive)
        return waiting or bool(alive) or bool(over)

    def _tell(self, containers: list[Container]) -> None:
        with self._telling:
            news: list[tuple[Container, dict[str, Any], dict[str, int]]] = []
            for container in containers:
                with self._guard:
                    told = self._told.get(container.id)
                if told is None:
                    told = self._records.last_output(container.id)
                data: dict[str, Any] = {"name": container.name}
                now: dict[str, int] = {}
                try:
                    logs = self._logs(container.id)
                    for stream in STREAMS:
                        before, now[stream] = told.get(stream, 0), logs.size(stream)
                        if now[stream] > before:
                            data[stream] = [before, now[stream]]
                except NotFound:
                    continue  # it is being removed
                except (EngineError, OSError) as error:
                    log.warning("container %s: its log cannot be read: %s", container.id, error)
                    continue
                if len(data) > 1:
                    data.update({f"{stream}_end": size for stream, size in now.items()})
                    news.append((container, data, now))
                else:
                    with self._guard:
                        self._told[container.id] = told
            if not news:
                return
            with self._meta.tx():
                for container, data, _ in news:
                    self._journal.append("logOutput", container.object, data)
            with self._guard:
                for container, _, now in news:
                    self._told[container.id] = now

    def _rotate(self, container: Container) -> None:
        config = container.config
        try:
            self._logs(container.id).maybe_rotate(
                config.log_max_size,
                config.log_max_age,
                lambda: self._execution.driver_of(container).reopen_log(container.id),
            )
            now = time.monotonic()
            if (
                config.log_max_total is not None
                and now - self._bounded_at.get(container.id, -BOUND_EVERY) >= BOUND_EVERY
            ):
                self._bounded_at[container.id] = now
                if freed := self._logs(container.id).drop(config.log_max_total):
                    log.info("container %s: the oldest %d bytes of its log were dropped", container.id, freed)
        except NotFound:
            pass  # it is being removed
        except (EngineError, OSError) as error:
            log.warning("container %s: its log was not rotated: %s", container.id, error)

    def _clear(self, container: Container) -> None:
        """Give back the cgroup and the driver's files of a run that is over and recorded."""
        try:
            with self._execution.locked(container.id, 0.1):
                if self._records.by_id(container.id).state is State.STOPPED:
                    self._execution.driver_of(container).delete(container.id)
        except (EngineError, OSError) as error:
            log.info("container %s: not cleared yet, the next start or remove does: %s", container.id, error)

    def _sample(self, alive: list[Container]) -> None:
        for container in alive:
            now = time.monotonic()
            if self.samples.due(container.id, now) and (found := self._meters.quick(container)) is not None:
                self.samples.add(container.id, *found)

    def _resources(self, alive: list[Container]) -> None:
        now = time.monotonic()
        found = []
        for container in alive:
            with self._guard:
                if now - self._resources_at.get(container.id, -RESOURCES_EVERY) < RESOURCES_EVERY:
                    continue
            values = self._meters.latest(container)
            if values or container.runtime != "vm":  # a machine that has just started has not been asked yet
                with self._guard:
                    self._resources_at[container.id] = now
            found.append((container, values))
        if any(values for _, values in found):
            with self._meta.tx():
                for container, values in found:
                    if values:
                        self._journal.append("resourceUpdate", container.object, {"name": container.name, **values})
