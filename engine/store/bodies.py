"""Where file bodies go during an ingest: one copy of each, 4 KiB aligned in the layer's `data`.

Only here: whole-file dedup (by sha256, within the layer and against table `bodies`) and how bytes reach the file.
Small bodies are hashed and written straight from the inflated blocks (pwritev, no copies); large ones are written
while they are hashed and rolled back when they turn out to be known. Belongs to one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from engine.errors import NoSpace, TooLarge
from engine.store.blobs import no_space
from engine.store.index import Entry
from engine.store.tar import TarReader

ALIGN = 4096
MAX_DATA = ALIGN << 32  # bytes: a chunk index addresses 2^32 blocks
MAX_SEEN = 250_000  # bodies remembered for dedup within the layer: bounds memory; beyond it bodies are just written
STREAM = 4 << 20  # bytes from which a body is written while it is hashed
BATCH = 4 << 20  # bytes gathered for one pwritev
REACH = 8 << 20  # bytes of archive a batch may span: gathered views keep their blocks alive
IOV = 1000  # buffers of one pwritev (IOV_MAX is 1024)
SYNC_EVERY = 32 << 20  # bytes after which write-back is started in the background
_ZEROS = bytes(ALIGN)
_HOLE = bytes(1 << 20)


class Sieve:
    """A Bloom filter of table `bodies`, for one store: what it does not know is not there, so that the bodies of a new
    image, which are nearly all new, need no query each (every query gives up the interpreter to other threads).

    A digest missing here although its row exists costs a second copy of a body, nothing else. Thread-safe.
    """

    BITS = 26  # of a position: 8 MiB of memory
    MOST = 4_000_000  # bodies; with two positions each, 1 % of those not there are then asked for in vain

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._bits: bytearray | None = None  # made by the first ingest
        self._count = 0

    def ready(self) -> None:
        """Read what the table has, once: a second for a million rows."""
        with self._lock:
            if self._bits is not None:
                return
            self._bits = bytearray(1 << self.BITS - 3)
            with contextlib.closing(sqlite3.connect(self._path, isolation_level=None, timeout=30)) as connection:
                self._mark(row[0] for row in connection.execute("SELECT sha256 FROM bodies LIMIT ?", (self.MOST + 1,)))

    def add(self, digest: bytes) -> None:
        """What is about to become a row."""
        with self._lock:
            if self._bits is not None:
                self._mark((digest,))

    def _mark(self, digests: Iterable[bytes]) -> None:
        bits = self._bits
        assert bits is not None
        mask = (1 << self.BITS) - 1
        for digest in digests:
            self._count += 1
            pair = int.from_bytes(digest[:8], "big")
            one, two = pair & mask, pair >> 32 & mask
            bits[one >> 3] |= 1 << (one & 7)
            bits[two >> 3] |= 1 << (two & 7)

    def may_have(self, digest: bytes) -> bool:
        bits = self._bits
        if bits is None or self._count > self.MOST:
            return True
        mask = (1 << self.BITS) - 1
        pair = int.from_bytes(digest[:8], "big")
        one, two = pair & mask, pair >> 32 & mask
        return bool(bits[one >> 3] >> (one & 7) & bits[two >> 3] >> (two & 7) & 1)


class KnownBodies:
    """Lookup in table `bodies` on a connection of its own, closed with the ingest."""

    def __init__(self, path: Path, pin: Callable[[str], None], sieve: Sieve) -> None:
        sieve.ready()
        self._sieve = sieve
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._connection.execute("PRAGMA query_only=ON")
        self._pin = pin
        self._pinned: dict[str, bool] = {}
        self.any = self._connection.execute("SELECT 1 FROM bodies LIMIT 1").fetchone() is not None

    def find(self, sha256: bytes) -> tuple[str, int] | None:
        """(diff_id, offset) of a stored body whose layer is pinned until the ingest ends, or None."""
        if not self._sieve.may_have(sha256):
            return None
        row = self._connection.execute(
            "SELECT l.diff_id, b.offset FROM bodies b JOIN layers l ON l.id = b.layer WHERE b.sha256 = ?", (sha256,)
        ).fetchone()
        if row is None:
            return None
        diff_id, offset = str(row[0]), int(row[1])
        usable = self._pinned.get(diff_id)
        if usable is None:
            self._pin(diff_id)  # from here on it cannot be removed; it may have been between the two queries
            row = self._connection.execute("SELECT 1 FROM layers WHERE diff_id = ?", (diff_id,)).fetchone()
            usable = self._pinned[diff_id] = row is not None
        return (diff_id, offset) if usable else None

    def close(self) -> None:
        self._connection.close()


class DataWriter:
    """The `data` file at `path`. A context manager; `finish` makes it complete and durable."""

    def __init__(self, path: Path, known: KnownBodies) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._path = path
        self._known = known
        self._seen: dict[bytes, int] = {}
        self._foreign: dict[bytes, tuple[str, int]] = {}
        self._end = 0  # next free offset, aligned
        self.hits = self.misses = 0  # bodies that were known, bodies stored
        self._batch: list[bytes | memoryview] = []
        self._batch_at = 0  # file offset of the batch
        self._batch_size = 0
        self._batch_from = 0  # archive offset when the batch began
        self._unsynced = 0
        self._flusher: threading.Thread | None = None
        self._sync_error: OSError | None = None

    @property
    def size(self) -> int:
        """Bytes of the file, a multiple of 4096."""
        return self._end

    def store(self, entry: Entry, reader: TarReader, stored: int, sparse: list[tuple[int, int]] | None) -> None:
        """Take the body the reader stands at and fill the entry's sha256, data and offset.

        NoSpace; Damaged when the archive ends early; TooLarge.
        """
        if self._end + entry.size > MAX_DATA:
            raise TooLarge("the layer holds more than 16 TiB")
        if sparse is not None or stored > STREAM:
            self._stream(entry, reader, stored, sparse)
            return
        view = reader.whole()
        if view is not None:
            pieces = [view]
            digest = hashlib.sha256(view).digest()
        else:
            pieces = list(reader.pieces())
            digester = hashlib.sha256()
            for piece in pieces:
                digester.update(piece)
            digest = digester.digest()
        entry.sha256 = digest
        if self._duplicate(entry, digest):
            return
        if all(map(_zero, pieces)):
            self._flush()
            entry.offset = self._end
            self._remember(digest, self._end)
            self._end += stored + -stored % ALIGN
            return
        batch = self._batch
        if not batch:
            self._batch_at, self._batch_from = self._end, reader.offset
        entry.offset = self._end
        self._remember(digest, self._end)
        batch += pieces
        pad = -stored % ALIGN
        if pad:
            batch.append(_ZEROS[:pad])
        self._end += stored + pad
        self._batch_size += stored + pad
        if self._batch_size >= BATCH or len(batch) >= IOV - 24 or reader.offset - self._batch_from >= REACH:
            self._flush()

    def _duplicate(self, entry: Entry, digest: bytes) -> bool:
        at = self._seen.get(digest)
        if at is not None:
            entry.offset = at
            self.hits += 1
            return True
        if self._known.any:
            where = self._foreign.get(digest) or self._known.find(digest)
            if where is not None:
                if len(self._foreign) < MAX_SEEN:
                    self._foreign[digest] = where
                entry.data, entry.offset = where
                self.hits += 1
                return True
        self.misses += 1
        return False

    def _remember(self, digest: bytes, offset: int) -> None:
        if len(self._seen) < MAX_SEEN:
            self._seen[digest] = offset

    def _stream(self, entry: Entry, reader: TarReader, stored: int, sparse: list[tuple[int, int]] | None) -> None:
        self._flush()
        start = self._end
        expected = False
        digester = hashlib.sha256()
        position = 0  # within the file
        pieces = reader.pieces()
        rest = memoryview(b"")
        for offset, length in [(0, stored)] if sparse is None else sparse:
            _hash_zeros(digester, offset - position)
            position = offset
            while length:
                if not rest:
                    rest = next(pieces)
                piece = rest[:length]
                rest = rest[len(piece) :]
                digester.update(piece)
                if not _zero(piece):  # else a hole: a body of zeros costs no disk
                    if not expected:
                        self._expect_room(stored)
                        expected = True
                    self._write([piece], start + position)
                position += len(piece)
                length -= len(piece)
        _hash_zeros(digester, entry.size - position)
        digest = digester.digest()
        entry.sha256 = digest
        if self._duplicate(entry, digest):
            os.ftruncate(self._fd, start)
            return
        entry.offset = start
        self._remember(digest, start)
        self._end = start + entry.size + -entry.size % ALIGN

    def _expect_room(self, size: int) -> None:
        """Refuse early what cannot fit, rather than fill the disk first."""
        free = os.fstatvfs(self._fd)
        if size > free.f_bavail * free.f_frsize:
            raise NoSpace(f"a file of {size} bytes does not fit the disk that holds the store", hint="remove images")

    def _flush(self) -> None:
        if self._batch:
            batch, self._batch, size = self._batch, [], self._batch_size
            self._batch_size = 0
            self._write(batch, self._batch_at)
            self._unsynced += size
            if self._unsynced >= SYNC_EVERY:
                self._write_back()

    def _write(self, buffers: list[bytes | memoryview], offset: int) -> None:
        try:
            done = os.pwritev(self._fd, buffers, offset)
            total = sum(map(len, buffers))
            while done < total:  # short writes are rare: only near a full disk or a signal
                rest = b"".join(buffers)[done:]
                done += os.pwrite(self._fd, rest, offset + done)
        except OSError as error:
            if full := no_space(error):
                raise full from error
            raise

    def _write_back(self) -> None:
        """Start writing dirty pages out, so that the final fsync finds little left to do."""
        if self._flusher is None or not self._flusher.is_alive():
            self._unsynced = 0
            self._flusher = threading.Thread(target=self._sync_quietly, name="write-back", daemon=True)
            self._flusher.start()

    def _sync_quietly(self) -> None:
        try:
            os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        except OSError as error:
            self._sync_error = error  # the kernel reports it once per open file: finish() must not miss it

    def finish(self) -> None:
        """Everything written, padded to whole blocks, durable. NoSpace."""
        self._flush()
        self._join()
        try:
            if self._sync_error is not None:
                raise self._sync_error
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
        except OSError as error:
            if full := no_space(error):
                raise full from error
            raise

    def _join(self) -> None:
        if self._flusher is not None:
            self._flusher.join()

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._join()
        os.close(self._fd)


def _zero(piece: memoryview) -> bool:
    """Whether there is nothing but zeros. Its ends tell most that are not, so little is compared."""
    return len(piece) >= ALIGN and not piece[0] and not piece[-1] and bytes(piece) == _HOLE[: len(piece)]


def _hash_zeros(digester: hashlib._Hash, count: int) -> None:
    while count > 0:
        step = min(count, len(_HOLE))
        digester.update(_HOLE[:step] if step < len(_HOLE) else _HOLE)
        count -= step
