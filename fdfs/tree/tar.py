"""containers/<name>/tar: files of a running virtual machine as one stream, in place of a call for each. Floor 5.

Only here: a conversation by one open file. The first line written says what is wanted; then the archive is read from
it, or written to it and fsync(2) tells when all is made. The archive is packed and unpacked in the engine
(engine/runtimes/vm/guesttar.py). One thread for each that comes in, which ends with the open file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from engine.errors import DeadlineExceeded, EngineError, InvalidArgument, Unsupported
from engine.runtimes.vm import guesttar
from engine.runtimes.vm.guestfiles import GuestFiles
from fdfs.entry import Attr, File

log = logging.getLogger(__name__)

BLOCKS = 4  # written, and not yet looked at
TAKE_SECONDS = 30.0  # for one of them to be taken; each call to the guest has a deadline, and many make a block
END_SECONDS = 60.0  # for what was written before the end
KEYS: dict[str, dict[str, type]] = {
    "out": {"out": str, "as": str, "plain": bool},
    "in": {"in": str, "owners": bool, "merge": bool},
}


class Stream:
    """The handle. Offsets mean nothing: what is read or written goes on where it was."""

    direct = True
    keep = False

    def __init__(self, engine: Any, name: str) -> None:
        self._engine, self._name = engine, name
        self._object = object_of(engine, name)
        self._lock = threading.Lock()
        self._out: Generator[bytes, None, None] | None = None
        self._rest = bytearray()
        self._in: _Inflow | None = None

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            try:
                while self._out is not None and len(self._rest) < size:
                    piece = next(self._out, None)
                    if piece is None:
                        self._out = None
                    else:
                        self._rest += piece
            except (EngineError, OSError) as error:
                self._out = _failing(error)  # whoever reads on is told again: it is not the end
                raise self._failed(error) from None
            data = bytes(self._rest[:size])
            del self._rest[:size]
            return data

    def write(self, data: bytes, offset: int) -> int:
        with self._lock:
            if self._out is not None:
                raise InvalidArgument("this end is for reading now")
            try:
                if self._in is not None:
                    self._in.put(data)
                else:
                    self._asked(data)
            except (EngineError, OSError) as error:
                raise self._failed(error) from None
        return len(data)

    def _asked(self, data: bytes) -> None:
        line, newline, rest = data.partition(b"\n")
        asked = _parse(line)
        if not newline:
            raise InvalidArgument("the first line ends with a newline")
        files = self._engine.guests.files(self._engine.containers.get(self._name))
        if files is None:
            raise Unsupported("its files are on this host", hint="use rootfs/")
        if "out" in asked:
            if rest:
                raise InvalidArgument("nothing follows the line that asks for a tar")
            path, name = _path(asked["out"]), _path("/" + asked.get("as", "."))
            if not name:
                raise InvalidArgument("as: a name expected", at="as")
            self._out = guesttar.pack(files, path, name, plain=asked.get("plain", False))
            return
        self._in = _Inflow(files, _path(asked["in"]), asked.get("owners", False), asked.get("merge", False))
        if rest:
            self._in.put(rest)

    def _failed(self, error: EngineError | OSError) -> EngineError | OSError:
        """As it is; what happened to which file is in `error`."""
        told = error if isinstance(error, EngineError) else _told(error)
        self._engine.failures.record(self._object, "tar", told)
        return error

    def truncate(self, size: int) -> None: ...

    def flush(self) -> None: ...

    def fsync(self) -> None:
        with self._lock:
            if self._in is not None:
                try:
                    self._in.end()
                except (EngineError, OSError) as error:
                    raise self._failed(error) from None

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None:
        with self._lock:
            if self._out is not None:
                self._out.close()
            if self._in is not None:
                self._in.abandon()


class _Inflow:
    """An archive that comes: written by whoever has the file open, made files of by a thread."""

    def __init__(self, files: GuestFiles, path: bytes, owners: bool, merge: bool) -> None:
        self._changed = threading.Condition()  # of all below
        self._blocks: deque[bytes] = deque()
        self._ended = self._over = False  # no more comes; all is made, or not
        self._failure: EngineError | OSError | None = None
        work = (files, path, owners, merge)
        threading.Thread(target=self._work, args=work, name="guest-tar", daemon=True).start()

    def _work(self, files: GuestFiles, path: bytes, owners: bool, merge: bool) -> None:
        failure: EngineError | OSError | None = None
        try:
            guesttar.unpack(files, path, self._come(), owners=owners, merge=merge)
            for _ in self._come():  # what follows the end of the archive
                pass
        except (EngineError, OSError) as error:
            failure = error
        except BaseException:
            log.exception("an archive for a guest")
            failure = OSError(errno.EIO, os.strerror(errno.EIO))
        with self._changed:
            self._over, self._failure = True, failure
            self._changed.notify_all()

    def _come(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._blocks or self._ended)
                if not self._blocks:
                    return
                block = self._blocks.popleft()
                self._changed.notify_all()
            yield block

    def put(self, data: bytes) -> None:
        """Waits while too much is there. What has failed is told to everyone who goes on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._over or len(self._blocks) < BLOCKS, TAKE_SECONDS):
                raise DeadlineExceeded("the guest takes too long", hint="it may hang: kill, start")
            if self._over or self._ended:
                raise self._failure or InvalidArgument("the archive has ended")
            self._blocks.append(data)
            self._changed.notify_all()

    def end(self) -> None:
        """Waits until all is made."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._over, END_SECONDS):
                raise DeadlineExceeded("the guest takes too long", hint="it may hang: kill, start")
            if self._failure is not None:
                raise self._failure

    def abandon(self) -> None:
        with self._changed:
            self._ended = True
            if not self._over:
                self._blocks.clear()
            self._changed.notify_all()


def _told(error: OSError) -> EngineError:
    """With its errno, by which who asked finds it."""
    told = EngineError(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    vars(told)["errno"] = error.errno or errno.EIO
    return told


def _failing(error: EngineError | OSError) -> Generator[bytes, None, None]:
    raise error
    yield b""


def _parse(line: bytes) -> dict[str, Any]:
    """The first line. InvalidArgument."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidArgument('a line of JSON expected: {"out": PATH} or {"in": PATH}') from None
    keys = next((KEYS[way] for way in KEYS if isinstance(asked, dict) and way in asked), None)
    if keys is None:
        raise InvalidArgument('{"out": PATH} or {"in": PATH} expected')
    for key, value in asked.items():
        if not isinstance(value, keys.get(key, ())):
            raise InvalidArgument(f"{key}: not known here, or of another type", at=key)
    return dict(asked)


def _path(text: str) -> bytes:
    """From the container's root."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        path = b"\0"
    if not path.startswith(b"/") or b"\0" in path:
        raise InvalidArgument("an absolute path expected", at=text)
    return path.strip(b"/")


def opened(engine: Any, name: str) -> Stream:
    return Stream(engine, name)


def object_of(engine: Any, name: str) -> str:
    return str(engine.containers.get(name).object)


TAR = File(
    name="tar",
    doc='of its files while it is a virtual machine: write {"out": PATH} and read; or {"in": PATH}, a tar, and fsync',
    opens=opened,
    object=object_of,
)
