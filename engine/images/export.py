"""An image's merged tree as a tar: what a container made from it would start with. Floor 2.

Only here: walking a tree into an archive. Modes, owners, times, devices, xattrs and hard links are those of the image;
entries come in byte order, parents first, so the same image always gives the same file. Streaming: memory holds only
the names of hard-linked files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.images import tarout
from engine.images.catalog import Images
from engine.images.save import new_file
from engine.images.tarout import Member
from engine.jobs import Task
from engine.store.tree import Tree

PIECE = 1 << 20


def export(images: Images, digest: str, path: Path | str, task: Task | None = None) -> str:
    """Write the root filesystem of an image to the new file `path`. AlreadyExists, NotFound, NoSpace, Damaged."""
    task, path = task or Task(), Path(path)
    image = images.get(digest)
    with images.lease(), new_file(path) as write:
        done = 0
        for piece in tarout.archive(members(images.trees.open(image.chain_id))):
            task.check()
            write(piece)
            done += len(piece)
            task.advance(digest[:19], done, max(done, image.size), "writing")
    return f"exported {digest} to {path}, {done} bytes"


def members(tree: Tree) -> Iterator[tuple[Member, Iterable[bytes]]]:
    """Every entry of a tree with its body, parents before children, names in byte order."""
    first: dict[int, bytes] = {}  # of hard-linked files: the name that has the body
    stack = [(b"", tree.root)]
    while stack:
        path, nid = stack.pop()
        info = tree.stat(nid)
        kind = tarout.KINDS[stat.S_IFMT(info.mode)]
        name = path or b"./"
        if kind != tarout.DIRECTORY and info.nlink > 1:
            if nid in first:
                yield _member(tree, nid, name, tarout.HARDLINK, first[nid]), ()
                continue
            first[nid] = name
        link = tree.readlink(nid) if kind == tarout.SYMLINK else b""
        yield _member(tree, nid, name, kind, link), _body(tree, nid, info.size) if kind == tarout.REGULAR else ()
        if kind == tarout.DIRECTORY:
            below = [(path + b"/" + child if path else child, number) for child, number, _ in tree.readdir(nid)]
            stack.extend(sorted(below, reverse=True))


def _member(tree: Tree, nid: int, name: bytes, kind: bytes, link: bytes) -> Member:
    info = tree.stat(nid)
    return Member(
        name,
        kind,
        stat.S_IMODE(info.mode),
        info.uid,
        info.gid,
        info.size if kind == tarout.REGULAR else 0,
        info.mtime_ns,
        link,
        (os.major(info.rdev), os.minor(info.rdev)),
        {} if kind == tarout.HARDLINK else tree.xattrs(nid),
    )


def _body(tree: Tree, nid: int, size: int) -> Iterator[bytes]:
    for offset in range(0, size, PIECE):
        yield tree.pread(nid, PIECE, offset)
