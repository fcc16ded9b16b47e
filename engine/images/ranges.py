"""The files of a remote layer, fetched by range when they are read, verified, and kept. Floor 2.

Only here: `<store>/remote/layers/<hex of the blob>/{index,chunks,data}`. `data` is sparse: a chunk is written at its
place when it has been fetched. What vouches for it is its digest alone: a chunk is checked before it is first served by
this process, whether it was fetched or found there, so neither a crash nor rot can make wrong bytes.

Threading: `read` from any thread; it never waits longer than LONGEST seconds, nor than SILENCE without progress. The
fetching goes on in a thread of its own when the reader has left, so that reading again finds what came meanwhile.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from engine.errors import Busy, Damaged, DeadlineExceeded, EngineError
from engine.images.manifests import Descriptor
from engine.images.registry import Registry
from engine.images.toc import CHUNK, HEAD, MAGIC
from engine.store.inflate import inflate

SILENCE = 1.0  # seconds a reader waits while nothing comes
LONGEST = 8.0  # seconds it waits while something does: a reader in a mount cannot be killed meanwhile
AHEAD = 256 << 10  # compressed bytes of following chunks fetched with the one asked for: small files come in groups
MAX_FETCHES = 4  # requests of one layer at a time
BLOCK = 1 << 20


class _Fetch:
    """A range under way: the chunks it brings, how far it is, how it ended."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.done = threading.Event()
        self.moved = time.monotonic()
        self.error: BaseException | None = None


