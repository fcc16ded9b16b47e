"""The journal stays bounded: events older, or more, than the policy allows are deleted. Floor 1.

Only here: which events go, and what has to stay of them. They go oldest first, a small transaction at a time, from one
background thread. Offsets and sequence numbers never change: the first event that is kept, and the offset of its line,
are noted in `meta`; what was before reads as newlines, and who reads from the beginning does not see it.

Of what goes stays: the newest event of each object that still exists (its own file goes on from there), up to where
logOutput has told of each container's output, and each container's state and config before the first event kept.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable

from engine.errors import EngineError
from engine.events import FIRST, Journal
from engine.store.meta import Meta
from engine.store.policy import Policy

log = logging.getLogger(__name__)

EVERY = 60.0  # seconds
BATCH = 500  # events of one transaction: some 10 ms
PAUSE = 0.02  # seconds between two, for others to write


class Retention:
    def __init__(self, meta: Meta, journal: Journal, policy: Callable[[], Policy]) -> None:
        self._meta, self._journal, self._policy = meta, journal, policy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                if gone := self.prune():
                    log.info("%d events were deleted, as the policy says", gone)
            except (EngineError, sqlite3.Error, OSError) as error:
                log.warning("the journal was not pruned: %s", error)

    def prune(self, now_ns: int | None = None) -> int:
        """Delete what the policy lets go now; how many events that were."""
        policy = self._policy()
        now = time.time_ns() if now_ns is None else now_ns
        old = 0 if policy.events_max_age is None else now - int(policy.events_max_age * 1e9)
        many = 0 if policy.events_max is None else self._journal.last - policy.events_max
        gone = 0
        while not self._stop.is_set():
            with self._meta.tx() as db:
                count = self._batch(db, old, many)
            gone += count
            if count < BATCH:
                break
            self._stop.wait(PAUSE)
        if gone:
            with self._meta.tx() as db:
                self._islands(db)
        return gone

    def _batch(self, db: sqlite3.Connection, old: int, many: int) -> int:
        first, _ = self._journal.kept
        rows = db.execute(
            "SELECT seq, time_ns, type, object, line, off + length(line) AS end FROM events WHERE seq >= ?"
            " ORDER BY seq LIMIT ?",
            (first, BATCH),
        ).fetchall()
        doomed = []
        for row in rows:
            if (row["seq"] > many and row["time_ns"] >= old) or row["seq"] >= self._journal.last:
                break
            doomed.append(row)
        if not doomed:
            return 0
        first, offset = doomed[-1]["seq"] + 1, doomed[-1]["end"]
        for row in doomed:
            if row["type"] == "logOutput":
                data = json.loads(bytes(row["line"]))
                told = {stream: data.get(f"{stream}_end", 0) for stream in ("stdout", "stderr")}
                db.execute(
                    "INSERT OR REPLACE INTO meta SELECT 'told/' || id, ? FROM containers WHERE id = ?",
                    (json.dumps(told), row["object"].removeprefix("container/")),
                )
        stays = {seq for object in {row["object"] for row in doomed} if (seq := self._newest(db, object))}
        db.executemany("DELETE FROM events WHERE seq = ?", [(row["seq"],) for row in doomed if row["seq"] not in stays])
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (FIRST, f"{first} {offset}"))
        self._meta.after_commit(lambda: self._journal.forget_before(first, offset))
        return len(doomed)

    def _newest(self, db: sqlite3.Connection, object: str) -> int | None:
        """The newest event of an object that still exists; None for what is gone for good."""
        kind, _, name = object.partition("/")
        if kind == "job":
            return None  # each has its own file
        if kind == "container" and not db.execute("SELECT 1 FROM containers WHERE id = ?", (name,)).fetchone():
            return None
        row = db.execute("SELECT seq FROM events WHERE object = ? ORDER BY obj_off DESC LIMIT 1", (object,)).fetchone()
        return int(row["seq"]) if row else None

    def _islands(self, db: sqlite3.Connection) -> None:
        """What earlier turns have kept of objects, once newer events or their end make it needless."""
        first, _ = self._journal.kept
        for row in db.execute("SELECT seq, object FROM events WHERE seq < ?", (first,)).fetchall():
            if self._newest(db, row["object"]) != row["seq"]:
                db.execute("DELETE FROM events WHERE seq = ?", (row["seq"],))
        db.execute(
            "DELETE FROM history WHERE seq < (SELECT max(h.seq) FROM history h"
            " WHERE h.container = history.container AND h.seq <= ?)",
            (first,),
        )
        db.execute("DELETE FROM configs WHERE digest NOT IN (SELECT config FROM history)")
