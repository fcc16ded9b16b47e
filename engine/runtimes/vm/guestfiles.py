"""Files in a running guest, as its agent serves them: what the mount shows of a virtual machine's container.

Floor 2. Only here: one connection per container, made when first needed and again after it broke; the deadline of every
call; and that a mute guest is asked by few at a time, then not at all for a moment, then by one until it answers, so it
cannot take the threads of who asks. Attributes that came with a listing or as the answer to a change, and the names of
a file's xattrs, are believed for a moment: `ls -l` costs one call, not one per file, and `cp -a` half of what it would.
What is changed through here is never answered from what was before. Thread-safe.

Errors: OSError with the guest's errno; DeadlineExceeded; Unreachable when nobody answers at the socket; ProtocolError.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.errors import DeadlineExceeded, EngineError, Unreachable
from engine.hostfiles import socket_address
from engine.runtimes.vm import protocol
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import Attr, Values, Words

DEADLINE = 5.0  # seconds of one call; a guest under load answers in milliseconds
SYNC_SECONDS = 30.0  # of fsync(2), which waits for a disk
MUTE_SECONDS = 3.0  # how long a guest that missed a deadline is not asked again
AT_ONCE = 16  # calls of one guest that may be under way: the agent's file workers are fewer
BELIEVED = 2.0  # seconds that what came with a listing is believed, twice at most: a lookup and a stat
MAX_BELIEVED = 1 << 16
PIPELINE = 6  # calls under way for one file that is read or written in order
BEHIND_FROM = 1 << 20  # bytes written in order after which a file is written behind
AHEAD_SECONDS = 1.0  # how long bytes read ahead are believed
ROOTS = {
    "container": "",
    "upper": "/run/disk/upper",
}  # root -> its directory, where the agent must be told it


class Names(NamedTuple):
    until: float
    names: tuple[bytes, ...]


class GuestFiles:
    """Of the machine whose agent answers at `path`."""

    def __init__(self, path: Path, connect: Callable[[], socket.socket] | None = None) -> None:
        self._path = path
        self._connect = connect or self._dial
        self._lock = threading.Lock()  # connecting; held for as long as that takes
        self._client: AgentClient | None = None
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._mute_until = 0.0  # 0: it answered last
        self._tried = False  # one caller finds out whether a mute guest answers again; guarded by _guard
        self._guard = threading.Lock()  # of all below; never held over I/O
        self._listed: dict[tuple[str, bytes], tuple[float, int, Attr]] = {}  # until, uses left
        self._names: dict[tuple[str, bytes], Names] = {}
        self._turn = 0  # of changes: what was told before the last one is not believed
        self.pool = ThreadPoolExecutor(PIPELINE, "guest-files")  # threads come when needed
        self.dirty: set[GuestFile] = set()  # written behind
        self.open_handles: dict[tuple[int, int], list[int]] = {}  # dev, ino -> handles of the agent

    # --- calls ----------------------------------------------------------------------------------------------------

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(DEADLINE)
            with socket_address(self._path) as address:
                sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            raise Unreachable(
                f"the agent of its virtual machine cannot be reached: {error.strerror or error}",
                hint="it is starting or ending, or its engine was killed: read state",
            ) from error

    def _connected(self) -> AgentClient:
        client = self._client
        if client is not None and not client.closed:
            return client
        if not self._lock.acquire(timeout=DEADLINE):
            raise DeadlineExceeded("the guest's agent does not answer")
        try:
            if self._client is None or self._client.closed:
                client = AgentClient(self._connect(), deadline=DEADLINE)
                try:
                    client.call("CLOSE", {"all": 1}, deadline=DEADLINE)  # of an engine before this one
                    for name, path in ROOTS.items():
                        if path:
                            client.call("ROOT", {"name": name, "path": path}, deadline=DEADLINE)
                except BaseException:
                    client.close()
                    raise
                with self._guard:
                    self.open_handles.clear()
                self._client = client
            return self._client
        finally:
            self._lock.release()

    @contextmanager
    def _slot(self, deadline: float) -> Iterator[None]:
        with self._guard:
            mute = self._mute_until > 0
            if mute and (self._tried or time.monotonic() < self._mute_until):
                raise DeadlineExceeded(
                    "its virtual machine did not answer a moment ago", hint="it may hang: kill, start"
                )
            self._tried = mute
        try:
            if not self._slots.acquire(timeout=deadline):
                raise DeadlineExceeded("its virtual machine answers too slowly", hint="it may hang: kill, start")
            try:
                yield
                self._mute_until = 0.0
            except OSError:  # that is an answer
                self._mute_until = 0.0
                raise
            except DeadlineExceeded:
                self._mute_until = time.monotonic() + MUTE_SECONDS
                raise
            finally:
                self._slots.release()
        finally:
            if mute:
                with self._guard:
                    self._tried = False

    def call(self, verb: str, words: Words, deadline: float = DEADLINE) -> Values:
        with self._slot(deadline):
            try:
                return self._connected().call(verb, words, deadline=deadline)
            except (DeadlineExceeded, Unreachable, protocol.ProtocolError):
                raise
            except EngineError as error:
                raise Unreachable(error.reason, hint=error.hint) from error

    def close(self) -> None:
        """Idempotent. Calls under way fail."""
        client = self._client
        if client is not None:
            client.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def settle(self) -> None:
        """Wait for what is written behind; its errors are told to who wrote it, at its next call."""
        for file in list(self.dirty):
            file.arrived()

    @property
    def closed(self) -> bool:
        """Whether a connection there was has ended."""
        client = self._client
        return client is not None and client.closed

    # --- reading --------------------------------------------------------------------------------------------------

    def stat(self, root: str, path: bytes) -> Attr:
        key = root, path
        self.settle()
        with self._guard:
            found = self._listed.pop(key, None)
            if found is not None and found[0] > time.monotonic():
                if found[1] > 1:
                    self._listed[key] = found[0], found[1] - 1, found[2]
                return found[2]
        return protocol.parse_attr(self.call("STAT", {"root": root, "path": path}).need("attr"))

    def list(self, root: str, path: bytes) -> Iterator[tuple[bytes, Attr]]:
        """Names with attributes; the order is the guest's."""
        self.settle()
        words: Words = {"root": root, "path": path}
        while True:
            turn = self._turn
            values = self.call("LIST", words)
            until = time.monotonic() + BELIEVED
            entries = [protocol.parse_entry(data) for data in values.all("entry")]
            page = [(os.fsencode(name), attr) for name, attr in entries]
            with self._guard:
                if len(self._listed) + len(page) > MAX_BELIEVED:
                    self._listed.clear()
                for name, attr in page if turn == self._turn else ():
                    self._listed[root, path + b"/" + name if path else name] = until, 2, attr
            yield from page
            handle = values.get("handle")
            if handle is None:
                return
            words = {"handle": handle}

    def xattr_names(self, root: str, path: bytes) -> tuple[bytes, ...]:
        key = root, path
        with self._guard:
            known = self._names.get(key)
        if known is not None and known.until > time.monotonic():
            return known.names
        names = tuple(self.call("LISTXATTR", {"root": root, "path": path}).all("name"))
        with self._guard:
            if len(self._names) >= MAX_BELIEVED:
                self._names.clear()
            self._names[key] = Names(time.monotonic() + BELIEVED, names)
        return names

    def written(self, root: str, path: bytes) -> None:
        """Its size and times are others now; its xattrs (the kernel asks for them at every write) are not."""
        with self._guard:
            self._turn += 1
            self._listed.pop((root, path), None)

    def forget(self, root: str, *paths: bytes) -> None:
        """What was believed of these files, and of the directories they are in."""
        with self._guard:
            self._turn += 1
            for path in paths:
                for gone in (path, path.rpartition(b"/")[0]):
                    self._listed.pop((root, gone), None)
                    self._names.pop((root, gone), None)

    def change(self, verb: str, root: str, path: bytes, words: Words, *others: bytes) -> Values:
        """A verb that modifies `path` (and `others`)."""
        self.settle()
        self.forget(root, path, *others)
        turn = self._turn
        try:
            values = self.call(verb, {"root": root, "path": path, **words})
        finally:
            alone = turn == self._turn
            self.forget(root, path, *others)  # a listing may have come between
        found = values.get("attr")
        if found is not None and alone and not others:
            with self._guard:
                self._listed[root, path] = time.monotonic() + BELIEVED, 2, protocol.parse_attr(found)
        return values

    # --- open files -----------------------------------------------------------------------------------------------

    def open(self, root: str, path: bytes, letters: str, words: Words | None = None) -> GuestFile:
        """`letters` as verb OPEN has them."""
        values = self.change("OPEN", root, path, {"flags": letters, **(words or {})})
        handle = values.number("handle")
        attr = protocol.parse_attr(values.need("attr"))
        with self._guard:
            self.open_handles.setdefault((attr.dev, attr.ino), []).append(handle)
        return GuestFile(self, root, path, handle, (attr.dev, attr.ino))

    def handle_of(self, identity: tuple[int, int]) -> int | None:
        """An open handle of a file."""
        with self._guard:
            handles = self.open_handles.get(identity)
            return handles[-1] if handles else None

    def dropped(self, identity: tuple[int, int], handle: int) -> bool:
        """Whether that was its last handle."""
        with self._guard:
            handles = self.open_handles.get(identity, [])
            if handle in handles:
                handles.remove(handle)
            if handles:
                return False
            self.open_handles.pop(identity, None)
            return True


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
        self._read_to = 0  # where the reads in order have come to
        self._ahead: dict[int, tuple[float, Future[bytes]]] = {}  # offset -> when it was asked for, the bytes
        self._behind: list[tuple[int, int, Future[int]]] = []  # offset, end
        self._written_to, self._in_order = 0, 0

    # --- reading

    def _fetch(self, size: int, offset: int) -> bytes:
        data = self.files.call("READ", {"handle": self._handle, "offset": offset, "size": size}).need("data")
        if len(data) > size:
            raise protocol.ProtocolError(f"READ gave {len(data)} bytes where {size} were asked for")
        return data

    def read(self, size: int, offset: int) -> bytes:
        self.settle()
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
        with self._lock:
            if size == protocol.BULK and offset and abs(offset - self._read_to) <= PIPELINE * protocol.BULK:
                for number in range(1, PIPELINE + 1):
                    at = offset + number * protocol.BULK
                    if at not in self._ahead and len(self._ahead) < 2 * PIPELINE:
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

    def _send(self, data: bytes, offset: int) -> int:
        words: Words = {"handle": self._handle, "offset": offset, "data": data}
        return self.files.call("WRITE", words).number("size", most=len(data))

    def _send_all(self, data: bytes, offset: int) -> int:
        count = self._send(data, offset)
        if count < len(data):  # a full disk says so when it is asked for the rest
            count += self._send_all(data[count:], offset + count) if count else 0
        if count < len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return count

    def write(self, data: bytes, offset: int, *, append: bool = False) -> int:
        done = 0
        self.files.written(self._root, self._path)
        while done < len(data):
            part = bytes(data[done : done + protocol.BULK])
            if not append and self._later(part, offset + done):
                done += len(part)
                continue
            self.settle()
            count = self._send(part, offset + done)
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
            first = self._behind.pop(0) if len(self._behind) >= PIPELINE else None
        if first is not None:
            first[2].result()
        future = self.files.pool.submit(self._send_all, data, offset)
        with self._lock:
            self._behind.append((offset, offset + len(data), future))
        self.files.dirty.add(self)
        return True

    def settle(self) -> None:
        """Wait for what is written behind; the first of its errors."""
        if not self._behind:
            return
        with self._lock:
            pending, self._behind = self._behind, []
            self._in_order = 0
        self.files.dirty.discard(self)
        errors = [error for _, _, future in pending if (error := future.exception()) is not None]
        self.files.written(self._root, self._path)
        if errors:
            raise errors[0]

    def arrived(self) -> None:
        """Wait for what is written behind; errors stay for the writer."""
        wait([future for _, _, future in list(self._behind)])
        self.files.written(self._root, self._path)

    def _changed(self) -> None:
        self.settle()
        with self._lock:
            self._ahead.clear()
        self.files.written(self._root, self._path)

    def truncate(self, size: int) -> None:
        self._changed()
        self.files.call("TRUNCATE", {"handle": self._handle, "size": size})

    def sync(self) -> None:
        self.settle()
        self.files.call("FSYNC", {"handle": self._handle}, SYNC_SECONDS)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        self._changed()
        words: Words = {"handle": self._handle, "mode": mode, "offset": offset, "size": length}
        self.files.call("FALLOCATE", words, SYNC_SECONDS)

    def attr(self) -> Attr:
        self.settle()
        return protocol.parse_attr(self.files.call("STAT", {"handle": self._handle}).need("attr"))

    def close(self) -> bool:
        """Whether it was the last of its file."""
        last = self.files.dropped(self.identity, self._handle)
        try:
            self.settle()
        finally:
            self.files.call("CLOSE", {"handle": self._handle})
        return last


class Machines:
    """The machines of a store, by container."""

    def __init__(self, containers: Path) -> None:
        self._containers = containers
        self._lock = threading.Lock()
        self._files: dict[str, GuestFiles] = {}

    def of(self, id: str) -> GuestFiles:
        """Files of the running container `id`. Connects only when asked for some."""
        with self._lock:
            files = self._files.get(id)
            if files is None:
                for other in [key for key, known in self._files.items() if known.closed]:
                    self._files.pop(other).close()
                files = self._files[id] = GuestFiles(self._containers / id / "run" / "vm" / "agent.sock")
            return files

    def close(self) -> None:
        with self._lock:
            files: Sequence[GuestFiles] = list(self._files.values())
            self._files.clear()
        for each in files:
            each.close()
