"""Files in a running guest, as its agent serves them: what the mount shows of a virtual machine's container.

Floor 2. Only here: one connection per container, made when first needed and again after it broke; the deadline of every
call; and that a mute guest is asked by few at a time and then not at all for a moment, so it cannot take the threads of
who asks. Attributes that came with a listing, and the names of a file's xattrs, are believed for a moment: `ls -l`
costs one call, not one per file. What is changed through here is never answered from there. Thread-safe.

Errors: OSError with the guest's errno; DeadlineExceeded; Unreachable when nobody answers at the socket; ProtocolError.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine import host
from engine.errors import DeadlineExceeded, EngineError, Unreachable
from engine.runtimes.vm import protocol
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import Attr, Values, Words

DEADLINE = 5.0  # seconds of one call; a guest under load answers in milliseconds
SYNC_SECONDS = 30.0  # of fsync(2), which waits for a disk
MUTE_SECONDS = 3.0  # how long a guest that missed a deadline is not asked again
AT_ONCE = 16  # calls of one guest that may be under way: the agent's file workers are fewer
BELIEVED = 2.0  # seconds that what came with a listing is believed, twice at most: a lookup and a stat
MAX_BELIEVED = 1 << 16
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
        self._mute_until = 0.0
        self._guard = threading.Lock()  # of all below; never held over I/O
        self._listed: dict[tuple[str, bytes], tuple[float, int, Attr]] = {}  # until, uses left
        self._names: dict[tuple[str, bytes], Names] = {}
        self.open_handles: dict[tuple[int, int], list[int]] = {}  # dev, ino -> handles of the agent

    # --- calls ----------------------------------------------------------------------------------------------------

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(DEADLINE)
            with host.directory_fd(self._path.parent) as place:  # a path may be longer than an address
                sock.connect(f"/proc/self/fd/{place}/{self._path.name}" if host.LINUX else str(self._path))
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
        if time.monotonic() < self._mute_until:
            raise DeadlineExceeded("its virtual machine did not answer a moment ago", hint="it may hang: kill, start")
        if not self._slots.acquire(timeout=deadline):
            raise DeadlineExceeded("its virtual machine answers too slowly", hint="it may hang: kill, start")
        try:
            yield
        except DeadlineExceeded:
            self._mute_until = time.monotonic() + MUTE_SECONDS
            raise
        finally:
            self._slots.release()

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

    @property
    def closed(self) -> bool:
        """Whether a connection there was has ended."""
        client = self._client
        return client is not None and client.closed

    # --- reading --------------------------------------------------------------------------------------------------

    def stat(self, root: str, path: bytes) -> Attr:
        key = root, path
        with self._guard:
            found = self._listed.pop(key, None)
            if found is not None and found[0] > time.monotonic():
                if found[1] > 1:
                    self._listed[key] = found[0], found[1] - 1, found[2]
                return found[2]
        return protocol.parse_attr(self.call("STAT", {"root": root, "path": path}).need("attr"))

    def list(self, root: str, path: bytes) -> Iterator[tuple[bytes, Attr]]:
        """Names with attributes; the order is the guest's."""
        words: Words = {"root": root, "path": path}
        while True:
            values = self.call("LIST", words)
            until = time.monotonic() + BELIEVED
            entries = [protocol.parse_entry(data) for data in values.all("entry")]
            page = [(os.fsencode(name), attr) for name, attr in entries]
            with self._guard:
                if len(self._listed) + len(page) > MAX_BELIEVED:
                    self._listed.clear()
                for name, attr in page:
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
            self._listed.pop((root, path), None)

    def forget(self, root: str, *paths: bytes) -> None:
        """What was believed of these files, and of the directories they are in."""
        with self._guard:
            for path in paths:
                for gone in (path, path.rpartition(b"/")[0]):
                    self._listed.pop((root, gone), None)
                    self._names.pop((root, gone), None)

    def change(self, verb: str, root: str, path: bytes, words: Words, *others: bytes) -> Values:
        """A verb that modifies `path` (and `others`)."""
        self.forget(root, path, *others)
        try:
            return self.call(verb, {"root": root, "path": path, **words})
        finally:
            self.forget(root, path, *others)  # a listing may have come between

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
    """An open file of a guest. It is of the connection it was opened on: afterwards EBADF."""

    def __init__(self, files: GuestFiles, root: str, path: bytes, handle: int, identity: tuple[int, int]) -> None:
        self.files, self.identity = files, identity
        self._root, self._path, self._handle = root, path, handle

    def read(self, size: int, offset: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            wanted = min(size, protocol.BULK)
            data = self.files.call("READ", {"handle": self._handle, "offset": offset, "size": wanted}).need("data")
            if len(data) > wanted:
                raise protocol.ProtocolError(f"READ gave {len(data)} bytes where {wanted} were asked for")
            parts.append(data)
            if len(data) < wanted:
                break
            size -= wanted
            offset += wanted
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: bytes, offset: int) -> int:
        done = 0
        self.files.written(self._root, self._path)
        while done < len(data):
            part = data[done : done + protocol.BULK]
            answer = self.files.call("WRITE", {"handle": self._handle, "offset": offset + done, "data": part})
            count = answer.number("size", most=len(part))
            done += count
            if count < len(part):
                break
        return done

    def truncate(self, size: int) -> None:
        self.files.written(self._root, self._path)
        self.files.call("TRUNCATE", {"handle": self._handle, "size": size})

    def sync(self) -> None:
        self.files.call("FSYNC", {"handle": self._handle}, SYNC_SECONDS)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        self.files.written(self._root, self._path)
        words = {"handle": self._handle, "mode": mode, "offset": offset, "size": length}
        self.files.call("FALLOCATE", words, SYNC_SECONDS)

    def attr(self) -> Attr:
        return protocol.parse_attr(self.files.call("STAT", {"handle": self._handle}).need("attr"))

    def close(self) -> bool:
        """Whether it was the last of its file."""
        last = self.files.dropped(self.identity, self._handle)
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
                    del self._files[other]
                files = self._files[id] = GuestFiles(self._containers / id / "run" / "vm" / "agent.sock")
            return files

    def close(self) -> None:
        with self._lock:
            files: Sequence[GuestFiles] = list(self._files.values())
            self._files.clear()
        for each in files:
            each.close()
