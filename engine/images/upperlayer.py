"""What a container changed as a layer: its overlay upper, here or in a running guest, as a tar. Floor 2.

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
from functools import partial
from pathlib import Path

from engine.changes import Directory, Upper, is_place, is_whiteout, upper_at
from engine.errors import Unsupported
from engine.images import tarout
from engine.images.tarout import Member
from engine.jobs import Task
from engine.store.entries import OPAQUE, WHITEOUT
from engine.store.tree import Tree
from engine.walk import MAX_ENTRIES

OVERLAY = (b"trusted.overlay.", b"user.overlay.")
HOST_ONLY = (b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor")
_NEEDS_LOWER = (b"trusted.overlay.redirect", b"trusted.overlay.metacopy")


def layer_tar(where: Path | Upper, tree: Tree, task: Task) -> Iterator[bytes]:
    """The layer's tar in pieces; nothing at all when nothing differs. Busy when a file changes while it is read."""
    with upper_at(where) as upper:
        inside = _members(upper, tree, task)
        first = next(inside, None)
        if first is None:
            return

        def everything() -> Iterator[tuple[Member, Iterable[bytes]]]:
            yield first
            yield from inside

        yield from tarout.archive(everything())


def _members(upper: Upper, tree: Tree, task: Task) -> Iterator[tuple[Member, Iterable[bytes]]]:
    """In the order of a walk: a directory, then what is in it."""
    links: dict[tuple[int, int], bytes] = {}
    pending: dict[bytes, list[tuple[Member, Iterable[bytes]]]] = {}
    for path, here, entries in upper.walk(MAX_ENTRIES, whole=True):
        task.check()
        yield from pending.pop(path, [])
        if path and upper.opaque(here):
            yield Member(path + b"/" + OPAQUE, mode=0o600), ()
        # a subdirectory's own entry stands before its content, which the walk brings later: directories wait
        for name, info in entries:
            below = path + b"/" + name if path else name
            if is_place(tree, below, info, partial(upper.empty, here, name)):
                continue
            if stat.S_ISDIR(info.st_mode):
                pending[below] = [member(upper, below, info, links)]
                continue
            if is_whiteout(info):
                yield Member((path + b"/" if path else b"") + WHITEOUT + name, mode=0o600), ()
            elif not stat.S_ISSOCK(info.st_mode):
                yield member(upper, below, info, links)


def entry(
    top: int, path: bytes, info: os.stat_result, links: dict[tuple[int, int], bytes]
) -> tuple[Member, Iterable[bytes]]:
    """`member`, of what is below the open directory `top`."""
    return member(Directory(top), path, info, links)


def member(
    upper: Upper, path: bytes, info: os.stat_result, links: dict[tuple[int, int], bytes]
) -> tuple[Member, Iterable[bytes]]:
    """What is at `path` as a member and its body; `links` knows the names of hard links."""
    kind = tarout.KINDS[stat.S_IFMT(info.st_mode)]
    key = (info.st_dev, info.st_ino)
    link, xattrs = b"", {}
    body: Iterable[bytes] = ()
    if kind != tarout.DIRECTORY and info.st_nlink > 1 and key in links:
        kind, link = tarout.HARDLINK, links[key]
    else:
        if kind != tarout.DIRECTORY and info.st_nlink > 1:
            links[key] = path
        xattrs = _xattrs(upper, path)
        if kind == tarout.SYMLINK:
            link = upper.readlink(path)
        elif kind == tarout.REGULAR:
            body = upper.body(path, info.st_size)
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


def _xattrs(upper: Upper, path: bytes) -> dict[bytes, bytes]:
    """What the file carries itself. Unsupported when the overlay keeps part of the file elsewhere."""
    out: dict[bytes, bytes] = {}
    for key, value in upper.xattrs(path).items():
        if key in _NEEDS_LOWER:
            raise Unsupported(
                f"the overlay of this host keeps part of it in the image ({os.fsdecode(key).rpartition('.')[2]})",
                at=os.fsdecode(path),
                hint="copy it inside the container, or turn redirect_dir and metacopy of overlay off",
            )
        if not key.startswith(OVERLAY) and key not in HOST_ONLY:
            out[key] = value
    return out
