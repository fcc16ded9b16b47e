"""What a container changed: its overlay upper against its image's tree. Floor 2.

An upper is a directory of this host, or in a running guest (runtimes/vm/guestupper.py); `Upper` is what both can do.

Only here: how an overlay upper reads (kernel Documentation/filesystems/overlayfs.rst): a 0:0 character device is a
whiteout, `trusted.overlay.opaque` = y on a directory hides what lies below it (`user.overlay.opaque` where the overlay
was mounted in a user namespace). Bounded, streaming, thread-safe.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from engine import host, userids
from engine.errors import Busy, EngineError
from engine.store.trees import Tree
from engine.walk import RESOLVE, walk

OPAQUE, USER_OPAQUE = b"trusted.overlay.opaque", b"user.overlay.opaque"
MAX_CHANGES = 1_000_000
# made by the runtime to mount something over
PLACES = frozenset({b"dev", b"proc", b"sys", b"etc/hosts", b"etc/hostname", b"etc/resolv.conf", b".dockerenv"})


PIECE = 1 << 20


class Upper(Protocol):
    """What overlay wrote, below one directory. Paths are relative to that, b'' is itself."""

    # (path, `here` for the two below until the next step, entries by name), as walk.walk
    def walk(
        self, limit: int, *, whole: bool = False
    ) -> Iterator[tuple[bytes, Any, list[tuple[bytes, os.stat_result]]]]: ...
    def opaque(self, here: Any) -> bool: ...  # whether the directory hides what lies below it
    def empty(self, here: Any, name: bytes) -> bool: ...  # whether there is nothing in its directory `name`
    def xattrs(self, path: bytes) -> dict[bytes, bytes]: ...  # all of them
    def readlink(self, path: bytes) -> bytes: ...
    def body(self, path: bytes, size: int) -> Iterator[bytes]: ...  # Busy when the file is shorter


class Directory:
    """An upper on this host, below the open directory `top`: nothing of it is followed out of it."""

    def __init__(self, top: int) -> None:
        self._top = top

    def walk(
        self, limit: int, *, whole: bool = False
    ) -> Iterator[tuple[bytes, int, list[tuple[bytes, os.stat_result]]]]:
        return walk(self._top, limit, whole=whole)

    def opaque(self, here: int) -> bool:
        return is_opaque(here)

    def empty(self, here: int, name: bytes) -> bool:
        return _is_empty(here, name)

    def _open(self, path: bytes, flags: int) -> int:
        return host.open_in_root(self._top, path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, resolve=RESOLVE)

    def _in_parent(self, path: bytes) -> tuple[int, bytes]:
        """(an open directory, a name in it)."""
        parent, _, name = path.rpartition(b"/")
        return self._open(parent, os.O_RDONLY | os.O_DIRECTORY), name

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        if not hasattr(os, "listxattr"):
            return {}
        fd, name = self._in_parent(path)
        try:
            where = os.path.join(b"/proc/self/fd/%d" % fd, name)  # of links and devices too: they are not opened
            names = sorted(os.listxattr(where, follow_symlinks=False))
            return {os.fsencode(key): os.getxattr(where, key, follow_symlinks=False) for key in names}
        finally:
            os.close(fd)

    def readlink(self, path: bytes) -> bytes:
        fd, name = self._in_parent(path)
        try:
            return os.readlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def body(self, path: bytes, size: int) -> Iterator[bytes]:
        fd = self._open(path, os.O_RDONLY)
        try:
            while size and (piece := os.read(fd, min(PIECE, size))):
                size -= len(piece)
                yield piece
            if size:
                raise Busy("a file became shorter while it was read", at=os.fsdecode(path), hint="commit it again")
        finally:
            os.close(fd)


@contextmanager
def upper_at(where: Path | Upper) -> Iterator[Upper]:
    """The upper at a path of this host; one that is open already as it is."""
    if not isinstance(where, Path):
        yield where
        return
    with host.directory_fd(where) as top:
        yield Directory(top)


def is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def is_opaque(fd: int) -> bool:
    """Whether the directory behind `fd` hides what lies below it."""
    if not hasattr(os, "getxattr"):
        return False
    try:
        return os.getxattr(fd, OPAQUE if userids.rootless() is None else USER_OPAQUE) == b"y"
    except OSError:
        return False


def is_place(tree: Tree | None, path: bytes, info: os.stat_result, empty: Callable[[], bool]) -> bool:
    """Whether what is at `path` is a mount point the runtime made: not in the image, an `empty` file or directory."""
    if path not in PLACES or _lookup(tree, path) is not None:
        return False
    if stat.S_ISREG(info.st_mode):
        return info.st_size == 0
    return stat.S_ISDIR(info.st_mode) and empty()


def _is_empty(parent: int, name: bytes) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        return not os.listdir(fd)
    finally:
        os.close(fd)


def hidden_places(tree_of: Callable[[], Tree]) -> Callable[[bytes, bytes, os.stat_result, int], bool]:
    """Whether an entry is such a mount point, by its path, name, stat and an fd of its directory. The tree is asked for
    only where it matters; without an image, or when that is gone, nothing says that it had such a file."""

    def hidden(path: bytes, name: bytes, info: os.stat_result, parent: int) -> bool:
        if path not in PLACES:
            return False
        tree: Tree | None = None
        with suppress(EngineError):
            tree = tree_of()
        return is_place(tree, path, info, lambda: _is_empty(parent, name))

    return hidden


def changes(where: Path | Upper, tree: Tree | None) -> Iterator[tuple[str, bytes]]:
    """("A" | "M" | "D", absolute path), parents before children, names in byte order.

    A directory something below it changed in is M itself, as `podman diff` has it (its C). A removed tree is one D, its
    top. Without a tree (no image) everything is A. What the runtime made to mount over (/etc/hosts …) is left out, as
    from a commit. TooLarge beyond a million entries.
    """
    with upper_at(where) as upper:
        yield from _changes(upper, tree)


def _changes(upper: Upper, tree: Tree | None) -> Iterator[tuple[str, bytes]]:
    for path, here, entries in upper.walk(MAX_CHANGES):
        found: list[tuple[bytes, str]] = []
        below = _lookup(tree, path)
        if tree is not None and below is not None and path and upper.opaque(here):
            names = {name for name, _ in entries}
            found += [(name, "D") for name, _, _ in tree.readdir(below) if name not in names]
        for name, info in entries:
            whole = path + b"/" + name if path else name
            if is_place(tree, whole, info, partial(upper.empty, here, name)):
                continue
            there = below is not None and _lookup(tree, whole) is not None
            if not is_whiteout(info):
                found.append((name, "M" if there else "A"))
            elif there:
                found.append((name, "D"))
        for name, kind in sorted(found):
            yield kind, b"/" + (path + b"/" + name if path else name)


def _lookup(tree: Tree | None, path: bytes) -> int | None:
    if tree is None:
        return None
    try:
        return tree.lookup(path)
    except KeyError:
        return None


def changes_text(rows: Iterator[tuple[str, bytes]]) -> bytes:
    """The `changes` file: one `KIND PATH` per line; newlines in names written as \\n."""
    return b"".join(
        kind.encode() + b" " + path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n") + b"\n" for kind, path in rows
    )
