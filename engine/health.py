"""Health checks: asking running containers whether they are well. Floor 3.

Only here: when probes run and what their answers make of a container (the rules are in upkeep.py). A probe runs through
the container's driver, on a bounded pool; one thread waits for what is due, however many containers there are. A
paused container is not asked; after `resume` the next probe comes after the interval. Nothing is asked before the first
interval has passed, as with Docker.

A virtual machine whose agent is mute (meters.py finds out) is unhealthy, whatever its check says, and also without one.

State is kept in memory, and each change of it in the journal: a restarted daemon takes a container's health from its
newest healthStatus event; failures in a row and the last probes' output begin anew.

    healthStatus  {"name", "health", "was", "streak", "exit_code", "output"}    the latter three when a probe made it so

Thread-safe; readers never wait for a probe.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from engine.errors import Busy, DeadlineExceeded, EngineError, Gone, NotFound
from engine.events import Journal, rfc3339
from engine.execution import Execution
from engine.failures import Failures
from engine.lifecycle import State, Verb
from engine.meters import HINT
from engine.records import Container, Records
from engine.scheduler import Clock, Scheduler
from engine.store.meta import Meta
from engine.upkeep import KEPT_PROBES, MAX_OUTPUT, TIMED_OUT, Check, Health, after_probe, check_of, next_probe

log = logging.getLogger(__name__)

WORKERS = 32  # probes at the same time


@dataclass(slots=True)
class Watch:
    """What is known of one running container; guarded by HealthChecks' lock."""

    known: bool = False  # `check` has been found out
    check: Check | None = None
    health: Health = Health.NONE
    streak: int = 0
    turn: int = 0  # counts what a probe under way must not outlive: its run, or a pause
    asleep: bool = False  # paused
    mute: bool = False  # its virtual machine does not answer
    probes: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_PROBES))

    @property
    def shown(self) -> Health:
        return Health.UNHEALTHY if self.mute else self.health


