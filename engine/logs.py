"""A container's log as three ever-growing logical files over what conmon writes. Nothing is copied on the write path.

Floor 1. `ContainerLogs` is the one reader and the one who rotates. Offsets never change: a follower reads on through
rotation, compression, restarts of the container and of the daemon. How a rotation goes, and what a crash leaves:

    1 rename ctr.log -> ctr.log.<n>      no ctr.log: conmon still writes to <n>; the next maybe_rotate asks it again
    2 conmon reopens: a new ctr.log      <n> is frozen from here on (conmon opens the new file, then renames it there)
    3 ctr.log.<n>.idx, then .zst         *.tmp is removed on open; a .zst has its name only when whole and synced
    4 remove ctr.log.<n>, as *.old.tmp   both there: the plain one goes

Threading: one lock, held for a bounded piece of work (an index step is some 100 µs). One helper thread per log comes
and goes with the work: catching up with a large backlog, compressing. `size` indexes for at most 50 ms and then answers
with what is indexed so far, so it never shrinks and everything below it can be read at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from engine.errors import InvalidArgument, NotFound
from engine.logformat import JSONL, STDOUT, VIEWS, parse
from engine.logindex import Segment, in_background
from engine.logpieces import shared as pieces

log = logging.getLogger(__name__)

BUDGET = 0.05  # seconds of indexing per call
ASK_AGAIN = 5.0  # seconds until conmon is asked once more to reopen: twice at once would lose what is in between
ROOM = 32 << 20  # free bytes below which nothing is rotated: conmon ends when it cannot open its new file
WORTH_SAVING = 32 << 20  # raw bytes of a current segment whose index is saved on close
OPEN_SEGMENTS = 8  # rotated segments whose file and checkpoints are kept in memory
_NAME = re.compile(r"^ctr\.log\.([1-9][0-9]{0,8})(\.zst|\.idx)?$")


class ContainerLogs:
    def __init__(self, directory: Path) -> None:
        """`directory` is containers/<id>/logs. Repairs what a crash left of a rotation."""
        self.current = directory / "ctr.log"
        self._directory = directory
        self._lock = threading.RLock()
        self._segments: list[Segment] = []  # oldest first; the last one grows
        self._bases: dict[str, list[int]] = {view: [0] for view in VIEWS}  # view offset where each segment starts
        self._used: OrderedDict[int, Segment] = OrderedDict()  # rotated segments read lately
        self._retiring: Segment | None = None  # renamed, but conmon may still write to it
        self._asked = -ASK_AGAIN
        self._helper: threading.Thread | None = None
        self._json_wanted = False
        self._closed = False
        with self._lock:
            self._find()

    # --- reading ------------------------------------------------------------------------------------------------

    def size(self, view: str) -> int:
        """Bytes of `view` that can be read now. Never shrinks; may lag behind a large backlog (see `caught_up`)."""
        with self._lock:
            self._check(view)
            self._advance(view, BUDGET)
            return self._total(view)

    def read(self, view: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; short only at the end of what `size(view)` would answer."""
        out = []
        with self._lock:
            self._check(view)
            if offset < 0 or size < 0:
                raise InvalidArgument("negative offset or size")
            if offset + size > self._total(view):
                self._advance(view, BUDGET)
            end = min(offset + size, self._total(view))
            while offset < end:
                part = self._part(view, offset, end - offset)
                out.append(part)
                offset += len(part)
        return b"".join(out)

    def caught_up(self, view: str, seconds: float = 1.0) -> bool:
        """Wait up to `seconds` until `size(view)` is all there is on disk now."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                self._check(view)
                if not self._advance(view, BUDGET):
                    return True
            if time.monotonic() > until:
                return False

    def mtime_ns(self) -> int:
        """Unix time of the last write."""
        with self._lock:
            self._grow()
            for segment in reversed(self._segments):
                if found := segment.mtime_ns():
                    return found
            return os.stat(self._directory).st_mtime_ns if self._directory.exists() else 0

    def close(self) -> None:
        """Stop the helper and close files. Saves the index of a large current segment, so reopening is fast."""
        with self._lock:
            self._closed = True
            helper = self._helper
        if helper is not None and helper is not threading.current_thread():
            helper.join(10)
        with self._lock:
            for segment in self._segments:
                if segment.number is None and segment.raw >= WORTH_SAVING:
                    try:
                        segment.save()
                    except OSError as error:  # a full disk, say: it is made again then
                        log.warning("the index of %s was not saved: %s", segment.path, error)
                segment.close()
            pieces.forget(self._segments)

    def rest(self) -> None:
        """Close files until the next read. Not while a rotation or the helper needs them."""
        with self._lock:
            if self._retiring is None and self._helper is None:
                for segment in self._segments:
                    segment.close()
                self._used.clear()
                pieces.forget(self._segments)

    # --- rotation -----------------------------------------------------------------------------------------------

    def maybe_rotate(self, max_size: int | None, max_age: float | None, reopen: Callable[[], None]) -> bool:
        """Rotate when the current segment is larger (bytes) or its first record older (seconds) than the bound.

        To be called about once a second while the container runs, and once after it stopped. `reopen` has the writer
        reopen `current` by name and raises NotFound when there is no writer. True when a rotation began.
        """
        with self._lock:
            if self._closed:
                return False
            self._grow()
            if self._retiring is not None:
                self._ask(reopen)
                return False
            if not self._segments or self._segments[-1].number is not None:
                return False  # nothing is there, or nothing new since the last rotation
            segment = self._segments[-1]
            size = segment.file_size()
            large = max_size is not None and size >= max(max_size, 1)
            old = not large and max_age is not None and size > 0 and self._age(segment) >= max_age
            if not (large or old) or not self._room():
                return False
            number = max([other.number or 0 for other in self._segments] + [0]) + 1
            target = self._directory / f"{self.current.name}.{number}"
            os.rename(self.current, target)
            segment.path, segment.number = target, number
            self._retiring = segment
            self._ask(reopen)
            return True

    def _ask(self, reopen: Callable[[], None]) -> None:
        now = time.monotonic()
        if now - self._asked < ASK_AGAIN:
            return
        self._asked = now
        try:
            reopen()
        except NotFound:  # nobody writes any more
            if self._retiring is not None and not self.current.exists():
                self._freeze(self._retiring)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise

    def _freeze(self, segment: Segment) -> None:
        segment.frozen = True
        self._retiring = None
        self._asked = -ASK_AGAIN
        self._help()

    def _age(self, segment: Segment) -> float:
        """Seconds since the first record, by its own time."""
        record = parse(segment.pread(256, 0).partition(b"\n")[0])
        if record is None:
            return 0.0
        try:
            return time.time() - datetime.fromisoformat(record[0].decode("ascii", "replace")).timestamp()
        except ValueError:
            return 0.0

    def _room(self) -> bool:
        info = os.statvfs(self._directory)
        return info.f_bavail * info.f_frsize >= ROOM and (info.f_files == 0 or info.f_favail > 16)

    def first(self, view: str) -> int:
        """Offset in `view` of the oldest byte that is still kept."""
        with self._lock:
            self._check(view)
            dropped = bool(self._segments and self._segments[0].dropped)
            if dropped:
                self._advance(view, BUDGET)
            return self._bases[view][min(1, len(self._bases[view]) - 1)] if dropped else 0

    def drop(self, keep: int) -> int:
        """Remove the oldest compressed segments until at most `keep` bytes of files are left; what they freed.

        Their totals stay, so no offset changes: the dropped bytes read as newlines. What was dropped before becomes
        one with it: the index of the newest dropped segment stands for all up to it.
        """
        freed = 0
        while True:
            with self._lock:
                position = int(bool(self._segments and self._segments[0].dropped))
                if self._closed or position >= len(self._segments):
                    return freed
                segment = self._segments[position]
                size = segment.disk_size()
                if sum(other.disk_size() for other in self._segments) <= keep or not self._sealed(segment):
                    return freed
                if segment.advance_json():
                    continue  # a piece at a time: readers have the lock in between
                segment.drop(self._segments[0] if position else None)
                if position:
                    self._used.pop(self._segments[0].number or 0, None)
                    del self._segments[0]
                    for bases in self._bases.values():
                        del bases[1:2]
                pieces.forget((segment,))
                freed += size

    def _sealed(self, segment: Segment) -> bool:
        return segment.dropped or (segment.complete and not segment.path.exists())

    # --- the lock is held below ---------------------------------------------------------------------------------

    def _check(self, view: str) -> None:
        if view not in VIEWS:
            raise InvalidArgument(f"no log view {view!r}", at=view, hint=f"one of {', '.join(VIEWS)}")

    def _find(self) -> None:
        """The segments on disk, after repairing what a crash left."""
        found: dict[int, set[str]] = {}
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            match = _NAME.match(name)
            if match:
                found.setdefault(int(match[1]), set()).add(match[2] or "")
            elif name.endswith((".zst.tmp", ".idx.tmp", ".old.tmp")):
                (self._directory / name).unlink(missing_ok=True)
        live = self.current.exists()
        for number in sorted(found):
            kinds = found[number]
            segment = Segment(self._directory / f"{self.current.name}.{number}", number)
            if {"", ".zst"} <= kinds:
                segment.path.unlink()
            if kinds == {".idx"}:
                segment.dropped = True
                if not segment.restore_dropped():
                    segment.sidecar.unlink()
                    continue
                while self._segments:  # it stands for these too: a crash came before they were removed
                    self._segments.pop().sidecar.unlink()
            segment.frozen = True
            if not segment.dropped and ".zst" in kinds and ".idx" in kinds:
                segment.restore()
                segment.close()
            self._segments.append(segment)
        if not live and self._segments and self._segments[-1].path.exists():
            self._retiring = self._segments[-1]  # conmon may still write to it, or never got the word
            self._retiring.frozen = False
            self._asked = time.monotonic()
        if any(not self._sealed(segment) for segment in self._segments):
            self._help()

    def _grow(self) -> None:
        """Take in a ctr.log that has appeared: what was retiring is frozen from then on."""
        growing = self._segments and not self._segments[-1].frozen and self._retiring is None
        if growing or self._closed:
            return
        segment = Segment(self.current, None)
        if not segment.open():
            return
        segment.restore_current()
        if self._retiring is not None:
            self._freeze(self._retiring)
        self._segments.append(segment)

    def _advance(self, view: str, budget: float) -> bool:
        """Index for up to `budget` seconds; True when more is left, for the helper."""
        self._grow()
        until = time.monotonic() + budget
        if view == JSONL:
            self._json_wanted = True
        for position, segment in enumerate(self._segments):
            bases = self._bases[view]
            while True:
                if position + 1 < len(bases):
                    break
                if segment.known(view):
                    bases.append(bases[-1] + segment.sizes[view])
                    if segment.dirty:
                        self._help()  # to write down what was just found out
                    break
                stepped = segment.advance()
                if view == JSONL:
                    stepped = segment.advance_json() or stepped
                if not stepped:
                    if segment.known(view):
                        continue
                    return False  # the end of what is on disk
                if time.monotonic() > until:
                    self._help()
                    return True
        self._grow()
        return False

    def _total(self, view: str) -> int:
        bases = self._bases[view]
        last = len(bases) - 1
        return bases[-1] + (self._segments[last].sizes[view] if last < len(self._segments) else 0)

    def _part(self, view: str, offset: int, size: int) -> bytes | memoryview:
        """Some bytes at `offset`, at least one; `offset` is below the total."""
        bases = self._bases[view]
        number = bisect_right(bases, offset) - 1  # the last that starts there: empty segments share their start
        segment, inside = self._segments[number], offset - bases[number]
        if segment.dropped:
            return b"\n" * min(size, segment.sizes[view] - inside, 1 << 20)
        start, end, base = segment.piece(view, inside)
        text = pieces.get(segment, view, start, end)
        self._touch(segment)
        return memoryview(text)[inside - base : inside - base + size]

    def _touch(self, segment: Segment) -> None:
        """Keep the files and checkpoints of a few rotated segments only."""
        if segment.number is None:
            return
        self._used[segment.number] = segment
        self._used.move_to_end(segment.number)
        while len(self._used) > OPEN_SEGMENTS:
            _, old = self._used.popitem(last=False)
            if self._sealed(old):
                old.unload()

    # --- the helper thread --------------------------------------------------------------------------------------

    def _help(self) -> None:
        if self._helper is None and not self._closed:
            self._helper = threading.Thread(target=self._work, name="log-helper", daemon=True)
            self._helper.start()

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    more = not self._closed and self._step()
                    if not more:
                        self._helper = None
                        return
                time.sleep(0.001)  # let readers have the lock
        except Exception:
            log.exception("log upkeep of %s failed", self._directory)
            with self._lock:
                self._helper = None

    def _step(self) -> bool:
        """One bounded piece of upkeep. False when there is none left."""
        for view in (STDOUT, JSONL) if self._json_wanted else (STDOUT,):
            if self._advance(view, BUDGET / 5):
                return True
        for segment in self._segments:
            if not segment.frozen or self._sealed(segment):
                continue
            if not segment.complete:
                return segment.advance() or segment.complete
            self._seal(segment)
            return True
        for segment in self._segments:
            if segment.frozen and segment.dirty:
                segment.save()
                return True
        return False

    def _seal(self, segment: Segment) -> None:
        segment.save()
        self._lock.release()  # compressing takes a while, and needs nothing that changes
        try:
            with in_background():
                packed = segment.pack(lambda: self._closed)
        finally:
            self._lock.acquire()
        if packed:
            old = segment.switch()
            self._touch(segment)
            self._lock.release()
            try:
                old.unlink()
            finally:
                self._lock.acquire()


def mend(current: Path) -> None:
    """End a record that a killed writer left torn, before a new writer appends to the file."""
    try:
        with current.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.seek(size)
                file.write(b"\n")
    except FileNotFoundError:
        pass
