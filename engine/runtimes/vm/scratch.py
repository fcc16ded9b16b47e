"""Where the host lays down what a guest is to write: the end of the guest's read-only disk. Floor 2.

Only here: pieces of a file `vm/scratch` that QEMU shows behind the image (disks.py). A virtio port carries a page at a
time; a disk carries what it is asked for at once, and whoever has the file has it at the speed of memory. The guest
reads a piece past its own cache (verbs SCRATCH, WRITE). A piece is lent again only when the guest has answered for what
lay there, or when it has been told on a new connection that no earlier handle counts. That the guest sees what is laid
down is tried twice for each connection, before it is relied on; where it does not, the port is used, as it is when no
piece is free. Thread-safe; waits only for the guest, in `ask`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError
from engine.runtimes.vm import protocol
from engine.runtimes.vm.protocol import Values, Words

log = logging.getLogger(__name__)

NAME = "scratch"  # beside the machine's disks, and its key in bundle/vm.json: where on the disk it begins
DISK = "/dev/vda"  # in the guest
PIECE = 1 << 20  # bytes
PIECES = 6
SIZE = PIECES * PIECE
LEAST = 16 << 10  # bytes that are worth it
TRIED = 4096  # bytes


def make(path: Path) -> Path:
    """The file, new or emptied."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, SIZE)
    finally:
        os.close(fd)
    return path


class Piece:
    """What was laid down behind one another, for one request."""

    def __init__(self, scratch: Scratch, free: list[int], at: int, place: int) -> None:
        self._scratch, self._free, self._at = scratch, free, at
        self.place = place  # on the guest's disk
        self.size = 0

    @property
    def full(self) -> bool:
        return self.size + protocol.BULK > PIECE

    def add(self, data: bytes) -> bool:
        """Whether it lies there now."""
        if self.size + len(data) > PIECE or not self._scratch.put(data, self._at + self.size, self._free):
            return False
        self.size += len(data)
        return True

    def release(self) -> None:
        """Once, when the guest does not look at it any more."""
        self._free.append(self._at)


class Scratch:
    """Of the container whose files are below `directory`, as its agent is asked by `ask`."""

    def __init__(self, directory: Path, ask: Callable[[str, Words], Values]) -> None:
        self._directory, self._ask = directory, ask
        self._lock = threading.Lock()  # of what is below
        self._fd = -1
        self._start = 0  # on the guest's disk
        self._free: list[int] = []  # offsets; another list for each connection
        self._tried = self._closed = False

    def renew(self) -> None:
        """The connection is new, and no handle of an earlier one is good: what they were to write is not looked at."""
        with self._lock:
            self._free, self._tried = [], False

    def close(self) -> None:
        with self._lock:
            self._closed, self._free = True, []
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def lay(self, data: bytes) -> Piece | None:
        """`data` where the guest sees it. None: it has to be sent."""
        if not LEAST <= len(data) <= protocol.BULK:
            return None
        with self._lock:
            free, tried, self._tried = self._free, self._tried, True
        if not tried:
            self._try(free)
        with self._lock:
            if not free or free is not self._free:
                return None
            at = free.pop()
            piece = Piece(self, free, at, self._start + at)
        if piece.add(data):
            return piece
        piece.release()
        return None

    def put(self, data: bytes, at: int, free: list[int]) -> bool:
        with self._lock:  # a closed descriptor's number may be another file's
            if self._closed or free is not self._free:  # another connection: whose piece is it now?
                return False
            try:
                return os.pwrite(self._fd, data, at) == len(data)
            except OSError as error:  # a full disk of the host
                log.warning("%s: %s", self._directory / "vm" / NAME, error)
                return False

    def _try(self, free: list[int]) -> None:
        """Fill `free` when the guest sees what is laid down, and what takes its place."""
        with suppress(KeyError):  # a machine that was started without
            try:
                start = int(json.loads((self._directory / "bundle" / "vm.json").read_bytes())[NAME])
                fd = os.open(self._directory / "vm" / NAME, os.O_RDWR | os.O_CLOEXEC)
                with self._lock:
                    if self._closed:
                        os.close(fd)
                        return
                    old, self._fd, self._start = self._fd, fd, start
                    if old >= 0:
                        os.close(old)
                for _ in range(2):
                    data = os.urandom(TRIED)
                    if not self.put(data, 0, free):
                        return
                    seen = self._ask("SCRATCH", {"disk": DISK, "at": start, "size": TRIED}).get("data")
                    if seen != data:
                        log.warning("a guest does not see what its host lays down: %s", self._directory)
                        return
            except (EngineError, OSError, ValueError) as error:
                log.info("files of a guest go through its port: %s", error)
                return
            with self._lock:
                free.extend(at * PIECE for at in range(PIECES))
