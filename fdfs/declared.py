"""The declared namespace as a file system: what every operation means on rows. Floor 6.

Only here: mkdir and rmdir as create and remove, refusal of litter, and the scratch files editors make beside a document
(swap, backup, write-temp-then-rename). Paths are bytes from the mount's root. Thread-safe.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterable
from typing import Any

from engine.errors import AccessDenied, EngineError, InvalidArgument, NotFound
from fdfs.ctl import object_of
from fdfs.entry import (
    HIDDEN,
    Attr,
    Dir,
    File,
    Found,
    Handle,
    Link,
    attr_of,
    inode,
    is_litter,
    listing,
    mode_of,
    pinned,
    render,
    walk,
)
from fdfs.handles import Scratch, ScratchFiles, apply, open_row

Context = Callable[[], tuple[int, int, int]]  # -> uid, gid, pid of the caller


class Declared:
    """The rows below `root`, served with `engine`."""

    def __init__(self, engine: Any, root: Dir, context: Context) -> None:
        self._engine, self._root, self._context = engine, root, context
        self._scratch = ScratchFiles()

    def who(self) -> str:
        uid, _, pid = self._context()
        return f"uid={uid} pid={pid}"

    def find(self, path: bytes) -> Found:
        return walk(self._engine, self._root, path)

    def scratch(self, path: bytes) -> Scratch | None:
        return self._scratch.get(posixpath.dirname(path), posixpath.basename(path))

    # --- reading ----------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes, found: Found) -> Attr:
        return attr_of(self._engine, found, path)

    def readdir(self, path: bytes, found: Found) -> Iterable[tuple[bytes, int, int]]:
        if not isinstance(found.row, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        base = path.rstrip(b"/") + b"/"
        seen = set()
        for name, row in listing(self._engine, found.row, found.keys):
            raw = name.encode("utf-8", "surrogateescape")
            seen.add(raw)
            yield raw, inode(base + raw), mode_of(row)
        for raw in self._scratch.names(path.rstrip(b"/")):
            if raw not in seen and not raw.startswith(HIDDEN):
                yield raw, inode(base + raw), stat.S_IFREG

    def readlink(self, found: Found) -> bytes:
        if not isinstance(found.row, Link):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.fsencode(found.row.target(self._engine, *found.keys))

    def open(self, found: Found, flags: int) -> Handle:
        row = found.row
        if isinstance(row, Dir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if isinstance(row, Link):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        who = self.who()
        keys = found.keys
        if row.read is not None or row.wait is not None:  # these are read for long
            keys = pinned(self._engine, found)
        return open_row(self._engine, row, keys, flags, lambda: who)

    # --- changing ---------------------------------------------------------------------------------------------------

    def _directory(self, path: bytes) -> tuple[Dir, tuple[str, ...], bytes, bytes]:
        """(row, keys, its path, last component) of the directory that holds `path`."""
        parent, name = posixpath.split(path)
        found = self.find(parent)
        if not isinstance(found.row, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return found.row, found.keys, parent, name

    def _room(self, path: bytes) -> tuple[bytes, bytes]:
        """(directory, name) where a scratch file may be; EACCES elsewhere and for what desktops litter."""
        row, _, parent, name = self._directory(path)
        if not row.scratch or is_litter(name) or name.decode("utf-8", "surrogateescape") in row.index:
            raise AccessDenied(f"{os.fsdecode(name)!r} cannot be created here")
        return parent, name

    def create(self, path: bytes, mode: int, flags: int) -> Handle:
        try:
            found = self.find(path)
        except NotFound:
            parent, name = self._room(path)
            uid, gid, _ = self._context()
            file = Scratch(stat.S_IFREG | stat.S_IMODE(mode), uid, gid)
            self._scratch.put(parent, name, file)
            return file
        return self.open(found, flags)

    def mkdir(self, path: bytes) -> None:
        row, keys, _, name = self._directory(path)
        if row.mkdir is None or is_litter(name):
            raise AccessDenied(f"{os.fsdecode(name)!r} cannot be created here")
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise InvalidArgument("names here are UTF-8", at=ascii(name)) from None
        with self._engine.command(object_of(self._engine, row, keys), f"mkdir {text}", who=self.who()):
            row.mkdir(self._engine, *keys, text)

    def rmdir(self, path: bytes) -> None:
        found = self.find(path)
        row = found.row
        if not isinstance(row, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if row.rmdir is None:
            raise AccessDenied(f"{row.name} cannot be removed")
        with self._engine.command(object_of(self._engine, row, found.keys), f"rmdir {found.keys[-1]}", who=self.who()):
            row.rmdir(self._engine, *found.keys)
        self._scratch.forget(path)

    def unlink(self, path: bytes) -> None:
        if self._scratch.pop(posixpath.dirname(path), posixpath.basename(path)) is None:
            self.find(path)  # ENOENT when there is nothing at all
            if not posixpath.basename(path).startswith(HIDDEN):
                raise AccessDenied("this file is part of its directory")

    def rename(self, path: bytes, to: bytes) -> None:
        """Scratch onto a document commits it; a document onto scratch leaves a copy there; scratch just moves."""
        there, new = posixpath.split(to)
        here, old = posixpath.split(path)
        file = self._scratch.get(here, old)
        if file is None:
            found = self.find(path)
            if isinstance(found.row, Dir) and found.row.rename is not None and here == there:
                self._rename_object(found, found.row, path, new)
            else:
                self._set_aside(path, there, new)
            return
        try:
            target = self.find(to)
        except NotFound:
            self._room(to)
            self._scratch.pop(here, old)
            self._scratch.put(there, new, file)
            return
        row = target.row
        if not isinstance(row, File) or row.commit is None:
            raise AccessDenied(f"{row.name} is not a document")
        apply(self._engine, row, target.keys, bytes(file.buffer.content), self.who())
        self._scratch.pop(here, old)

    def _rename_object(self, found: Found, row: Dir, path: bytes, new: bytes) -> None:
        assert row.rename is not None
        try:
            name = new.decode()
        except UnicodeDecodeError:
            raise InvalidArgument("names here are UTF-8", at=ascii(new)) from None
        if is_litter(new):
            raise AccessDenied(f"{name!r} is no name for it")
        with self._engine.command(object_of(self._engine, row, found.keys), f"rename {name}", who=self.who()):
            row.rename(self._engine, *found.keys, name)
        self._scratch.forget(path)

    def _set_aside(self, path: bytes, there: bytes, new: bytes) -> None:
        """`mv config.yaml config.yaml~` as editors do before they write anew: the copy appears, the document stays."""
        found = self.find(path)
        row = found.row
        if not isinstance(row, File) or (row.commit is None and not new.startswith(HIDDEN)):
            raise AccessDenied(f"{row.name} cannot be renamed")
        if new.startswith(HIDDEN):
            return  # libfuse keeps an open file alive; its handle does not need the name
        self._room(there + b"/" + new)
        uid, gid, _ = self._context()
        copy = Scratch(stat.S_IFREG | 0o644, uid, gid, render(self._engine, row, found.keys))
        self._scratch.put(there, new, copy)

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        """Every modifying operation by its FUSE name."""
        if operation == "create":
            mode, flags, *umask = arguments
            return self.create(path, mode & ~sum(umask), flags)
        if operation == "mkdir":
            return self.mkdir(path)
        if operation in ("rmdir", "unlink", "rename"):
            return getattr(self, operation)(path, *arguments)
        if operation in ("symlink", "mknod", "link"):
            raise AccessDenied(f"{operation} is not possible here")
        file = self.scratch(path)
        if file is None:
            found = self.find(path)
            if operation in ("chmod", "chown", "utimens") and isinstance(found.row, File) and found.row.writable:
                return None  # `cp -p` and editors restore these; they mean nothing here and need not fail
            if operation == "truncate" and isinstance(found.row, File) and found.row.writable:
                return None  # `>` before a write
            if operation in ("setxattr", "removexattr"):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            raise AccessDenied(f"{operation} is not possible on {found.row.name}")
        return self._scratch_change(file, operation, arguments)

    @staticmethod
    def _scratch_change(file: Scratch, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "truncate":
            file.truncate(arguments[0])
        elif operation == "chmod":
            file.mode = stat.S_IFREG | stat.S_IMODE(arguments[0])
        elif operation == "chown":
            file.uid = file.uid if arguments[0] == -1 else arguments[0]
            file.gid = file.gid if arguments[1] == -1 else arguments[1]
        elif operation == "utimens":
            return
        else:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def errno_of(error: BaseException) -> int | None:
    """The errno of a failure that has one; None for a bug."""
    if isinstance(error, EngineError):
        return error.errno
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return error.errno
    return None
