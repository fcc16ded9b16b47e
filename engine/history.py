"""What a container was after each event: its state and config, as long as the journal has the event. Floor 1.

Only here: the tables `history` and `configs`. A row is written in the transaction of the event it belongs to; configs
are kept once each, by digest, and their events name it. Retention deletes both with the journal. Thread-safe.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

from engine.config import ContainerConfig
from engine.errors import NotFound
from engine.events import Journal, rfc3339
from engine.fields import config_text
from engine.lifecycle import State
from engine.store.meta import Meta

LISTED = 1000  # newest entries that a listing shows; older ones are found by number


def keep(db: sqlite3.Connection, text: str) -> str:
    """Keep a config; its digest."""
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    db.execute("INSERT OR IGNORE INTO configs VALUES (?, ?)", (digest, text))
    return digest


def note(db: sqlite3.Connection, id: str, seq: int, state: State, digest: str) -> None:
    """What the container is after event `seq`."""
    db.execute("INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?)", (id, seq, state, digest))


def forget(db: sqlite3.Connection, id: str) -> None:
    """It has been removed."""
    rows = db.execute("SELECT DISTINCT config FROM history WHERE container = ?", (id,)).fetchall()
    db.execute("DELETE FROM history WHERE container = ?", (id,))
    db.executemany(  # only its own: a look at all of history would take its time, and hold the catalog meanwhile
        "DELETE FROM configs WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM history WHERE config = ?1)",
        [(row["config"],) for row in rows],
    )


class Entry(NamedTuple):
    state: State
    config: str  # config.yaml
    event: bytes  # its JSON line
    time: str  # RFC 3339


class History:
    def __init__(self, meta: Meta, journal: Journal) -> None:
        self._meta, self._journal = meta, journal

    def adopt(self) -> None:
        """Containers of a store that was written before there was a history have one from now on."""
        missing = "SELECT id, state, config FROM containers WHERE id NOT IN (SELECT container FROM history)"
        if self._meta.row(missing) is None:
            return
        with self._meta.tx() as db:
            for row in db.execute(missing).fetchall():
                note(db, row["id"], self._journal.last, State(row["state"]), keep(db, row["config"]))

    def numbers(self, id: str) -> list[int]:
        """The events that changed its state or config, oldest first; the newest LISTED of them."""
        rows = self._meta.query(
            "SELECT seq FROM history WHERE container = ? AND seq IN (SELECT seq FROM events) ORDER BY seq DESC LIMIT ?",
            (id, LISTED),
        )
        return [row["seq"] for row in reversed(rows)]

    def has(self, id: str, seq: int) -> bool:
        """Whether there is an entry: for every event of the container, whatever it tells of."""
        return (
            self._meta.row(
                "SELECT 1 FROM events WHERE seq = ? AND object = ?"
                " AND EXISTS (SELECT 1 FROM history WHERE container = ? AND seq <= ?)",
                (seq, f"container/{id}", id, seq),
            )
            is not None
        )

    def at(self, id: str, seq: int) -> Entry:
        """NotFound once the journal has let it go."""
        row = self._meta.row(
            "SELECT h.state, c.text, e.line, e.time_ns FROM events e JOIN history h ON h.container = ? AND h.seq ="
            " (SELECT max(seq) FROM history WHERE container = ? AND seq <= e.seq)"
            " JOIN configs c ON c.digest = h.config WHERE e.seq = ? AND e.object = ?",
            (id, id, seq, f"container/{id}"),
        )
        if row is None:
            raise NotFound(f"event {seq} of this container is not in the journal (any more)", at=str(seq))
        config = config_text(ContainerConfig.model_validate_json(row["text"]))
        return Entry(State(row["state"]), config, bytes(row["line"]), rfc3339(row["time_ns"]))
