"""The event journal: what happened, in order, for good. Floor 1.

Only here: sequence numbers, the JSON lines of the `events` files and their byte offsets, and subscriptions. `append`
joins the caller's transaction, so an event exists exactly when the change it tells of does; sequence numbers start at 1
and have no gaps, because a rolled back one is given out again. Subscribers hear of an event after its commit, in order.

Threading: append from any thread (inside or outside `Meta.tx`); size, read, replay never wait for a writer;
publishing happens under the write lock and only appends to bounded queues, so a slow subscriber slows nobody: it is
told which events it missed and reads them with `replay`.

Retention (retention.py) deletes the oldest events, but never the newest of all nor the newest of an object that exists,
since sequence numbers and offsets go on from there; offsets of what stays do not change. `first` is where the kept part
begins; what was before it reads as newlines.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from engine.store.meta import Meta

MAX_LINE = 64 << 10  # bytes; longer data is a fault of ours
PAGE = 512  # events fetched at a time
FIRST = "events/first"  # key in `meta`: "seq offset" of the oldest event kept
RESERVED = frozenset({"seq", "time", "type", "object", "who"})

_who: ContextVar[str] = ContextVar("dutchman_who", default="")


@contextmanager
def acting(who: str) -> Iterator[None]:
    """Events appended by this thread in the block carry `who` (such as `uid=1000 pid=4711`)."""
    token = _who.set(who)
    try:
        yield
    finally:
        _who.reset(token)


def acting_as() -> str:
    """Who acts in this thread, '' for the engine itself. For handing over to a worker thread."""
    return _who.get()


def rfc3339(time_ns: int) -> str:
    """UTC with nanoseconds, as container logs write it: 2026-01-31T12:00:00.000000001Z."""
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanos:09d}Z"


@dataclass(frozen=True, slots=True)
class Event:
    seq: int
    time_ns: int
    type: str
    object: str  # container/<id>, image/<digest>, volume/<name>, job/<n>, engine
    data: dict[str, Any]  # what the line holds beyond the above
    who: str
    line: bytes  # as in the file, with its newline


@dataclass(frozen=True, slots=True)
class Missed:
    """A subscriber was too slow for these; `Journal.replay(first - 1)` has what has not been deleted since."""

    first: int
    last: int


def _event(row: Any) -> Event:
    line = bytes(row["line"])
    data = json.loads(line)
    who = str(data.get("who", ""))
    data = {key: value for key, value in data.items() if key not in RESERVED}
    return Event(row["seq"], row["time_ns"], row["type"], row["object"], data, who, line)


class Subscription:
    """Events in order from one point on. Iterate, or `get` with a timeout; one consumer thread; `close` from any."""

    def __init__(self, journal: Journal, capacity: int, replay_from: int | None, live_after: int) -> None:
        self._journal = journal
        self._capacity = capacity
        self._condition = threading.Condition()
        self._queue: deque[Event | Missed] = deque()
        self._replayed = replay_from  # last seq handed out while catching up; None once live
        self._live_after = live_after  # events up to here come from the journal
        self._page: deque[Event] = deque()
        self._closed = False

    def _publish(self, event: Event) -> None:
        with self._condition:
            if self._closed:
                return
            last = self._queue[-1] if self._queue else None
            if isinstance(last, Missed):
                self._queue[-1] = Missed(last.first, event.seq)
            elif len(self._queue) >= self._capacity:
                self._queue.append(Missed(event.seq, event.seq))
            else:
                self._queue.append(event)
            self._condition.notify()

    def get(self, timeout: float | None = None) -> Event | Missed | None:
        """The next one; None after `timeout` seconds without any, or when closed."""
        if self._replayed is not None:
            if not self._page and self._replayed < self._live_after:
                self._page.extend(self._journal.replay(self._replayed, min(PAGE, self._live_after - self._replayed)))
            if self._page:
                if self._page[0].seq > self._replayed + 1:  # what was between has been deleted
                    missed = Missed(self._replayed + 1, self._page[0].seq - 1)
                    self._replayed = missed.last
                    return missed
                event = self._page.popleft()
                self._replayed = event.seq
                return event
            self._replayed = None
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self._closed, timeout)
            return self._queue.popleft() if self._queue and not self._closed else None

    def __iter__(self) -> Iterator[Event | Missed]:
        while (item := self.get()) is not None:
            yield item

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._queue.clear()
            self._condition.notify_all()
        self._journal._forget(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Journal:
    """The journal in the catalog `meta`."""

    def __init__(self, meta: Meta) -> None:
        self._meta = meta
        self._subscribers: list[Subscription] = []
        self._lock = threading.Lock()
        row = meta.row("SELECT seq FROM events ORDER BY seq DESC LIMIT 1")
        self._last: int = row["seq"] if row else 0
        noted = meta.row("SELECT value FROM meta WHERE key = ?", (FIRST,))
        seq, off = map(int, noted["value"].split()) if noted else (1, 0)
        self._kept = (seq, off)

    @property
    def last(self) -> int:
        """The newest sequence number; 0 before the first event."""
        return self._last

    @property
    def kept(self) -> tuple[int, int]:
        """Sequence number and offset of the oldest event kept; all after it are there."""
        return self._kept

    def forget_before(self, seq: int, offset: int) -> None:
        """Retention has deleted all before `seq`, whose line begins at `offset`."""
        self._kept = (seq, offset)

    def first(self, object: str | None = None) -> int:
        """Offset of the oldest line kept in the `events` file, of all or of one object."""
        if object is None:
            return self._kept[1]
        row = self._meta.row("SELECT obj_off FROM events WHERE object = ? ORDER BY obj_off LIMIT 1", (object,))
        return int(row["obj_off"]) if row else 0

    def append(self, type: str, object: str, data: dict[str, Any], *, who: str = "") -> int:
        """Write one event in the open transaction (or one of its own) and return its sequence number.

        `who` defaults to what `acting` says. `data` is JSON and must not use the names seq, time, type, object, who.
        """
        clash = RESERVED & data.keys()
        if clash:
            raise ValueError(f"event data uses the reserved key {sorted(clash)[0]!r}")
        who = who or _who.get()
        now = time.time_ns()
        with self._meta.tx() as db:
            last = db.execute("SELECT seq, off + length(line) AS end FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            seq = last["seq"] + 1 if last else 1
            own = db.execute(
                "SELECT obj_off + length(line) AS end FROM events WHERE object = ? ORDER BY obj_off DESC LIMIT 1",
                (object,),
            ).fetchone()
            fields: dict[str, Any] = {"seq": seq, "time": rfc3339(now), "type": type, "object": object, **data}
            if who:
                fields["who"] = who
            line = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
            if len(line) > MAX_LINE:
                raise ValueError(f"event {type} is larger than {MAX_LINE} bytes")
            off = last["end"] if last else 0
            db.execute(
                "INSERT INTO events (seq, time_ns, type, object, off, obj_off, line) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (seq, now, type, object, off, own["end"] if own else 0, line),
            )
            event = Event(seq, now, type, object, json.loads(json.dumps(data)), who, line)
            self._meta.after_commit(lambda: self._publish(event))
        return int(seq)

    def _publish(self, event: Event) -> None:
        with self._lock:
            self._last = event.seq
            for subscriber in self._subscribers:
                subscriber._publish(event)

    def _forget(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscribers:
                self._subscribers.remove(subscription)

    def size(self, object: str | None = None) -> int:
        """Bytes of the `events` file, of all or of one object. Live: who has seen a change finds its event in it."""
        if object is None:
            row = self._meta.row("SELECT off + length(line) AS end FROM events ORDER BY seq DESC LIMIT 1")
        else:
            row = self._meta.row(
                "SELECT obj_off + length(line) AS end FROM events WHERE object = ? ORDER BY obj_off DESC LIMIT 1",
                (object,),
            )
        return int(row["end"]) if row else 0

    def read(self, offset: int, size: int, object: str | None = None) -> bytes:
        """`size` bytes at `offset` of the `events` file, of all or of one object; short only at its end. Newlines where
        events have been deleted."""
        if size <= 0 or offset < 0:
            return b""
        while True:
            kept, first = self._kept[0], self.first(object)
            if offset < first:
                gap = min(size, first - offset)
                return b"\n" * gap + self.read(offset + gap, size - gap, object)
            data = self._lines(offset, size, object, kept if object is None else 0)
            if data is not None:
                return data

    def _lines(self, offset: int, size: int, object: str | None, kept: int) -> bytes | None:
        """The bytes, when they are still there; None when some were deleted meanwhile."""
        column, where, args = (
            ("off", "seq >= ? AND ", (kept,)) if object is None else ("obj_off", "object = ? AND ", (object,))
        )
        # the line that holds `offset` is the last that starts at or before it
        row = self._meta.row(
            f"SELECT {column} AS at FROM events WHERE {where}{column} <= ? ORDER BY {column} DESC LIMIT 1",
            (*args, offset),
        )
        if row is None:
            return b"" if self.first(object) <= offset else None
        start = at = int(row["at"])
        out = bytearray()
        while at < offset + size:
            rows = self._meta.query(
                f"SELECT {column} AS at, line FROM events WHERE {where}{column} >= ? AND {column} < ?"
                f" ORDER BY {column} LIMIT {PAGE}",
                (*args, at, offset + size),
            )
            for row in rows:
                if row["at"] != start + len(out):
                    return None
                out += row["line"]
            at = start + len(out)
            if len(rows) < PAGE:
                break
        return bytes(out[offset - start : offset - start + size])

    def replay(self, since: int, limit: int = PAGE) -> list[Event]:
        """Up to `limit` events after sequence number `since` that are still there, oldest first."""
        since = max(since, self._kept[0] - 1)
        rows = self._meta.query("SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (since, limit))
        return [_event(row) for row in rows]

    def subscribe(self, since: int | None = None, capacity: int = 1024) -> Subscription:
        """From now on, or from just after `since` on: first from the journal, then live, without gap or repeat.

        At most `capacity` events wait for the consumer; those beyond it become one `Missed`.
        """
        with self._lock:
            subscription = Subscription(self, capacity, since, self._last)
            self._subscribers.append(subscription)
        return subscription

    def close(self) -> None:
        """End all subscriptions."""
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            subscriber.close()
