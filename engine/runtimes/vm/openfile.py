"""An open file of a guest: read ahead, written behind, and its content at once where that is small. Floor 2.

Only here: the order of what one open file asks the guest, through guestfiles.py. Thread-safe. Errors: as there.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from engine.runtimes.vm import protocol
from engine.runtimes.vm.behind import Behind
from engine.runtimes.vm.protocol import Attr, Values, Words
from engine.runtimes.vm.scratch import Piece

if TYPE_CHECKING:
    from engine.runtimes.vm.guestfiles import GuestFiles

BEHIND_FROM = 1 << 20  # bytes written in order after which a file is written behind
AHEAD = 12  # requests of BULK under way for a file that is read in order: with half of them the guest waits for us
AHEAD_SECONDS = 1.0  # how long bytes read ahead are believed
SYNC_SECONDS = 30.0  # of fsync(2), which waits for a disk


class GuestFile:
    """An open file of a guest. It is of the connection it was opened on: afterwards EBADF.

    A round trip is long beside what one call carries. So a file read in order is read ahead, and one written in order
    is written behind, after its first MiB: an error then comes with a later write, or with flush (close(2)), as of NFS.
    Every other question to the guest waits until what was written is there.
    """

    def __init__(self, files: GuestFiles, root: str, path: bytes, handle: int, identity: tuple[int, int]) -> None:
        self.files, self.identity = files, identity
        self._root, self._path, self._handle = root, path, handle
        self._lock = threading.Lock()  # of all below
        self._whole: tuple[float, int, bytes] | None = None  # when it came, of which version, the content
        self._version = files.version(identity)  # of what is read ahead
        self._read_to = 0  # where the reads in order have come to
        self._ahead: dict[int, tuple[float, Future[bytes]]] = {}  # offset -> when it was asked for, the bytes
        self._behind = Behind(files.pool, files.scratch, self._send_all)
        self._written_to, self._in_order = 0, 0

    # --- reading

    def early(self, data: bytes | None, size: int) -> None:
        """What came with the open: the whole file, as it was then."""
        if data is not None and len(data) == size:
            self._whole = time.monotonic(), self.files.version(self.identity), data

    def _fetch(self, size: int, offset: int) -> bytes:
        data = self.files.call("READ", {"handle": self._handle, "offset": offset, "size": size}).need("data")
        if len(data) > size:
            raise protocol.ProtocolError(f"READ gave {len(data)} bytes where {size} were asked for")
        return data

    def read(self, size: int, offset: int) -> bytes:
        self.settle()
        whole = self._whole
        if whole is not None:
            if time.monotonic() - whole[0] < AHEAD_SECONDS and self.files.version(self.identity) == whole[1]:
                return whole[2][offset : offset + size]
            self._whole = None
        parts: list[bytes] = []
        while size > 0:
            wanted = min(size, protocol.BULK)
            data = self._piece(wanted, offset)
            parts.append(data)
            if len(data) < wanted:
                break
            size -= wanted
            offset += wanted
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, size: int, offset: int) -> bytes:
        version = self.files.version(self.identity)
        with self._lock:
            if version != self._version:
                self._ahead.clear()
                self._version = version
            if size == protocol.BULK and offset and abs(offset - self._read_to) <= AHEAD * protocol.BULK:
                for number in range(1, AHEAD + 1):
                    at = offset + number * protocol.BULK
                    if at not in self._ahead and len(self._ahead) < 2 * AHEAD:
                        future = self.files.pool.submit(self._fetch, protocol.BULK, at)
                        self._ahead[at] = time.monotonic(), future
            known = self._ahead.pop(offset, None)
            for old in [at for at, (asked, _) in self._ahead.items() if asked < time.monotonic() - AHEAD_SECONDS]:
                del self._ahead[old]
            self._read_to = max(offset + size, self._read_to) if offset else size
        if known is not None and known[0] > time.monotonic() - AHEAD_SECONDS:
            data = known[1].result()
            if len(data) >= size:
                return data[:size]
        return self._fetch(size, offset)  # also at the end of a file, which may have grown

    # --- writing

    def _ask(self, data: bytes | Piece, offset: int) -> tuple[int, Values]:
        turn = self.files.beliefs.turn
        values = self.files.write(self._handle, offset, data)
        attr = protocol.parse_attr(values.need("attr"))
        if (attr.dev, attr.ino) == self.identity:
            self.files.beliefs.learn(turn, self._root, [(self._path, attr, None)])
        return values.number("size", most=data.size if isinstance(data, Piece) else len(data)), values

    def _send_all(self, data: bytes | Piece, offset: int) -> None:
        """Who wrote it will not ask for the rest."""
        size = data.size if isinstance(data, Piece) else len(data)
        count, values = self._ask(data, offset)
        if count < size:
            number = values.number("error", least=1, most=4095) if values.get("error") is not None else errno.EIO
            raise OSError(number, os.strerror(number))

    def write(self, data: bytes, offset: int, *, append: bool = False) -> int:
        done = 0
        self._touched()
        while done < len(data):
            part = bytes(data[done : done + protocol.BULK])
            if not append and self._later(part, offset + done):
                done += len(part)
                continue
            self.settle()
            count, _ = self._ask(self.files.scratch.lay(part) or part, offset + done)
            done += count
            if count < len(part):
                break
        return done

    def _later(self, data: bytes, offset: int) -> bool:
        """Whether it is on its way. The error of an earlier one."""
        with self._lock:
            self._ahead.clear()
            self._in_order = self._in_order + len(data) if offset == self._written_to else 0
            self._written_to = offset + len(data)
            if self._in_order <= BEHIND_FROM:
                return False
        try:
            self._behind.add(data, offset)
        finally:
            self.files.dirty.add(self)
        return True

    def settle(self) -> None:
        """Wait for what is written behind; the first of its errors."""
        if self._behind.empty:
            return
        with self._lock:
            self._in_order = 0
        self.files.dirty.discard(self)
        errors = self._behind.settle()
        self._touched()
        if errors:
            raise errors[0]

    def arrived(self) -> None:
        """Wait for what is written behind; errors stay for the writer."""
        self._behind.arrived()
        self._touched()

    def _changed(self) -> None:
        self.settle()
        with self._lock:
            self._ahead.clear()
        self._touched()

    def _touched(self) -> None:
        self.files.beliefs.written(self._root, self._path)
        self.files.changed(self.identity)

    def truncate(self, size: int) -> None:
        self._changed()
        self.files.call("TRUNCATE", {"handle": self._handle, "size": size})
        self._touched()

    def sync(self) -> None:
        self.settle()
        self.files.call("FSYNC", {"handle": self._handle}, SYNC_SECONDS)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        self._changed()
        words: Words = {"handle": self._handle, "mode": mode, "offset": offset, "size": length}
        self.files.call("FALLOCATE", words, SYNC_SECONDS)

    def attr(self) -> Attr:
        self.settle()
        found = self.files.beliefs.attr(self._root, self._path, fresh=True)
        if found is not None and (found.dev, found.ino) == self.identity:
            return found
        return protocol.parse_attr(self.files.call("STAT", {"handle": self._handle}).need("attr"))

    def close(self) -> bool:
        """Whether it was the last of its file."""
        last = self.files.dropped(self.identity, self._handle)
        try:
            self.settle()
        finally:
            self.files.done(self._handle)
        return last
