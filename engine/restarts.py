"""Containers that start again by themselves: restart policies, and what starts when the engine comes up. Floor 3.

Only here: the table `restarts`, written in the transaction of the change of state it follows from, so that a killed
daemon forgets neither that a restart is due nor that a person stopped a container. The rules are Docker's:

    it ended by itself          as its policy says, after 100 ms, doubling to a minute; reset after 10 s of running
    a person stopped it         not; nor after `kill` with KILL or its stop signal. `stop` also ends the waiting
    the engine comes up         `always`, even if a person had stopped it; `unless-stopped` otherwise; what was due
    a restart fails to start    counts as a run that failed (here more patient than Docker, which gives up)

    restartScheduled  {"name", "attempt", "seconds", "exit_code"};  restartCancelled  {"name"}

While it waits the state is `stopped`. Thread-safe.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import Busy, EngineError, Gone
from engine.events import Journal
from engine.lifecycle import State, Verb
from engine.records import Container, Records
from engine.scheduler import Clock, Scheduler
from engine.store.meta import Meta
from engine.upkeep import When, next_delay, parse_policy

log = logging.getLogger(__name__)

WORKERS = 4
NOBODY, PERSON, ENGINE = 0, 1, 2  # who stopped it


class Restarts:
    def __init__(
        self, meta: Meta, journal: Journal, records: Records, start: Callable[[str], None], clock: Clock | None = None
    ) -> None:
        """`start(id)` carries out a start; the state is `starting` then."""
        self._meta, self._journal, self._records, self._start = meta, journal, records, start
        self._scheduler = Scheduler("restarts", WORKERS, clock)
        self._clock = self._scheduler.clock
        records.on_move.append(self._moved)

    def begin(self) -> None:
        """Once, after the catalog agrees with what runs: take up what is due, and start what belongs up."""
        rows = {row["id"]: row for row in self._meta.query("SELECT * FROM restarts")}
        for container in self._records.all():
            row = rows.get(container.id)
            if container.state is not State.STOPPED or row is None:
                continue
            if row["due_ns"] is not None:
                self._schedule(container.id, row["due_ns"])
            elif parse_policy(container.config.restart).at_start(row["stopped"] == PERSON):
                with self._meta.tx() as db:
                    now = self._clock.time_ns()
                    db.execute("UPDATE restarts SET due_ns = ?, delay_ms = 0 WHERE id = ?", (now, container.id))
                    self._announce(container, row["attempts"], 0.0)
                    self._meta.after_commit(lambda id=container.id, at=now: self._schedule(id, at))  # type: ignore[misc]

    def due(self, id: str) -> float | None:
        """Seconds until it starts again, at least 0; None when it does not wait for that."""
        row = self._meta.row("SELECT due_ns FROM restarts WHERE id = ? AND due_ns IS NOT NULL", (id,))
        return None if row is None else max(0.0, (row["due_ns"] - self._clock.time_ns()) / 1e9)

    def all_due(self) -> set[str]:
        """Ids of all that wait to be started again."""
        return {row["id"] for row in self._meta.query("SELECT id FROM restarts WHERE due_ns IS NOT NULL")}

    def cancel(self, container: Container) -> bool:
        """A person stops the waiting; False when it does not wait (any more)."""
        with self._meta.tx() as db:
            done = db.execute(
                "UPDATE restarts SET due_ns = NULL, stopped = ? WHERE id = ? AND due_ns IS NOT NULL",
                (PERSON, container.id),
            )
            if not done.rowcount:
                return False
            self._journal.append("restartCancelled", container.object, {"name": container.name})
            self._meta.after_commit(self._records.notify)
        self._scheduler.cancel(container.id)
        return True

    @contextmanager
    def stopped_by_person(self, id: str) -> Iterator[None]:
        """A person asks for its end by a signal, sent in the block. When that cannot be, its policy counts on."""
        with self._meta.tx() as db:
            before = int(self._row(db, id)["stopped"])
            db.execute("UPDATE restarts SET stopped = ? WHERE id = ?", (PERSON, id))
        try:
            yield
        except BaseException:
            with self._meta.tx() as db:
                db.execute("UPDATE restarts SET stopped = ? WHERE id = ?", (before, id))
            raise

    def close(self) -> None:
        self._scheduler.close()

    # --- in the transaction of a change of state ----------------------------------------------------------------------

    def _row(self, db: sqlite3.Connection, id: str) -> sqlite3.Row:
        db.execute("INSERT OR IGNORE INTO restarts (id) VALUES (?)", (id,))
        row: sqlite3.Row = db.execute("SELECT * FROM restarts WHERE id = ?", (id,)).fetchone()
        return row

    def _moved(self, db: sqlite3.Connection, before: Container, after: Container, verb: Verb | None) -> None:
        id, to = after.id, after.state
        if to is State.REMOVED:
            db.execute("DELETE FROM restarts WHERE id = ?", (id,))
            return
        row = self._row(db, id)
        if to is State.STARTING and verb is not None:
            db.execute(
                "UPDATE restarts SET stopped = 0, automatic = 0, attempts = 0, delay_ms = 0, due_ns = NULL"
                " WHERE id = ?",
                (id,),
            )
        elif to is State.STARTING:
            db.execute("UPDATE restarts SET stopped = 0, automatic = 1, due_ns = NULL WHERE id = ?", (id,))
        elif to is State.STOPPING:
            db.execute("UPDATE restarts SET stopped = ? WHERE id = ?", (PERSON if verb is Verb.STOP else ENGINE, id))
        elif to is State.RUNNING and before.state is State.STOPPING:
            db.execute("UPDATE restarts SET stopped = 0 WHERE id = ?", (id,))
        elif to is State.REMOVING:
            db.execute("UPDATE restarts SET due_ns = NULL WHERE id = ?", (id,))
        elif to is State.STOPPED and row["stopped"] == NOBODY and before.state is not State.STOPPING:
            by_itself = before.state is not State.STARTING or row["automatic"]
            if by_itself:
                self._ended(db, before, after, row)

    def _ended(self, db: sqlite3.Connection, before: Container, after: Container, row: sqlite3.Row) -> None:
        if not parse_policy(after.config.restart).wanted(after.exit_code, row["attempts"]):
            return
        ran = 0.0
        if before.state is not State.STARTING and after.started_ns and after.finished_ns:
            ran = (after.finished_ns - after.started_ns) / 1e9
        delay = next_delay(row["delay_ms"] / 1e3, ran)
        due = self._clock.time_ns() + int(delay * 1e9)
        db.execute(
            "UPDATE restarts SET attempts = attempts + 1, delay_ms = ?, due_ns = ? WHERE id = ?",
            (round(delay * 1e3), due, after.id),
        )
        self._announce(after, row["attempts"] + 1, delay)
        self._meta.after_commit(lambda: self._schedule(after.id, due))

    def _announce(self, container: Container, attempt: int, delay: float) -> None:
        data = {"name": container.name, "attempt": attempt, "seconds": delay, "exit_code": container.exit_code}
        self._journal.append("restartScheduled", container.object, data)

    # --- when it is due -----------------------------------------------------------------------------------------------

    def _schedule(self, id: str, due_ns: int) -> None:
        self._scheduler.after(id, (due_ns - self._clock.time_ns()) / 1e9, lambda: self._fire(id))

    def _fire(self, id: str) -> None:
        if self._records.closing:
            return
        try:
            with self._meta.tx() as db:
                if self._row(db, id)["due_ns"] is None:
                    return
                container = self._records.by_id(id)
                db.execute("UPDATE restarts SET due_ns = NULL WHERE id = ?", (id,))
                if container.state is not State.STOPPED or parse_policy(container.config.restart).when is When.NO:
                    self._meta.after_commit(self._records.notify)
                    return
                self._records.move(id, State.STARTING, only=State.STOPPED, restarts=container.restarts + 1)
        except (Gone, Busy):
            return
        except (EngineError, sqlite3.OperationalError) as error:  # a full disk: the row still says that it is due
            log.warning("container %s was not started again yet: %s", id, error)
            self._scheduler.after(id, 5.0, lambda: self._fire(id))
            return
        try:
            self._start(id)
        except (EngineError, OSError) as error:
            log.warning("container %s (%s) could not be started again: %s", container.name, id, error)
