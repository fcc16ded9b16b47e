"""Layers on top of each other: a tree of nodes in memory, made as containerd applies a layer to a directory.

Only here: layer semantics. Parents are resolved through symlinks inside the root, missing ones are made 0755
root:root; a directory over a directory takes the new metadata, anything else replaces what was there; whiteouts and
opaque markers remove only what lower layers brought, in whatever order they come; a hardlink is one inode under
several names, its entry's metadata applies to that inode. What containerd refuses is `Damaged`. One thread.

Source: image-spec layer.md, "Applying Changesets"; containerd pkg/archive applyNaive; continuity fs.RootPath.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from engine.errors import Damaged, TooLarge
from engine.store.index import Entry, Kind

MAX_LINKS = 255  # symlinks followed for one path (continuity)
MAX_STEPS = 100_000_000  # names looked at in one merge: a hostile layer must not make the merge quadratic
MAX_MEMORY = 352 << 20  # bytes a merged tree may take, as `_cost` counts them: about a million entries
_NODE, _KIDS, _BODY, _XATTR = 330, 240, 130, 400  # bytes of an entry, and more for a directory, a body, xattrs
MAX_TIME = (1 << 63) - 1  # nanoseconds; Docker stores later and negative times as 0 (boundTime)
_FOREIGN_XATTRS = (b"trusted.overlay.", b"user.overlay.")  # would steer the overlay a container runs on

_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}


class Node:
    """One inode. `kids` is None except for directories; `parent` is meaningful for directories only."""

    __slots__ = (
        "data",
        "gid",
        "kids",
        "layer",
        "link",
        "mode",
        "mtime_ns",
        "nid",
        "nlink",
        "offset",
        "parent",
        "rdev",
        "sha256",
        "size",
        "touched",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, layer: int, parent: Node | None) -> None:
        self.mode = mode
        self.layer = layer  # number of the layer that brought it
        self.touched = layer  # number of the last layer that put it, or something below it, there
        self.parent = parent
        self.kids: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self.uid = self.gid = self.mtime_ns = self.size = self.rdev = 0
        self.link = b""
        self.sha256 = b""
        self.data = ""
        self.offset = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.nlink = 0  # this and the next belong to the EROFS writer
        self.nid = 0


class Merger:
    """Apply layers lowest first with `apply`; `root` is the merged tree."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.root = Node(stat.S_IFDIR | 0o755, 0, None)
        self._number = 0
        self._steps = 0
        self._room = MAX_MEMORY
        self._numbers: dict[int, int] = {}  # modes and times repeat: one object for each value
        self._dirs: dict[bytes, Node] = {}  # resolved parents; emptied when a directory or symlink goes away
        self._linked: set[tuple[int, bytes]] = set()  # names this layer gave to inodes of lower layers

    def apply(self, diff_id: str, entries: Iterable[Entry]) -> None:
        """One layer, in tar order. Damaged or TooLarge when it cannot be applied; the tree is then of no use."""
        self._number = len(self.layers)
        self.layers.append(diff_id)
        self._dirs = {b"": self.root}
        self._linked = set()
        self.root.touched = self._number
        for entry in entries:
            kind = entry.kind
            if kind is Kind.OPAQUE:
                directory = self._directory(entry.path)
                self._touch(directory)
                self._spend(len(directory.kids or ()))
                for name in list(directory.kids or ()):
                    self._hide(directory, name)
                continue
            path = entry.path
            cut = path.rfind(b"/")
            above, name = (path[:cut], path[cut + 1 :]) if cut >= 0 else (b"", path)
            parent = self._dirs.get(above) or self._directory(above)
            if kind is Kind.WHITEOUT:
                self._hide(parent, name)
            elif not name:
                self._metadata(self.root, entry)
            elif kind is Kind.HARDLINK:
                self._hardlink(parent, name, entry)
            else:
                self._put(parent, name, entry)

    # --- one entry -----------------------------------------------------------------------------------------------

    def _put(self, parent: Node, name: bytes, entry: Entry) -> None:
        kids = parent.kids
        assert kids is not None
        kind = entry.kind
        old = kids.get(name)
        if old is not None:
            if kind is Kind.DIRECTORY and old.kids is not None:
                self._metadata(old, entry)
                self._touch(old)
                return
            self._forget(old)
        node = kids[name] = Node(_TYPES[kind], self._number, parent)
        self._metadata(node, entry)
        self._take(_NODE + len(name) + (_KIDS if node.kids is not None else 0))
        if kind is Kind.FILE:
            node.size, node.sha256, node.data, node.offset = entry.size, entry.sha256, entry.data, entry.offset
            if node.size:
                self._take(_BODY)
        elif kind is Kind.SYMLINK:
            node.link = entry.linkname
            node.size = len(node.link)
            self._take(len(node.link))
        else:
            node.rdev = entry.rdev
        if parent.touched != self._number:
            self._touch(parent)

    def _metadata(self, node: Node, entry: Entry) -> None:
        numbers = self._numbers
        if len(numbers) > 4096:
            numbers.clear()
        mode = stat.S_IFMT(node.mode) | entry.mode
        node.mode = numbers.setdefault(mode, mode)
        node.uid, node.gid = entry.uid, entry.gid
        mtime_ns = entry.mtime_ns if 0 <= entry.mtime_ns <= MAX_TIME else 0
        node.mtime_ns = numbers.setdefault(mtime_ns, mtime_ns)
        node.xattrs = None
        node.layer = self._number
        if entry.xattrs:
            self._add_xattrs(node, entry.xattrs)

    def _add_xattrs(self, node: Node, xattrs: dict[bytes, bytes]) -> None:
        """user.* exists on files and directories only (xattr(7)); elsewhere it is dropped, as Docker drops it."""
        plain = stat.S_ISREG(node.mode) or stat.S_ISDIR(node.mode)
        kept = {
            key: value
            for key, value in xattrs.items()
            if not key.startswith(_FOREIGN_XATTRS) and (plain or not key.startswith(b"user."))
        }
        if kept:
            self._take(_XATTR + sum(len(key) + len(value) for key, value in kept.items()))
            node.xattrs = {**(node.xattrs or {}), **kept}

    def _hardlink(self, parent: Node, name: bytes, entry: Entry) -> None:
        assert parent.kids is not None
        old = parent.kids.pop(name, None)
        if old is not None:
            self._forget(old)
        cut = entry.linkname.rfind(b"/")
        above, base = (entry.linkname[:cut], entry.linkname[cut + 1 :]) if cut >= 0 else (b"", entry.linkname)
        target = self._lookup(above, base)
        if target is None or target.kids is not None:
            what = "is missing" if target is None else "is a directory"
            raise Damaged(f"hardlink {show(entry.path)}: its target {show(entry.linkname)} {what}", at=show(entry.path))
        parent.kids[name] = target
        self._take(len(name) + 100)
        if not stat.S_ISLNK(target.mode):
            target.mode = stat.S_IFMT(target.mode) | entry.mode
        target.uid, target.gid = entry.uid, entry.gid
        target.mtime_ns = entry.mtime_ns if 0 <= entry.mtime_ns <= MAX_TIME else 0
        if entry.xattrs:
            self._add_xattrs(target, entry.xattrs)
        if target.touched != self._number:
            self._linked.add((id(parent), name))
        self._touch(parent)

    # --- removing ------------------------------------------------------------------------------------------------

    def _hide(self, parent: Node, name: bytes) -> None:
        """Remove `name` as far as lower layers brought it; what this layer put there stays."""
        stack = [(parent, name)]
        while stack:
            directory, name = stack.pop()
            kids = directory.kids
            node = kids.get(name) if kids is not None else None
            if node is None or kids is None:
                continue
            if node.touched == self._number or (id(directory), name) in self._linked:
                if node.kids:
                    self._spend(len(node.kids))
                    stack.extend((node, child) for child in list(node.kids))
            else:
                del kids[name]
                self._forget(node)

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TooLarge("the layers take too long to merge: too many names to resolve or to hide")

    def _take(self, count: int) -> None:
        """Memory for what is added. What was replaced or hidden meanwhile is only counted off when there is no more."""
        self._room -= count
        if self._room < 0:
            used = 0
            stack = [self.root]
            while stack:
                for name, kid in (stack.pop().kids or {}).items():
                    used += len(name) + _cost(kid)
                    if kid.kids is not None:
                        stack.append(kid)
            self._room = MAX_MEMORY - used
            if self._room < MAX_MEMORY >> 3:
                raise TooLarge(f"the merged tree of the layers takes more than {MAX_MEMORY >> 20} MiB of memory")

    def _forget(self, node: Node) -> None:
        if node.kids is not None or stat.S_ISLNK(node.mode):
            self._dirs = {b"": self.root}

    def _touch(self, node: Node) -> None:
        step: Node | None = node
        while step is not None and step.touched != self._number:
            step.touched = self._number
            step = step.parent

    # --- resolving -----------------------------------------------------------------------------------------------

    def _directory(self, path: bytes) -> Node:
        """The directory `path` names inside the root, symlinks followed, made where it is missing."""
        known = self._dirs.get(path)
        if known is None:
            known = self._walk(path, create=True)
            assert known is not None
            self._dirs[path] = known
        return known

    def _lookup(self, above: bytes, base: bytes) -> Node | None:
        """The node at above/base; symlinks in `above` are followed, `base` itself is not. b"" is the root."""
        directory = self._dirs.get(above) or self._walk(above, create=False)
        if not base or directory is None or directory.kids is None:
            return directory
        return directory.kids.get(base)

    def _walk(self, path: bytes, *, create: bool) -> Node | None:
        parts = path.split(b"/") if path else []
        self._spend(len(parts))
        links = at = 0
        node = self.root
        while at < len(parts):
            assert node.kids is not None
            name = parts[at]
            below = node.kids.get(name)
            if below is None:
                if not create:
                    return None
                below = node.kids[name] = Node(stat.S_IFDIR | 0o755, self._number, node)
                self._take(_NODE + _KIDS + len(name))
                self._touch(node)
            elif stat.S_ISLNK(below.mode):
                links += 1
                if links > MAX_LINKS:
                    raise Damaged(f"too many symlinks in {show(path)}", at=show(path))
                # lexical, as continuity joins a link's target to the directory it stands in; `..` ends at the root
                resolved = [] if below.link[:1] == b"/" else parts[:at]
                for part in below.link.split(b"/"):
                    if part == b"..":
                        del resolved[-1:]
                    elif part and part != b".":
                        resolved.append(part)
                parts = resolved + parts[at + 1 :]
                if len(parts) > 4096:
                    raise TooLarge(f"{show(path)} resolves to more than 4096 names", at=show(path))
                self._spend(len(parts))
                node, at = self.root, 0
                continue
            elif below.kids is None:
                raise Damaged(f"{show(path)}: {show(name)} is not a directory", at=show(path))
            node = below
            at += 1
        return node


def _cost(node: Node) -> int:
    """About how many bytes of memory an entry takes, without its name."""
    cost = _NODE + len(node.link) + (_KIDS if node.kids is not None else 0) + (_BODY if node.sha256 else 0)
    if node.xattrs:
        cost += _XATTR + sum(len(key) + len(value) for key, value in node.xattrs.items())
    return cost


def show(path: bytes) -> str:
    """A path for people: undecodable bytes escaped, bounded."""
    return path[:200].decode("utf-8", "backslashreplace")
