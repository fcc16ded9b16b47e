"""What is written to an open file of a guest after its writer was told that it is done. Floor 2.

Only here: how bytes written in order are gathered while others are on their way, for each request costs a guest far
more than the bytes it carries: what comes meanwhile goes with the next, nothing waits for more to come. Errors stay
until somebody asks. Bounded: PIPELINE requests of a file, of PIECE bytes each. Thread-safe.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from engine.runtimes.vm.scratch import Piece, Scratch

PIPELINE = 6  # requests under way for one file that is written in order
LARGE = 3  # of those, such as are gathered

Send = Callable[[bytes | Piece, int], None]  # what, the offset in the file


class Gathered(NamedTuple):
    piece: Piece
    offset: int


class Behind:
    """Of one open file; `send` writes all of something to it and waits."""

    def __init__(self, pool: ThreadPoolExecutor, scratch: Scratch, send: Send) -> None:
        self._pool, self._scratch, self._send = pool, scratch, send
        self._writing = threading.Lock()  # one writer at a time
        self._lock = threading.Lock()  # of what is below; never held while the guest is waited for
        self._sent: list[Future[None]] = []  # under way, or failed and nobody was told
        self._gathered: Gathered | None = None

    @property
    def empty(self) -> bool:
        return not self._sent and self._gathered is None

    def add(self, data: bytes, offset: int) -> None:
        """To be written. Waits while too much is under way; the error of an earlier one."""
        with self._writing:
            if self._more(data, offset):
                return
            self._room(LARGE)
            piece = self._scratch.lay(data)
            if piece is None:
                self._room(PIPELINE)
            with self._lock:
                if piece is not None:
                    self._gathered = Gathered(piece, offset)
                    self._go_on()
                else:
                    self._submit(data, offset)

    def _more(self, data: bytes, offset: int) -> bool:
        """Whether it goes with what is gathered. If not, nothing is any more."""
        with self._lock:
            gathered = self._gathered
            if gathered is None:
                return False
            if offset == gathered.offset + gathered.piece.size and gathered.piece.add(data):
                self._go_on()
                return True
            self._dispatch()
            return False

    def _room(self, most: int) -> None:
        while True:
            with self._lock:
                if len(self._sent) < most:
                    return
                first = self._sent.pop(0)
            first.result()

    def _go_on(self) -> None:
        """Send what is gathered, unless something is under way that it can wait for. The lock is held."""
        gathered = self._gathered
        if gathered is not None and (gathered.piece.full or all(future.done() for future in self._sent)):
            self._dispatch()

    def _dispatch(self) -> None:
        """The lock is held."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self._submit(gathered.piece, gathered.offset)

    def _submit(self, what: bytes | Piece, offset: int) -> None:
        """The lock is held."""
        future: Future[None] = Future()
        self._sent.append(future)
        try:
            self._pool.submit(self._work, future, what, offset)
        except RuntimeError:  # the machine's files were closed
            future.set_exception(OSError(errno.EIO, os.strerror(errno.EIO)))

    def _work(self, future: Future[None], what: bytes | Piece, offset: int) -> None:
        try:
            self._send(what, offset)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        with self._lock:
            if future in self._sent and future.exception() is None:
                self._sent.remove(future)
            self._go_on()

    def settle(self) -> list[BaseException]:
        """Wait for all: the errors nobody was told of."""
        with self._lock:
            self._dispatch()
            sent, self._sent = self._sent, []
        return [error for future in sent if (error := future.exception()) is not None]

    def arrived(self) -> None:
        """Wait for all; errors stay for the writer."""
        with self._lock:
            self._dispatch()
            sent = list(self._sent)
        wait(sent)