class HealthChecks:
    def __init__(
        self, meta: Meta, journal: Journal, records: Records, execution: Execution, clock: Clock | None = None
    ) -> None:
        self._meta, self._journal, self._records, self._execution = meta, journal, records, execution
        self._scheduler = Scheduler("health", WORKERS, clock)
        self._clock = self._scheduler.clock
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        records.on_move.append(self._moved)

    def begin(self) -> None:
        """Once, after the catalog agrees with what runs."""
        for container in self._records.all():
            if container.state in (State.RUNNING, State.PAUSED):
                with self._lock:
                    fresh = container.id not in self._watches
                    watch = self._watches.setdefault(container.id, Watch())
                    watch.asleep = container.state is State.PAUSED
                if fresh:
                    self._scheduler.after(container.id, 0, lambda id=container.id: self._prepare(id, recall=True))  # type: ignore[misc]

    def of(self, container: Container) -> Health:
        """none for one that does not run, or has no check."""
        with self._lock:
            watch = self._watches.get(container.id)
            if watch is None:
                return Health.NONE
            if watch.known or watch.mute:
                return watch.shown
        return Health.NONE if self._check(container) is None else Health.STARTING

    def probes(self, id: str) -> list[dict[str, Any]]:
        """The last probes of this run, oldest first."""
        with self._lock:
            watch = self._watches.get(id)
            return list(watch.probes) if watch else []

    def machine(self, container: Container, mute: str) -> None:
        """Its virtual machine does not answer, as `mute` says; empty: it does again."""
        with self._lock:
            watch = self._watches.get(container.id)
            if watch is None:
                return  # it has ended
            was = watch.shown
            watch.mute = bool(mute)
            now = watch.shown
        if now is not was:
            self._tell(container, was, now, {"output": mute} if mute else {})

    def close(self) -> None:
        self._scheduler.close()

    # --- beginning and ending ---------------------------------------------------------------------------------------

    def _moved(self, db: sqlite3.Connection, before: Container, after: Container, verb: Verb | None) -> None:
        self._meta.after_commit(lambda: self._follow(before.state, after))

    def _follow(self, before: State, after: Container) -> None:
        """After the commit of a change of state; quick."""
        id = after.id
        with self._lock:
            watch = self._watches.get(id)
            if watch is not None:
                watch.turn += 1
            if after.state is State.RUNNING and (watch is None or before is State.STARTING):
                watch = self._watches[id] = Watch(turn=watch.turn if watch else 0)
                delay: float | None = 0.0
            elif after.state is State.RUNNING and watch is not None:  # resumed
                watch.asleep = False
                delay = self._pause(watch, after)
            elif after.state is State.PAUSED and watch is not None:
                watch.asleep = True
                delay = None
            else:
                delay = None
                if after.state in (State.STOPPED, State.REMOVED):
                    self._watches.pop(id, None)
        if delay is None:
            self._scheduler.cancel(id)
        elif before is State.STARTING or watch is None or not watch.known:
            self._scheduler.after(id, delay, lambda: self._prepare(id, recall=False))
        elif watch.check is not None:
            self._scheduler.after(id, delay, lambda: self._probe(id))

    def _check(self, container: Container) -> Check | None:
        try:
            image = self._execution.image_config(container)
        except EngineError as error:
            log.warning("container %s: its image's health check is not known: %s", container.id, error)
            return None
        return check_of(container.config.healthcheck, image.runtime)

    def _prepare(self, id: str, *, recall: bool) -> None:
        """Find out what there is to ask, and tell of the first state."""
        try:
            container = self._records.by_id(id)
        except Gone:
            return
        check = self._check(container)
        health = Health.NONE if check is None else self._recalled(container) if recall else Health.STARTING
        with self._lock:
            watch = self._watches.get(id)
            if watch is None or watch.known:
                return
            watch.known, watch.check, watch.health = True, check, health
            asleep = watch.asleep
            delay = self._pause(watch, container)
        if check is None:
            return
        if not recall:
            self._tell(container, Health.NONE, health, {})
        if not asleep:
            self._scheduler.after(id, delay, lambda: self._probe(id))

    def _recalled(self, container: Container) -> Health:
        """What the last daemon knew of this run."""
        row = self._meta.row(
            "SELECT type, line FROM events WHERE object = ? AND (type = 'healthStatus'"
            " OR (type = 'stateChanged' AND json_extract(CAST(line AS TEXT), '$.to') = 'starting'))"
            " ORDER BY obj_off DESC LIMIT 1",
            (container.object,),
        )
        if row is None or row["type"] != "healthStatus":
            return Health.STARTING
        health = Health(json.loads(bytes(row["line"])).get("health", Health.STARTING))
        return Health.STARTING if health is Health.NONE else health

    # --- probing ----------------------------------------------------------------------------------------------------

    def _since_start(self, container: Container, now_ns: int) -> float:
        return max(0.0, (now_ns - (container.started_ns or now_ns)) / 1e9)

    def _pause(self, watch: Watch, container: Container) -> float:
        """Seconds until the next probe."""
        if watch.check is None:
            return 0.0
        return next_probe(watch.health, watch.check, self._since_start(container, self._clock.time_ns()))

    def _probe(self, id: str) -> None:
        try:
            self._probe_once(id)
        except Exception:  # whatever it was, a container is not left without its checks
            log.exception("container %s could not be asked whether it is well", id)
            with self._lock:
                watch = self._watches.get(id)
                check = None if watch is None or watch.asleep else watch.check
            if check is not None:
                self._scheduler.after(id, check.interval, lambda: self._probe(id))

    def _probe_once(self, id: str) -> None:
        with self._lock:
            watch = self._watches.get(id)
            if watch is None or watch.check is None or watch.asleep:
                return
            turn, check = watch.turn, watch.check
        try:
            container = self._records.by_id(id)
            if container.state is not State.RUNNING or self._records.closing:
                return
            began = self._clock.time_ns()
            code, output = self._ask(container, check)
        except (Gone, Busy, NotFound):
            return  # it has ended, or is about to
        ended = self._clock.time_ns()
        with self._lock:
            watch = self._watches.get(id)
            if watch is None or watch.turn != turn:
                return  # it ended or was paused meanwhile: what was said does not count
            was = watch.shown
            watch.health, watch.streak = after_probe(
                watch.health, watch.streak, check, code, self._since_start(container, began)
            )
            text = output[:MAX_OUTPUT].decode(errors="replace")
            watch.probes.append({"start": rfc3339(began), "end": rfc3339(ended), "exit_code": code, "output": text})
            now, streak = watch.shown, watch.streak
            delay = self._pause(watch, container)
        if now is not was:
            more: dict[str, Any] = {} if code == 0 else {"streak": streak, "exit_code": code, "output": text}
            self._tell(container, was, now, more)
        self._scheduler.after(id, delay, lambda: self._probe(id))

    def _ask(self, container: Container, check: Check) -> tuple[int, bytes]:
        try:
            driver = self._execution.driver_of(container)
            return driver.probe_exec(container.id, check.argv, deadline=check.timeout)
        except DeadlineExceeded:
            return TIMED_OUT, f"Health check exceeded timeout ({check.timeout:g}s)".encode()
        except (Busy, NotFound):
            raise
        except (EngineError, OSError) as error:
            return TIMED_OUT, str(error).encode()

    def _tell(self, container: Container, was: Health, now: Health, more: dict[str, Any]) -> None:
        try:
            with self._meta.tx():
                data = {"name": container.name, "health": now, "was": was, **more}
                self._journal.append("healthStatus", container.object, data)
                self._meta.after_commit(self._records.notify)
        except (EngineError, sqlite3.Error) as error:
            log.warning("container %s is %s now, which the journal does not have: %s", container.id, now, error)


def machine_changed(records: Records, failures: Failures, health: HealthChecks, id: str, mute: str) -> None:
    """The virtual machine of container `id` has been mute for as long as `mute` says; empty: it answers again."""
    container = records.by_id(id)
    if mute:
        error = DeadlineExceeded(f"its virtual machine has not answered for {mute}", hint=HINT)
        log.warning("container %s: %s", container.name, error)
        failures.record(container.object, "", error)
        mute = error.reason
    health.machine(container, mute)
