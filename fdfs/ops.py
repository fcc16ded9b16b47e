"""File system operations on paths: routing to the declared namespace or to a graft, and the one guard. Floor 6.

Only here: the guard that turns every failure into an errno (EngineError by its class, OSError as it is, anything else
EIO with a traceback in the log: fusepy and libfuse mistreat exceptions that reach them), the table of open files, and
the short-lived cache of grafts. No ctypes, no libfuse: tests call these methods as the binding does. Paths are bytes.
Runs in the threads of the mount; nothing here waits, except a `wait` file's read (at most a second).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import posixpath
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.errors import Busy, EngineError, Gone, NotFound
from fdfs.declared import Context, Declared, errno_of
from fdfs.entry import Attr, Dir, Found, Graft, Handle, Keys
from fdfs.handles import Reader

log = logging.getLogger(__name__)

GRAFT_SECONDS = 0.25  # how long a graft is believed to be what its path leads to
MAX_GRAFTS = 512

OnGraft = Callable[[bytes, Dir, Keys], None]


class Operations:
    """Everything the binding asks. `context` gives (uid, gid, pid) of the caller of the current operation.

    `on_graft(path, row, keys)` hears of grafts in use (and of those one step below a path in use); it must not block.
    `before_follow(path)` is called with the target of a symlink about to be followed and may take a few milliseconds.
    """

    def __init__(
        self,
        engine: Any,
        root: Dir,
        context: Context,
        on_graft: OnGraft | None = None,
        before_follow: Callable[[bytes], None] | None = None,
    ) -> None:
        self.declared = Declared(engine, root, context)
        self._engine = engine
        self._on_graft = on_graft
        self._before_follow = before_follow
        self._handles: dict[int, Handle] = {}
        self._readers: dict[bytes, tuple[Reader, ...]] = {}  # open ones, by the path they were opened at
        self._numbers = itertools.count(1)
        self._grafts: dict[bytes, tuple[Graft, float]] = {}
        self._depths: set[int] = set()
        self._lock = threading.Lock()

    def failure(self, operation: str, error: BaseException) -> int:
        """The errno of a failure; what has none is a bug: EIO, with its traceback in the log."""
        number = errno_of(error)
        if number is None:
            log.error("%s failed; the caller sees EIO", operation, exc_info=error)
            return errno.EIO
        return number

    def guard(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)`; every failure becomes an OSError with a positive errno."""
        try:
            return call(*arguments)
        except BaseException as error:
            number = self.failure(operation, error)
            raise OSError(number, os.strerror(number)) from error

    # --- routing ----------------------------------------------------------------------------------------------------

    def _grafted(self, path: bytes) -> tuple[Graft, bytes] | None:
        """A graft that was found a moment ago, without asking the engine again."""
        parts = path.split(b"/")
        for depth in self._depths:
            known = self._grafts.get(b"/".join(parts[: depth + 1]))
            if known is not None and known[1] > time.monotonic() and not (getattr(known[0], "gone", None) or bool)():
                return known[0], b"/".join(parts[depth + 1 :])
        return None

    def route(self, path: bytes) -> tuple[Graft, bytes] | Found:
        """The graft and the path in it, or the declared row."""
        known = self._grafted(path)
        if known is not None:
            return known
        found = self.declared.find(path)
        row = found.row
        if self._on_graft is not None and isinstance(row, Dir):
            for below in row.rows:
                if isinstance(below, Dir) and below.bind is not None:
                    self._on_graft(path.rstrip(b"/") + b"/" + below.name.encode(), below, found.keys)
        if found.rest is None:
            return found
        assert isinstance(row, Dir) and row.graft is not None
        try:
            graft: Graft = row.graft(self._engine, *found.keys)
        except EngineError:
            if found.rest:
                raise
            return Found(row, found.keys)  # nothing to show yet: an empty directory, so that its parent stays browsable
        prefix = path[: len(path) - len(found.rest)].rstrip(b"/") if found.rest else path.rstrip(b"/")
        if not getattr(graft, "fleeting", False):
            with self._lock:
                if len(self._grafts) >= MAX_GRAFTS:
                    self._grafts.clear()
                self._grafts[prefix] = (graft, time.monotonic() + GRAFT_SECONDS)
                self._depths = self._depths | {prefix.count(b"/")}
        if self._on_graft is not None and row.bind is not None:
            self._on_graft(prefix, row, found.keys)
        return graft, found.rest

    def forget(self, path: bytes) -> None:
        """Drop cached grafts at or below `path` (removed)."""
        with self._lock:
            for prefix in [p for p in self._grafts if p == path or p.startswith(path.rstrip(b"/") + b"/")]:
                del self._grafts[prefix]

    # --- reading ----------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes, handle: int = 0) -> Attr:
        if handle and (opened := self._handles.get(handle)) is not None:
            attr = opened.attr()
            if attr is not None:
                return attr
        try:
            where = self.route(path)
        except NotFound:
            for reader in self._readers.get(path, ()):  # fstat(2) of what has another name now; gone too: NotFound
                return reader.kept(path)
            scratch = self.declared.scratch(path)
            attr = scratch.attr() if scratch is not None else None
            if attr is None:
                raise
            return attr
        if isinstance(where, Found):
            return self.declared.getattr(path, where)
        return where[0].getattr(where[1])

    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]:
        where = self.route(path)
        if isinstance(where, Found):
            self._refuse_busy(where)
        yield b".", 0, stat.S_IFDIR
        yield b"..", 0, stat.S_IFDIR
        if isinstance(where, Found):
            yield from self.declared.readdir(path, where)
        else:
            yield from where[0].readdir(where[1])

    def _refuse_busy(self, found: Found) -> None:
        """A graft that is there, but not now, is not listed as if it were empty: Busy."""
        row = found.row
        if isinstance(row, Dir) and row.graft is not None:
            try:
                row.graft(self._engine, *found.keys)
            except Busy:
                raise
            except EngineError:
                pass  # there is nothing to show yet

    def readdir_from(self, path: bytes, offset: int) -> Iterable[tuple[bytes, int, int, int]] | None:
        """A part of a listing that is too long to be held: (name, inode, mode, offset of the next); None for others."""
        where = self.route(path)
        paged = None if isinstance(where, Found) else getattr(where[0], "readdir_from", None)
        if isinstance(where, Found) or paged is None:
            return None
        return itertools.chain(
            [(b".", 0, stat.S_IFDIR, 1)] if offset < 1 else [],
            [(b"..", 0, stat.S_IFDIR, 2)] if offset < 2 else [],
            paged(where[1], offset if offset > 2 else 0),
        )

    def readlink(self, path: bytes) -> bytes:
        where = self.route(path)
        if not isinstance(where, Found):
            return where[0].readlink(where[1])
        target = self.declared.readlink(where)
        if self._before_follow is not None:
            self._before_follow(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        return target

    def opened(self, handle: Handle) -> int:
        """The number of a new open file."""
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def handle(self, number: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def open(self, path: bytes, flags: int) -> tuple[int, Handle]:
        try:
            where = self.route(path)
        except NotFound:
            scratch = self.declared.scratch(path)
            if scratch is None:
                raise
            if flags & os.O_TRUNC:
                scratch.truncate(0)
            return self.opened(scratch), scratch
        if isinstance(where, Found):
            handle = self.declared.open(where, flags)
        else:
            try:
                handle = where[0].open(where[1], flags)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                # the kernel has believed a name of a moment ago: it looks again, and makes the file if that is wanted
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from error
        if isinstance(handle, Reader):
            with self._lock:
                self._readers[path] = (*self._readers.get(path, ()), handle)
                handle.path = path
        return self.opened(handle), handle

    def create(self, path: bytes, mode: int, flags: int, umask: int = 0) -> tuple[int, Handle]:
        handle: Handle = self.change("create", path, mode, flags, umask)
        return self.opened(handle), handle

    def read(self, number: int, size: int, offset: int) -> bytes:
        try:
            return self.handle(number).read(size, offset)
        except NotFound as error:
            raise Gone("removed while open") from error

    def write(self, number: int, data: bytes, offset: int) -> int:
        return self.handle(number).write(data, offset)

    def flush(self, number: int) -> None:
        self.handle(number).flush()

    def fsync(self, number: int) -> None:
        self.handle(number).fsync()

    def ftruncate(self, number: int, size: int) -> None:
        self.handle(number).truncate(size)

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        allocate = getattr(self.handle(number), "allocate", None)
        if allocate is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        allocate(mode, offset, length)

    def fsyncdir(self, path: bytes) -> None:
        where = self.route(path)
        sync = None if isinstance(where, Found) else getattr(where[0], "sync", None)
        if sync is not None and not isinstance(where, Found):
            sync(where[1])

    def access(self, path: bytes, wanted: int) -> None:
        """access(2) and chdir(2), where the kernel does not check permissions itself: EACCES."""
        where = self._route_or_scratch(path)
        allowed = None if where is None or isinstance(where, Found) else getattr(where[0], "access", None)
        if allowed is not None and where is not None and not isinstance(where, Found):
            fine = allowed(where[1], wanted)
        else:
            mode = self.getattr(
                path
            ).mode  # everything is there to be looked at; root may write, but not run what none may
            fine = not wanted & os.X_OK or stat.S_ISDIR(mode) or bool(mode & 0o111)
        if not fine:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def release(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if isinstance(handle, Reader):
            with self._lock:
                left = tuple(other for other in self._readers[handle.path] if other is not handle)
                if left:
                    self._readers[handle.path] = left
                else:
                    del self._readers[handle.path]
        if handle is not None:
            handle.close()

    def listxattr(self, path: bytes) -> list[bytes]:
        where = self._route_or_scratch(path)
        return [] if where is None or isinstance(where, Found) else where[0].listxattr(where[1])

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        where = self._route_or_scratch(path)
        if where is None or isinstance(where, Found):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return where[0].getxattr(where[1], name)

    def _route_or_scratch(self, path: bytes) -> tuple[Graft, bytes] | Found | None:
        try:
            return self.route(path)
        except NotFound:
            if self.declared.scratch(path) is None:
                raise
            return None

    def statfs(self, path: bytes) -> Mapping[str, int]:
        where = self._route_or_scratch(path)
        if where is not None and not isinstance(where, Found):
            return where[0].statfs()
        st = os.statvfs(self._engine.store)
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
        return {key: getattr(st, key) for key in keys}

    # --- changing ---------------------------------------------------------------------------------------------------

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        """Every modifying operation by its FUSE name, on paths."""
        try:
            where = self.route(path)
        except NotFound:
            where = None  # a new object, or a scratch file
        if where is None or isinstance(where, Found):
            if operation in ("rename", "link") and not self._declared(arguments[0]):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            result = self.declared.change(operation, path, *arguments)
            if operation in ("rmdir", "rename"):
                self.forget(path)
            if operation == "rename":
                self._moved(path, arguments[0])
            return result
        graft, rest = where
        if operation in ("rename", "link"):
            target = None if self._declared(arguments[0]) else self.route(arguments[0])
            if (
                target is None
                or isinstance(target, Found)
                or self._prefix(path, rest) != self._prefix(arguments[0], target[1])
            ):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            arguments = (target[1], *arguments[1:])
        if not rest and operation in ("rmdir", "unlink", "rename", "mkdir", "create"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return graft.change(operation, rest, *arguments)

    def _moved(self, old: bytes, new: bytes) -> None:
        """A directory was renamed through the mount: the kernel knows open files below it by their new paths."""
        with self._lock:
            for path in [path for path in self._readers if path.startswith(old + b"/")]:
                readers = self._readers.pop(path)
                path = new + path.removeprefix(old)
                for reader in readers:
                    reader.path = path
                self._readers[path] = (*self._readers.get(path, ()), *readers)

    def _declared(self, path: bytes) -> bool:
        try:
            return isinstance(self.route(path), Found)
        except NotFound:
            return True

    @staticmethod
    def _prefix(path: bytes, rest: bytes) -> bytes:
        return path[: len(path) - len(rest)].rstrip(b"/")
