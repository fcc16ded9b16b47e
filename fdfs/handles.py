"""Open virtual files: snapshots, growing files, control files, documents, settings, streams and editors' scratch files.

Floor 5. Only here: what a read, write, truncate and flush mean for each kind of row. A handle is made per open(2);
several threads may use one handle, so each that changes has its own lock.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

from engine.errors import AccessDenied, EngineError, InvalidArgument, NotFound, TooLarge
from fdfs import ctl
from fdfs.entry import BLOCK, Attr, File, Found, Handle, Keys, attr_of, render

MAX_DOCUMENT = 4 << 20  # bytes a document or scratch file may hold while it is written
MAX_SETTING = 1 << 20
MAX_SCRATCH = 64  # scratch files per directory


def _slice(content: bytes, size: int, offset: int) -> bytes:
    return content[offset : offset + size]


class Reader:
    """A file that can only be read: rendered once (snapshot), by range (growing), or on demand (wait).

    A growing file whose oldest part is no longer kept has the offsets and the size it always had, so followers go on.
    Who reads from the beginning and goes on without a seek (cat, grep, jq) gets the kept part only, as if it began
    there; who seeks into what is gone gets newlines.
    """

    direct = True
    keep = False

    def __init__(self, engine: Any, row: File, keys: Keys) -> None:
        self._engine, self._row, self._keys = engine, row, keys
        self.path = b""  # where it was opened
        self._content: bytes | None = None
        self._lock = threading.Lock()
        self._skipped = 0  # bytes at the beginning of the file that this reader does not see
        self._next = 0  # where it goes on if it does not seek
        if row.read is None and row.wait is None:
            self._content = render(engine, row, keys)

    def read(self, size: int, offset: int) -> bytes:
        row = self._row
        if row.read is not None:
            return self._range(row, size, offset)
        if self._content is None:
            # a wait in progress: empty until there is an answer, each read from the start asks again
            assert row.wait is not None
            answer = str(row.wait(self._engine, *self._keys)).encode() if offset == 0 else b""
            if not answer:
                return b""
            self._content = answer
        return _slice(self._content, size, offset)

    def _range(self, row: File, size: int, offset: int) -> bytes:
        assert row.read is not None
        if row.first is None:
            return bytes(row.read(self._engine, *self._keys, offset, size))
        with self._lock:
            if offset == 0:
                self._skipped, self._next = int(row.first(self._engine, *self._keys)), 0
            skipped = self._skipped if offset == self._next else 0
        data = bytes(row.read(self._engine, *self._keys, offset + skipped, size))
        with self._lock:
            if offset == self._next:
                self._next += len(data)
        return data

    def write(self, data: bytes, offset: int) -> int:
        raise AccessDenied(f"{self._row.name} cannot be written")

    def truncate(self, size: int) -> None:
        raise AccessDenied(f"{self._row.name} cannot be written")

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def size(self) -> int | None:
        """Bytes of the snapshot; None for a file without one."""
        return None if self._content is None or self._row.wait is not None else len(self._content)

    def attr(self) -> Attr | None:
        """Of a growing file, which is asked for its size all the time: by its pinned keys."""
        if self._row.read is None or not self.path:
            return None
        try:
            return self.kept(self.path)
        except NotFound:
            return None  # removed: what the path says now

    def kept(self, path: bytes) -> Attr:
        """What fstat(2) says of a file that is open while its path has gone: its object has another name."""
        return attr_of(self._engine, Found(self._row, self._keys), path)

    def close(self) -> None: ...


class Control:
    """A ctl. Writes run lines; a read on the same handle after a write gives the replies, before one the verbs."""

    direct = True
    keep = False

    def __init__(self, engine: Any, row: File, keys: Keys, who: Any) -> None:
        self._engine, self._row, self._keys, self._who = engine, row, keys, who
        self._lock = threading.Lock()
        self._reply: bytes | None = None
        self._base: int | None = None  # where the first read after the write began
        self._content: bytes | None = None

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            if self._reply is None:
                if self._content is None:
                    self._content = render(self._engine, self._row, self._keys)
                return _slice(self._content, size, offset)
            if self._base is None or offset < self._base:
                self._base = offset
            return _slice(self._reply, size, offset - self._base)

    def write(self, data: bytes, offset: int) -> int:
        reply = ctl.execute(self._engine, self._row, self._keys, data, self._who())
        with self._lock:
            self._reply = reply.encode()
            self._base = None
        return len(data)

    def truncate(self, size: int) -> None: ...  # `>` and `>>` mean the same here

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None: ...


class Buffer:
    """Bytes being written, with a bound."""

    def __init__(self, content: bytes, limit: int) -> None:
        self.content = bytearray(content)
        self._limit = limit

    def write(self, data: bytes, offset: int) -> None:
        if offset + len(data) > self._limit:
            raise TooLarge(f"larger than {self._limit} bytes")
        if offset > len(self.content):
            self.content.extend(b"\0" * (offset - len(self.content)))
        self.content[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        if size > self._limit:
            raise TooLarge(f"larger than {self._limit} bytes")
        del self.content[size:]
        self.content.extend(b"\0" * (size - len(self.content)))


class Document:
    """A whole document: buffered, applied at flush. Opening it with O_TRUNC and writing nothing changes nothing.

    (A shell opens, duplicates and closes the descriptor before the command writes: each close is a flush.)
    """

    direct = True
    keep = False

    def __init__(self, engine: Any, row: File, keys: Keys, who: Any, *, truncate: bool) -> None:
        self._engine, self._row, self._keys, self._who = engine, row, keys, who
        self._lock = threading.Lock()
        self._buffer = Buffer(b"" if truncate else render(engine, row, keys), MAX_DOCUMENT)
        self._dirty = False

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            return _slice(bytes(self._buffer.content), size, offset)

    def write(self, data: bytes, offset: int) -> int:
        with self._lock:
            self._buffer.write(data, offset)
            self._dirty = True
        return len(data)

    def truncate(self, size: int) -> None:
        with self._lock:
            self._buffer.truncate(size)
            self._dirty = self._dirty or size > 0

    def flush(self) -> None:
        with self._lock:
            if not self._dirty:
                return
            self._dirty = False
            apply(self._engine, self._row, self._keys, bytes(self._buffer.content), self._who())

    def fsync(self) -> None: ...

    def size(self) -> int:
        return len(self._buffer.content)

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None: ...


def apply(engine: Any, row: File, keys: Keys, content: bytes, who: str) -> None:
    """Apply a whole document. A failure is recorded for the object, changes nothing, and is raised."""
    assert row.commit is not None
    with engine.command(ctl.object_of(engine, row, keys), f"write {row.name}", who=who):
        row.commit(engine, *keys, content)


class Setting:
    """One value: what has been written so far is applied by every write, so that a shell's `echo` sees the error."""

    direct = True
    keep = False

    def __init__(self, engine: Any, row: File, keys: Keys, who: Any, *, append: bool) -> None:
        self._engine, self._row, self._keys, self._who = engine, row, keys, who
        self._lock = threading.Lock()
        self._before = render(engine, row, keys) if row.show is not None else b""
        self._append = append
        self._buffer: Buffer | None = None

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            return _slice(bytes(self._buffer.content) if self._buffer else self._before, size, offset)

    def write(self, data: bytes, offset: int) -> int:
        with self._lock:
            if self._buffer is None:
                # a value is replaced, not patched, whether or not the writer truncated; only `>>` adds to it
                self._buffer = Buffer(self._before if self._append else b"", MAX_SETTING)
                if self._append:
                    offset = len(self._before)
            kept = bytes(self._buffer.content)
            self._buffer.write(data, offset)
            try:
                self._set(bytes(self._buffer.content))
            except BaseException:
                self._buffer = Buffer(kept, MAX_SETTING)
                raise
        return len(data)

    def _set(self, content: bytes) -> None:
        assert self._row.set is not None
        shown = content.decode("utf-8", "replace").rstrip("\n")[:200]
        name = ctl.object_of(self._engine, self._row, self._keys)
        file = self._keys[-1] if self._row.name.startswith("<") else self._row.name
        with self._engine.command(name, f"{file} = {shown}", who=self._who()):
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise InvalidArgument(f"{file}: not UTF-8 at byte {error.start}") from error
            self._row.set(self._engine, *self._keys, text)

    def truncate(self, size: int) -> None: ...

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None: ...