class RemoteLayer:
    """One layer by ranges, in a directory that `toc.convert` has filled. `connect` gives the registry to ask."""

    def __init__(self, directory: Path, entry: Descriptor, connect: Callable[[], Registry]) -> None:
        self.entry = entry
        self._connect = connect
        with open(directory / "chunks", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEAD.size:
                raise Damaged("the list of chunks is truncated", at=str(directory))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, digest, self._count, self.data_size = HEAD.unpack_from(self._map, 0)
        with memoryview(self._map) as view, view[HEAD.size :] as records:
            sound = magic == MAGIC and len(records) == self._count * CHUNK.size and sha256(records).digest() == digest
        if not sound:
            raise Damaged("the list of chunks is damaged", at=str(directory))
        self.path = directory / "data"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._good = bytearray(self._count)  # 1: verified by this process
        self._lock = threading.Lock()
        self._fetches: dict[int, _Fetch] = {}  # by chunk
        self._slots = threading.BoundedSemaphore(MAX_FETCHES)
        self._closed = False

    def close(self) -> None:
        """No more fetches; readers of what is there go on until they let go."""
        self._closed = True

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    # --- chunks ---------------------------------------------------------------------------------------------------

    def _chunk(self, number: int) -> tuple[int, int, int, int, int, bytes]:
        fields: tuple[int, int, int, int, int, bytes] = CHUNK.unpack_from(self._map, HEAD.size + number * CHUNK.size)
        return fields

    def _first(self, offset: int) -> int:
        """The last chunk that starts at or before `offset`."""
        low, high = 0, self._count - 1
        while low < high:
            middle = low + high + 1 >> 1
            if self._chunk(middle)[0] <= offset:
                low = middle
            else:
                high = middle - 1
        return low

    def _stored(self, number: int) -> bool:
        """Whether the chunk is in `data` as it should be; marks it when it is."""
        offset, size, _, _, _, digest = self._chunk(number)
        try:
            if os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + size:
                return False
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EINVAL):  # a hole to the end, or behind it
                return False
            raise
        digester, end = sha256(), offset + size
        while offset < end and (piece := os.pread(self._fd, min(BLOCK, end - offset), offset)):
            digester.update(piece)
            offset += len(piece)
        if offset == end and digester.digest() == digest:
            self._good[number] = 1
        return bool(self._good[number])

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of `data`. DeadlineExceeded when they take too long (they go on coming), and what fetching raises."""
        deadline = time.monotonic() + LONGEST
        if size <= 0 or not self._count:
            return b""
        number = self._first(offset)
        while number < self._count and self._chunk(number)[0] < offset + size:
            if not self._good[number] and not self._stored(number):
                self._wait(self._fetch(number), number, deadline)
            number += 1
        return os.pread(self._fd, size, offset)

    def _wait(self, fetch: _Fetch, number: int, deadline: float) -> None:
        while not self._good[number]:
            now = time.monotonic()
            until = min(deadline, fetch.moved + SILENCE)
            if fetch.done.wait(max(0.0, min(until - now, 0.1))):
                if fetch.error is not None and not self._good[number]:
                    raise fetch.error
                return
            if now >= until:
                raise DeadlineExceeded(
                    "the registry takes long; what comes is kept", at=self.entry.digest, hint="read again in a while"
                )

    # --- fetching -------------------------------------------------------------------------------------------------

    def _fetch(self, number: int) -> _Fetch:
        """The fetch that brings a chunk; a new one when there is none."""
        known = self._fetches.get(number)
        if known is not None:
            return known
        if not self._slots.acquire(timeout=SILENCE):
            raise DeadlineExceeded("the registry is busy with earlier reads", at=self.entry.digest)
        with self._lock:
            known = self._fetches.get(number)
            if known is None and self._good[number]:  # it came since the reader looked
                known = _Fetch([number])
                known.done.set()
            if known is not None or self._closed:
                self._slots.release()
                if known is not None:
                    return known
                raise Busy("the engine is closing")
            start = stop = self._chunk(number)[2]
            numbers: list[int] = []
            for follower in range(number, self._count):
                chunk = self._chunk(follower)
                wanted = follower == number or (
                    not self._good[follower] and follower not in self._fetches and chunk[4] == 0
                )
                if not wanted or (numbers and (chunk[2] != stop or chunk[3] - start > AHEAD)):
                    break
                numbers.append(follower)
                stop = chunk[3]
            fetch = _Fetch(numbers)
            self._fetches.update(dict.fromkeys(numbers, fetch))
        threading.Thread(target=self._run, args=(fetch, start, stop), name="range", daemon=True).start()
        return fetch

    def _run(self, fetch: _Fetch, start: int, stop: int) -> None:
        try:
            pieces = _Pieces(self._moving(fetch, self._connect().part(self.entry, start, stop)), start)
            for number in fetch.numbers:
                self._store(number, pieces)
        except BaseException as error:
            fetch.error = error if isinstance(error, EngineError | OSError) else Damaged(str(error) or repr(error))
        finally:
            with self._lock:
                for number in fetch.numbers:
                    self._fetches.pop(number, None)
            self._slots.release()
            fetch.done.set()

    @staticmethod
    def _moving(fetch: _Fetch, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            fetch.moved = time.monotonic()
            yield chunk

    def _store(self, number: int, pieces: _Pieces) -> None:
        """Inflate one chunk out of the range into its place; only a right digest marks it."""
        offset, size, start, stop, inner, digest = self._chunk(number)
        digester, skip, left = sha256(), inner, size
        for block in inflate(pieces.until(start, stop)):
            if skip:
                drop = min(skip, len(block))
                skip -= drop
                block = block[drop:]
            block = block[:left]
            digester.update(block)
            _write_at(self._fd, block, offset)
            offset += len(block)
            left -= len(block)
            if not left:
                break
        if left or digester.digest() != digest:
            raise Damaged("a part of the layer does not match its digest", at=f"bytes {start}-{stop - 1}")
        self._good[number] = 1


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


class _Pieces:
    """A range as it streams in, handed out chunk by chunk."""

    def __init__(self, source: Iterator[bytes], at: int) -> None:
        self._source, self._at, self._rest = source, at, b""

    def until(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes of the blob from `start` to `stop`; what the last user left is passed over."""
        while self._at < stop:
            if not self._rest:
                self._rest = next(self._source, b"")
                if not self._rest:
                    return
            end = min(stop, self._at + len(self._rest)) if self._at >= start else min(start, self._at + len(self._rest))
            piece, self._rest = self._rest[: end - self._at], self._rest[end - self._at :]
            wanted = self._at >= start
            self._at = end
            if wanted:
                yield piece
