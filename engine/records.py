"""The rows of `containers`, and the one way their state changes. Floor 3.

Only here: writing a container's row. Each change of state asks lifecycle.TRANSITIONS and lands with its event in one
transaction; whoever waits for a state is woken after the commit. Thread-safe; readers never wait for a writer.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from engine import history, lifecycle
from engine.config import ContainerConfig
from engine.errors import AlreadyExists, Busy, Gone, NotFound
from engine.events import Journal
from engine.lifecycle import State, Verb
from engine.store.meta import Meta

PINNED = "@"  # begins no name
COLUMNS = frozenset({"image", "runtime", "pid", "exit_code", "oom", "restarts", "started_ns", "finished_ns", "reason"})


@dataclass(frozen=True, slots=True)
class Container:
    """A container as of one commit."""

    id: str  # 64 hex digits
    name: str
    state: State
    config: ContainerConfig
    image: str  # manifest digest it was last started from; '' before
    runtime: str  # driver's name; '' before the first start
    pid: int | None
    exit_code: int | None  # of the last run
    oom: bool
    restarts: int
    created_ns: int
    started_ns: int | None
    finished_ns: int | None
    reason: str  # why it is in this state, '' when ordinary

    @property
    def object(self) -> str:
        """Its name in events and failures; stays the same when it is renamed."""
        return f"container/{self.id}"


@lru_cache(4096)
def _config(text: str) -> ContainerConfig:
    """Configs are immutable and read far more often than written."""
    return ContainerConfig.model_validate_json(text)


def _container(row: sqlite3.Row) -> Container:
    return Container(
        row["id"],
        row["name"],
        State(row["state"]),
        _config(row["config"]),
        row["image"],
        row["runtime"],
        row["pid"],
        row["exit_code"],
        bool(row["oom"]),
        row["restarts"],
        row["created_ns"],
        row["started_ns"],
        row["finished_ns"],
        row["reason"],
    )


def _missing(name: str) -> NotFound:
    return NotFound(f"no container named {name[:140]!r}", at=name[:140], hint="mkdir containers/NAME creates one")


class Records:
    """The containers of the catalog."""

    def __init__(self, meta: Meta, journal: Journal) -> None:
        self._meta = meta
        self._journal = journal
        self._changed = threading.Condition()  # taken under the write lock: nothing is queried while it is held
        self._generation = 0
        self._closing = False
        # called with (connection, before, after, verb) in the transaction of each change of state
        self.on_move: list[Callable[[sqlite3.Connection, Container, Container, Verb | None], None]] = []

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Container:
        """By name, or by PINNED and its id: what an open file has, so that it follows a rename."""
        key, value = ("id", name[1:]) if name.startswith(PINNED) else ("name", name)
        row = self._meta.row(f"SELECT * FROM containers WHERE {key} = ?", (value,))
        if row is None:
            raise _missing(name)
        return _container(row)

    def by_id(self, id: str) -> Container:
        """Gone when it has been removed."""
        row = self._meta.row("SELECT * FROM containers WHERE id = ?", (id,))
        if row is None:
            raise Gone("the container has been removed")
        return _container(row)

    def all(self) -> list[Container]:
        """Sorted by name."""
        return [_container(row) for row in self._meta.query("SELECT * FROM containers ORDER BY name")]

    def names(self) -> list[str]:
        return [row["name"] for row in self._meta.query("SELECT name FROM containers ORDER BY name")]

    def counts(self) -> dict[State, int]:
        rows = self._meta.query("SELECT state, count(*) AS n FROM containers GROUP BY state")
        return {State(row["state"]): row["n"] for row in rows}

    # --- writing ------------------------------------------------------------------------------------------------

    def create(self, name: str, config: ContainerConfig, prepare: Callable[[str], None]) -> Container:
        """A row in state created. `prepare(id)` makes its files inside the transaction. AlreadyExists when taken."""
        id = secrets.token_hex(32)
        with self._meta.tx() as db:
            try:
                db.execute(
                    "INSERT INTO containers (id, name, state, config, image, runtime, created_ns) "
                    "VALUES (?, ?, ?, ?, '', '', ?)",
                    (id, name, State.CREATED, config.model_dump_json(), time.time_ns()),
                )
            except sqlite3.IntegrityError as error:
                raise AlreadyExists(f"a container named {name} exists", at=name) from error
            digest = history.keep(db, config.model_dump_json())
            data = {"name": name, "image": config.image, "config": digest}
            seq = self._journal.append("containerCreated", f"container/{id}", data)
            history.note(db, id, seq, State.CREATED, digest)
            prepare(id)
            self._meta.after_commit(self.notify)
            return _container(db.execute("SELECT * FROM containers WHERE id = ?", (id,)).fetchone())

    def configure(self, id: str, change: Callable[[Container], ContainerConfig]) -> Container:
        """Replace the config by what `change` makes of it (or refuses); one event names the changed fields."""
        with self._meta.tx() as db:
            before = self._row(db, id)
            config = change(before)
            old, new = before.config.model_dump(mode="json"), config.model_dump(mode="json")
            fields = sorted(key for key in new if new[key] != old[key])
            if not fields:
                return before
            image = "" if {"image", "platform"} & set(fields) else before.image  # resolved anew by the next start
            db.execute(
                "UPDATE containers SET config = ?, image = ? WHERE id = ?", (config.model_dump_json(), image, id)
            )
            digest = history.keep(db, config.model_dump_json())
            data = {"name": before.name, "fields": fields, "config": digest}
            seq = self._journal.append("containerConfigured", before.object, data)
            history.note(db, id, seq, before.state, digest)
            self._meta.after_commit(self.notify)
            return self._row(db, id)

    def rename(self, id: str, name: str) -> Container:
        """AlreadyExists when the name is taken, also by itself; Busy while it is being removed."""
        with self._meta.tx() as db:
            before = self._row(db, id)
            if before.state is State.REMOVING:
                raise Busy("the container is being removed", at="rename")
            taken = db.execute("SELECT 1 FROM containers WHERE name = ?", (name,)).fetchone()
            if taken is not None:
                raise AlreadyExists(f"a container named {name} exists", at=name)
            db.execute("UPDATE containers SET name = ? WHERE id = ?", (name, id))
            self._journal.append("containerRenamed", before.object, {"name": name, "from": before.name})
            self._meta.after_commit(self.notify)
            return self._row(db, id)

    def move(
        self,
        id: str,
        to: State,
        *,
        verb: Verb | None = None,
        only: State | None = None,
        then: Callable[[Container], tuple[State, dict[str, Any]] | None] | None = None,
        **columns: Any,
    ) -> Container:
        """One transition with its event, in one transaction. Busy when the table (or `verb`) does not allow it.

        `only`: Busy as well unless the container is in exactly that state. `then` sees the new row and may name one
        more transition that lands in the same transaction. Removed deletes the row.
        """
        with self._meta.tx() as db:
            before = self._row(db, id)
            if verb is not None:
                lifecycle.permit(before.state, verb)
            if only is not None and before.state is not only:
                raise Busy(f"the container is no longer {only} but {before.state}")
            after = self._step(db, before, to, columns, verb)
            if then is not None and (more := then(after)) is not None:
                after = self._step(db, after, more[0], more[1], None)
            self._meta.after_commit(self.notify)
            return after

    def _step(
        self, db: sqlite3.Connection, before: Container, to: State, columns: dict[str, Any], verb: Verb | None
    ) -> Container:
        lifecycle.check(before.state, to)
        columns = {"reason": "", **columns}
        assert columns.keys() <= COLUMNS
        data: dict[str, Any] = {"name": before.name, "from": before.state, "to": to}
        if verb is not None:
            data["verb"] = verb
        data.update(
            {key: value for key, value in columns.items() if key not in ("started_ns", "finished_ns") and value}
        )
        if "exit_code" in columns and columns["exit_code"] is not None:
            data["exit_code"] = columns["exit_code"]
        seq = self._journal.append("stateChanged", before.object, data)
        if to is not State.REMOVED:
            history.note(db, before.id, seq, to, history.keep(db, before.config.model_dump_json()))
        if before.state is State.STOPPING:
            db.execute("DELETE FROM meta WHERE key = ?", (f"stopping/{before.id}",))
        if to is State.STOPPING and verb is Verb.RESTART:
            self.note_restart(before.id)
        elif to in (State.RUNNING, State.REMOVING) or before.state is State.STARTING:  # done, refused or failed
            db.execute("DELETE FROM meta WHERE key = ?", (f"restarting/{before.id}",))
        if to is State.REMOVED:
            db.execute("DELETE FROM containers WHERE id = ?", (before.id,))
            db.execute("DELETE FROM failures WHERE object = ?", (before.object,))
            db.execute("DELETE FROM meta WHERE key = ?", (f"told/{before.id}",))
            history.forget(db, before.id)
            self._journal.append("containerRemoved", before.object, {"name": before.name})
            self._moved(db, before, replace(before, state=State.REMOVED), verb)
            return before
        assignments = "".join(f", {key} = ?" for key in columns)
        db.execute(f"UPDATE containers SET state = ?{assignments} WHERE id = ?", (to, *columns.values(), before.id))
        after = self._row(db, before.id)
        self._moved(db, before, after, verb)
        return after

    def _moved(self, db: sqlite3.Connection, before: Container, after: Container, verb: Verb | None) -> None:
        for call in self.on_move:
            call(db, before, after, verb)

    def _row(self, db: sqlite3.Connection, id: str) -> Container:
        row = db.execute("SELECT * FROM containers WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise Gone("the container has been removed")
        return _container(row)

    def last_output(self, id: str) -> dict[str, int]:
        """Bytes of each log stream that logOutput events have told of so far."""
        row = self._meta.row(
            "SELECT line FROM events WHERE object = ? AND type = 'logOutput' ORDER BY obj_off DESC LIMIT 1",
            (f"container/{id}",),
        )
        if row is None:  # never, or that event has left the journal
            row = self._meta.row("SELECT value FROM meta WHERE key = ?", (f"told/{id}",))
            return json.loads(row["value"]) if row else {}
        data = json.loads(bytes(row["line"]))
        return {stream: int(data.get(f"{stream}_end", 0)) for stream in ("stdout", "stderr")}

    def note_stop(self, id: str, until_ns: int) -> None:
        """The stop signal has been sent; SIGKILL follows at `until_ns` (Unix time). Forgotten when it has stopped."""
        with self._meta.tx() as db:
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (f"stopping/{id}", str(until_ns)))

    def stop_noted(self, id: str) -> int | None:
        """When SIGKILL follows; None when the stop signal may not have been sent."""
        row = self._meta.row("SELECT value FROM meta WHERE key = ?", (f"stopping/{id}",))
        return int(row["value"]) if row else None

    def note_restart(self, id: str) -> None:
        """It is to be started once it has stopped. Forgotten when that has come to an end, good or bad."""
        with self._meta.tx() as db:
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, '')", (f"restarting/{id}",))

    def restart_noted(self, id: str) -> bool:
        """Whether a restart is under way."""
        return self._meta.row("SELECT 1 FROM meta WHERE key = ?", (f"restarting/{id}",)) is not None

    def note_leaving(self, id: str, network: str) -> None:
        """It is to leave a network: host first, config last."""
        with self._meta.tx() as db:
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, '')", (f"leaving/{id}/{network}",))

    def forget_leaving(self, id: str, network: str) -> None:
        with self._meta.tx() as db:
            db.execute("DELETE FROM meta WHERE key = ?", (f"leaving/{id}/{network}",))

    def leaving(self) -> list[tuple[str, str]]:
        """(container's id, network) of what a killed daemon did not finish."""
        rows = self._meta.query("SELECT key FROM meta WHERE key LIKE 'leaving/%'")
        return [(key[1], key[2]) for row in rows if len(key := row["key"].split("/")) == 3]

    # --- waiting ------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Something that waiters look at has changed."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def wait(self, id: str, until: Callable[[Container], bool], timeout: float | None) -> Container | None:
        """The container once `until` holds; None after `timeout` seconds or when closing. Gone when it is removed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                generation = self._generation
            if until(container := self.by_id(id)):
                return container
            with self._changed:
                rest = None if deadline is None else deadline - time.monotonic()
                if self._closing or (rest is not None and rest <= 0):
                    return None
                self._changed.wait_for(lambda seen=generation: self._generation != seen or self._closing, rest)  # type: ignore[misc]

    @property
    def closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Wake all who wait."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