class Feed:
    """A stream: bytes go on in the order they are written, whatever the offset. A short write says how many went."""

    direct = True
    keep = False

    def __init__(self, engine: Any, row: File, keys: Keys) -> None:
        self._engine, self._row, self._keys = engine, row, keys

    def read(self, size: int, offset: int) -> bytes:
        raise AccessDenied(f"{self._row.name} cannot be read")

    def write(self, data: bytes, offset: int) -> int:
        assert self._row.feed is not None
        try:
            return int(self._row.feed(self._engine, *self._keys, data))
        except EngineError as error:
            self._engine.failures.record(ctl.object_of(self._engine, self._row, self._keys), self._row.name, error)
            raise

    def truncate(self, size: int) -> None: ...

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None: ...


def open_row(engine: Any, row: File, keys: Keys, flags: int, who: Any) -> Handle:
    """The handle for an open(2) of a virtual file. AccessDenied for a direction without a handler, for root too."""
    writing = flags & os.O_ACCMODE != os.O_RDONLY
    reading = flags & os.O_ACCMODE != os.O_WRONLY
    if writing and not row.writable:
        raise AccessDenied(f"{row.name} cannot be written")
    if reading and not row.readable:
        raise AccessDenied(f"{row.name} cannot be read")
    if row.opens is not None:
        handle: Handle = row.opens(engine, *keys)
        return handle
    if row.verbs is not None:
        return Control(engine, row, keys, who)
    if writing and row.commit is not None:
        return Document(engine, row, keys, who, truncate=bool(flags & os.O_TRUNC))
    if row.feed is not None:
        return Feed(engine, row, keys)
    if writing:
        return Setting(engine, row, keys, who, append=bool(flags & os.O_APPEND))
    return Reader(engine, row, keys)


