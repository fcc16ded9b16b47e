"""What went wrong last: the `error` file beside every `ctl`. Floor 1.

Only here: how a failure reads. errno says that a command failed, this says what: the last 8 per object, newest first,
each with time, the command, a caret line under the token at fault, the reason, and what to do. Kept in the catalog, so
they survive a restart. Thread-safe; `text` never waits for a writer.
"""

from __future__ import annotations

import errno
import sqlite3
import time

from engine.errors import EngineError
from engine.events import rfc3339
from engine.store.meta import Meta

KEPT = 8  # per object
MAX_COMMAND = 2000  # characters of the command that are kept
MAX_REASON = 4000
INDENT = "    "


def render(command: str, error: EngineError, time_ns: int) -> str:
    """One failure as people read it:

    2026-01-31T12:00:00Z EINVAL
        stopp 10
        ^^^^^
    unknown verb
    hint: one of start, stop
    """
    name = errno.errorcode.get(error.errno, str(error.errno))
    stamp = rfc3339(time_ns)[:19] + "Z"
    lines = [f"{stamp} {name}"]
    shown = _shown(command)
    if shown:
        lines.append(INDENT + shown[:MAX_COMMAND] + ("…" if len(shown) > MAX_COMMAND else ""))
        start = _find(shown, error.at)
        if error.at and 0 <= start < MAX_COMMAND:
            lines.append(INDENT + " " * start + "^" * max(1, min(len(_shown(error.at)), MAX_COMMAND - start)))
    reason = "\n".join(_shown(line) for line in error.reason.splitlines() if line.strip()) or name
    lines.append(reason[:MAX_REASON])
    if error.hint:
        lines.append(f"hint: {_shown(error.hint)[:MAX_REASON]}")
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    """One line without control characters: what is written to a ctl may end up on a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).rstrip()


def _find(command: str, at: str | None) -> int:
    """Where the token at fault starts in the command; as a whole word if there is one; -1 when it is not in it."""
    if not at:
        return -1
    token = _shown(at)
    start = -1
    while (start := command.find(token, start + 1)) >= 0:
        end = start + len(token)
        if (start == 0 or command[start - 1] == " ") and (end == len(command) or command[end] == " "):
            return start
    return command.find(token)


class Failures:
    """The failures in the catalog. `object` is '' for the root, images, containers, container/<id>, volume/<name>, …"""

    def __init__(self, meta: Meta) -> None:
        self._meta = meta

    def record(self, object: str, command: str, error: EngineError) -> None:
        """Keep `error` as the newest failure of `object`; `command` is the line as written (or what was attempted).

        Never fails because the disk is full: then the errno alone has to do.
        """
        now = time.time_ns()
        try:
            with self._meta.tx() as db:
                db.execute(
                    "INSERT INTO failures (object, time_ns, text) VALUES (?, ?, ?)",
                    (object, now, render(command, error, now)),
                )
                db.execute(
                    "DELETE FROM failures WHERE object = ? AND id NOT IN "
                    "(SELECT id FROM failures WHERE object = ? ORDER BY id DESC LIMIT ?)",
                    (object, object, KEPT),
                )
        except (sqlite3.OperationalError, EngineError):
            return  # nothing may hide the failure itself

    def text(self, object: str) -> str:
        """The file: newest first, a blank line between; empty when there is none."""
        rows = self._meta.query("SELECT text FROM failures WHERE object = ? ORDER BY id DESC", (object,))
        return "\n".join(row["text"] for row in rows)

    def mtime_ns(self, object: str) -> int:
        """When the newest failure happened, Unix time; 0 when there is none."""
        row = self._meta.row("SELECT time_ns FROM failures WHERE object = ? ORDER BY id DESC LIMIT 1", (object,))
        return int(row["time_ns"]) if row else 0

    def clear(self, object: str) -> None:
        """Forget all failures of `object` (also called when it is removed)."""
        with self._meta.tx() as db:
            db.execute("DELETE FROM failures WHERE object = ?", (object,))
