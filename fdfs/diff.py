"""What differs between two images, as trees: `added`, `changed`, `before`, `deleted` with real content. Read-only.

Floor 5. Only here: the four views of one comparison (engine/images/diff.py) as grafts. A view shows the entries it is
about and the directories that lead to them, with the metadata, contents and provenance of the tree they come from:
`added` and `changed` of the later image, `before` and `deleted` of the earlier one. `diff -r before changed` is what
changed. Directories are listed by comparing the two trees' own, so nothing is kept for a view. Thread-safe.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import ReadOnly
from engine.images.diff import ADDED, CHANGED, DELETED, Diff, Pair, differ, pairs
from fdfs.entry import Attr
from fdfs.readonly import STATFS, TREE, ReadHandle, check_flags, one_of
from fdfs.rootfs import attr_of, salt, tree_file, xattrs

VIEWS = {"added": ADDED, "changed": CHANGED, "before": CHANGED, "deleted": DELETED}
_DIR = stat.S_IFDIR
_LISTED = 64  # directories of one view remembered: a graft lives for a moment only

Extra = Mapping[str, Mapping[str, str]]


class DiffGraft:
    """One view of a comparison of the trees `a` and `b`; `extra` is the provenance by layer of the tree it shows."""

    def __init__(self, view: str, diff: Diff, a: Any, b: Any, extra: Extra) -> None:
        self._what = VIEWS[view]
        self._diff, self._a, self._b, self._extra = diff, a, b, extra
        self._earlier = view in ("before", "deleted")
        self._tree = a if self._earlier else b
        self._mix = salt(f"{view} {diff.chains[0]} {diff.chains[1]}")
        self._dirs: dict[bytes, tuple[int, int]] = {}

    # --- finding ----------------------------------------------------------------------------------------------------

    def _shows(self, pair: Pair) -> tuple[int, bool] | None:
        """(nid in the shown tree, whether it is a directory both have) of a pair, None when it is not in the view."""
        what = self._what
        if pair.directories:
            if not self._diff.masks.get(pair.b, 0) & what:
                return None
            return (pair.a if self._earlier else pair.b), True
        if what == CHANGED:
            if pair.a < 0 or pair.b < 0 or pair.replaced or not differ(self._a, pair.a, self._b, pair.b):
                return None
            return (pair.a if self._earlier else pair.b), False
        here, there = (pair.b, pair.a) if what == ADDED else (pair.a, pair.b)
        if here < 0 or (there >= 0 and not pair.replaced):
            return None
        return here, False

    def _find(self, path: bytes) -> tuple[int, tuple[int, int] | None]:
        """(nid in the shown tree, the nids in both when it is a directory of both). FileNotFoundError."""
        if path:
            self._diff.wait()
        known = self._dirs.get(path)
        if known is not None:
            return known[0] if self._earlier else known[1], known
        a, b = self._a, self._b
        both = (a.root, b.root)
        parts = [part for part in path.split(b"/") if part]
        start = 0
        if len(parts) > 1 and (parent := self._dirs.get(b"/".join(parts[:-1]))) is not None:
            both, start = parent, len(parts) - 1
        for position in range(start, len(parts)):
            name = parts[position]
            in_a, kind_a = _child(a, both[0], name)
            in_b, kind_b = _child(b, both[1], name)
            pair = Pair(name, in_a, in_b, kind_a, kind_b)
            found = self._shows(pair)
            if found is None:
                raise _missing(path)
            nid, skeleton = found
            if not skeleton:
                for below in parts[position + 1 :]:
                    try:
                        nid = self._tree.child(nid, below)
                    except KeyError:
                        raise _missing(path) from None
                return nid, None
            both = (pair.a, pair.b)
        if len(self._dirs) >= _LISTED:
            self._dirs.clear()
        self._dirs[path] = both
        return both[0] if self._earlier else both[1], both

    # --- a graft ----------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes) -> Attr:
        nid, both = self._find(path)
        attr = attr_of(self._tree, nid, self._mix)
        return attr if both is None else attr._replace(nlink=1)  # not the number of what is shown below it

    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]:
        nid, both = self._find(path)
        mix = self._mix
        self._diff.wait()
        if both is None:
            for name, child, kind in self._tree.readdir(nid):
                yield name, mix + child, kind
            return
        for pair in pairs(self._a, both[0], self._b, both[1]):
            shown = self._shows(pair)
            if shown is not None:
                yield pair.name, mix + shown[0], pair.kind_a if self._earlier else pair.kind_b

    def readlink(self, path: bytes) -> bytes:
        return bytes(self._tree.readlink(self._find(path)[0]))

    def open(self, path: bytes, flags: int) -> ReadHandle:
        check_flags(flags)
        return tree_file(self._tree, self._find(path)[0])

    def listxattr(self, path: bytes) -> list[bytes]:
        return list(xattrs(self._tree, self._find(path)[0], self._extra))

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        return one_of(xattrs(self._tree, self._find(path)[0], self._extra), name)

    def statfs(self) -> Mapping[str, int]:
        return STATFS

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        raise ReadOnly(TREE)


def _child(tree: Any, nid: int, name: bytes) -> tuple[int, int]:
    """(nid, file type bits), (-1, 0) when there is none."""
    try:
        child = int(tree.child(nid, name))
    except KeyError:
        return -1, 0
    return child, stat.S_IFMT(tree.identity(child)[0])


def _missing(path: bytes) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
