"""Immutable trees as people see them: an image's merged root, a layer's own files. Read-only, named by digest.

Floor 5. Only here: how a tree reader (engine.trees) becomes stat, readdir, reads and provenance xattrs. Used by the
control mount (as a graft) and, for the parts they share, by the data plane. Thread-safe: trees are mmaps.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import ReadOnly
from fdfs.entry import Attr
from fdfs.readonly import STATFS, TREE, ReadHandle, check_flags, one_of

PREFIX = b"user.dutchman."


def salt(chain: str) -> int:
    """What is mixed into a tree's inode numbers, so that two trees in one mount rarely share one."""
    return int.from_bytes(hashlib.blake2b(chain.encode(), digest_size=3).digest(), "little") << 39


def attr_of(tree: Any, nid: int, mix: int) -> Attr:
    """stat(2) of one node of a tree."""
    st = tree.stat(nid)
    return Attr(
        mode=st.mode,
        size=st.size,
        ino=mix + st.ino,
        nlink=st.nlink,
        uid=st.uid,
        gid=st.gid,
        mtime_ns=st.mtime_ns,
        ctime_ns=st.mtime_ns,
        atime_ns=st.mtime_ns,
        rdev=st.rdev,
        blocks=st.blocks,
    )


def provenance(tree: Any, nid: int, extra: Mapping[str, Mapping[str, str]]) -> dict[bytes, bytes]:
    """user.dutchman.{layer,digest,created_by,media_type}: where a file came from. `extra` is by layer."""
    origin = tree.provenance(nid)
    values: dict[str, str] = {"layer": origin.layer, "digest": origin.digest}
    values.update(extra.get(origin.layer, {}))
    return {PREFIX + key.encode(): value.encode() for key, value in values.items() if value}


def xattrs(tree: Any, nid: int, extra: Mapping[str, Mapping[str, str]]) -> dict[bytes, bytes]:
    """The file's own xattrs and its provenance. (`trusted.overlay.*` of whiteout handling never shows.)

    Only files and directories have provenance: the kernel answers ENODATA for `user.*` of anything else (xattr(7)), so
    what is listed there could not be read, and `rsync -X` fails over it.
    """
    own = {key: value for key, value in tree.xattrs(nid).items() if not key.startswith(b"trusted.overlay.")}
    mode = tree.stat(nid).mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return {key: value for key, value in own.items() if not key.startswith(b"user.")}
    return own | provenance(tree, nid, extra)


def tree_file(tree: Any, nid: int) -> ReadHandle:
    """An open regular file of a tree."""
    return ReadHandle(lambda size, offset: bytes(tree.pread(nid, size, offset)))


class TreeGraft:
    """One immutable tree. `extra` gives, by layer, what provenance adds beyond layer and digest."""

    def __init__(self, tree: Any, chain: str, extra: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._tree = tree
        self._mix = salt(chain)
        self._extra = extra or {}

    def _find(self, path: bytes) -> int:
        try:
            return int(self._tree.lookup(path))
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path)) from None

    def getattr(self, path: bytes) -> Attr:
        return attr_of(self._tree, self._find(path), self._mix)

    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]:
        mix = self._mix
        for name, nid, mode in self._tree.readdir(self._find(path)):
            yield name, mix + nid, mode

    def readlink(self, path: bytes) -> bytes:
        return bytes(self._tree.readlink(self._find(path)))

    def open(self, path: bytes, flags: int) -> ReadHandle:
        check_flags(flags)
        return tree_file(self._tree, self._find(path))

    def listxattr(self, path: bytes) -> list[bytes]:
        return list(xattrs(self._tree, self._find(path), self._extra))

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        return one_of(xattrs(self._tree, self._find(path), self._extra), name)

    def statfs(self) -> Mapping[str, int]:
        return STATFS

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        raise ReadOnly(TREE)