# --- editors' scratch files -------------------------------------------------------------------------------------


class Scratch:
    """One scratch file in memory, and its own open handle."""

    direct = False
    keep = False

    def __init__(self, mode: int, uid: int, gid: int, content: bytes = b"") -> None:
        self._lock = threading.Lock()
        self.mode, self.uid, self.gid = mode, uid, gid
        self.mtime_ns = time.time_ns()
        self.buffer = Buffer(content, MAX_DOCUMENT)

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            return _slice(bytes(self.buffer.content), size, offset)

    def write(self, data: bytes, offset: int) -> int:
        with self._lock:
            self.buffer.write(data, offset)
            self.mtime_ns = time.time_ns()
        return len(data)

    def truncate(self, size: int) -> None:
        with self._lock:
            self.buffer.truncate(size)
            self.mtime_ns = time.time_ns()

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def attr(self) -> Attr | None:
        size = len(self.buffer.content)
        times = self.mtime_ns
        return Attr(
            mode=self.mode,
            size=size,
            ino=(id(self) >> 4) | 1 << 62,
            uid=self.uid,
            gid=self.gid,
            mtime_ns=times,
            ctime_ns=times,
            atime_ns=times,
            blocks=(size + BLOCK - 1) // BLOCK,
        )

    def close(self) -> None: ...


class ScratchFiles:
    """The scratch files of every directory that holds a document, by (directory path, name). Bounded, never stored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[bytes, dict[bytes, Scratch]] = {}

    def get(self, directory: bytes, name: bytes) -> Scratch | None:
        return self._files.get(directory, {}).get(name)

    def names(self, directory: bytes) -> list[bytes]:
        with self._lock:
            return list(self._files.get(directory, {}))

    def put(self, directory: bytes, name: bytes, file: Scratch) -> None:
        with self._lock:
            files = self._files.setdefault(directory, {})
            if name not in files and len(files) >= MAX_SCRATCH:
                raise OSError(errno.ENOSPC, "too many scratch files", os.fsdecode(name))
            files[name] = file

    def pop(self, directory: bytes, name: bytes) -> Scratch | None:
        with self._lock:
            files = self._files.get(directory, {})
            file = files.pop(name, None)
            if not files:
                self._files.pop(directory, None)
            return file

    def forget(self, directory: bytes) -> None:
        """Drop everything below a directory that was removed."""
        with self._lock:
            for known in [key for key in self._files if key == directory or key.startswith(directory + b"/")]:
                del self._files[known]
