"""What a container changed as a layer: its overlay upper as a tar. Floor 2.

Only here: from the overlay's words to the image's. A 0:0 character device becomes `.wh.<name>`, an opaque directory
gets `.wh..wh..opq`, hard links within the upper stay links, xattrs but the overlay's and the host's own are kept.
Entries come parents first, names in byte order, so the same changes always give the same bytes. Mount points the
runtime made are not changes: Docker keeps them out too. Sockets are left out, as Docker does.

Sources: image-spec layer.md; kernel Documentation/filesystems/overlayfs.rst; moby pkg/archive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine import host
from engine.changes import is_opaque, is_place, is_whiteout
from engine.errors import Busy, Unsupported
from engine.images import tarout
from engine.images.tarout import Member
from engine.jobs import Task
from engine.store.entries import OPAQUE, WHITEOUT
from engine.store.tree import Tree
from engine.walk import RESOLVE, walk

PIECE = 1 << 20
_OVERLAY = ("trusted.overlay.", "user.overlay.")
_HOST_ONLY = ("security.selinux", "security.ima", "security.evm", "security.apparmor")
_NEEDS_LOWER = ("trusted.overlay.redirect", "trusted.overlay.metacopy")


def layer_tar(upper: Path, tree: Tree, task: Task) -> Iterator[bytes]:
    """The layer's tar in pieces; nothing at all when nothing differs. Busy when a file changes while it is read."""
    inside = _members(upper, tree, task)
    first = next(inside, None)
    if first is None:
        return

    def everything() -> Iterator[tuple[Member, Iterable[bytes]]]:
        yield first
        yield from inside

    yield from tarout.archive(everything())


def _members(upper: Path, tree: Tree, task: Task) -> Iterator[tuple[Member, Iterable[bytes]]]:
    """In the order of a walk: a directory, then what is in it."""
    links: dict[tuple[int, int], bytes] = {}
    pending: dict[bytes, list[tuple[Member, Iterable[bytes]]]] = {}
    with host.directory_fd(upper) as top:
        for path, fd, entries in walk(upper, whole=True):
            task.check()
            yield from pending.pop(path, [])
            if path and is_opaque(fd):
                yield Member(path + b"/" + OPAQUE, mode=0o600), ()
            # a subdirectory's own entry stands before its content, which the walk brings later: directories wait
            for name, info in entries:
                below = path + b"/" + name if path else name
                if is_place(tree, below, name, info, fd):
                    continue
                if stat.S_ISDIR(info.st_mode):
                    pending[below] = [entry(top, below, info, links)]
                    continue
                if is_whiteout(info):
                    yield Member((path + b"/" if path else b"") + WHITEOUT + name, mode=0o600), ()
                elif not stat.S_ISSOCK(info.st_mode):
                    yield entry(top, below, info, links)


def _open(top: int, path: bytes, flags: int) -> int:
    return host.open_in_root(top, path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, resolve=RESOLVE)


def entry(
    top: int, path: bytes, info: os.stat_result, links: dict[tuple[int, int], bytes]
) -> tuple[Member, Iterable[bytes]]:
    """What is at `path` below the directory `top` as a member and its body; `links` knows the names of hard links."""
    kind = tarout.KINDS[stat.S_IFMT(info.st_mode)]
    key = (info.st_dev, info.st_ino)
    link, xattrs = b"", {}
    body: Iterable[bytes] = ()
    if kind != tarout.DIRECTORY and info.st_nlink > 1 and key in links:
        kind, link = tarout.HARDLINK, links[key]
    else:
        if kind != tarout.DIRECTORY and info.st_nlink > 1:
            links[key] = path
        xattrs = _xattrs(top, path)
        if kind == tarout.SYMLINK:
            link = _readlink(top, path)
        elif kind == tarout.REGULAR:
            body = _body(top, path, info)
    return Member(
        path,
        kind,
        stat.S_IMODE(info.st_mode),
        info.st_uid,
        info.st_gid,
        info.st_size if kind == tarout.REGULAR else 0,
        info.st_mtime_ns,
        link,
        (os.major(info.st_rdev), os.minor(info.st_rdev)) if kind in (tarout.CHAR, tarout.BLOCKDEV) else (0, 0),
        xattrs,
    ), body


def _in_parent(top: int, path: bytes) -> tuple[int, bytes]:
    """(an open directory, a name in it)."""
    parent, _, name = path.rpartition(b"/")
    return _open(top, parent, os.O_RDONLY | os.O_DIRECTORY), name


def _readlink(top: int, path: bytes) -> bytes:
    fd, name = _in_parent(top, path)
    try:
        return os.readlink(name, dir_fd=fd)
    finally:
        os.close(fd)


def _xattrs(top: int, path: bytes) -> dict[bytes, bytes]:
    """What the file carries itself. Unsupported when the overlay keeps part of the file elsewhere."""
    if not hasattr(os, "listxattr"):
        return {}
    fd, name = _in_parent(top, path)
    out: dict[bytes, bytes] = {}
    try:
        where = os.path.join(b"/proc/self/fd/%d" % fd, name)  # of symlinks and devices too, which must not be opened
        for key in sorted(os.listxattr(where, follow_symlinks=False)):
            if key in _NEEDS_LOWER:
                raise Unsupported(
                    f"the overlay of this host keeps part of it in the image ({key.rpartition('.')[2]})",
                    at=os.fsdecode(path),
                    hint="copy it inside the container, or turn redirect_dir and metacopy of overlay off",
                )
            if not key.startswith(_OVERLAY) and key not in _HOST_ONLY:
                out[os.fsencode(key)] = os.getxattr(where, key, follow_symlinks=False)
    finally:
        os.close(fd)
    return out


def _body(top: int, path: bytes, info: os.stat_result) -> Iterator[bytes]:
    fd = _open(top, path, os.O_RDONLY)
    try:
        left = info.st_size
        while left and (piece := os.read(fd, min(PIECE, left))):
            left -= len(piece)
            yield piece
        if left:
            raise Busy("a file became shorter while it was read", at=os.fsdecode(path), hint="commit it again")
    finally:
        os.close(fd)
