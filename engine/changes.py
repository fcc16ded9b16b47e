"""What a container changed: its overlay upper against its image's tree. Floor 2.

Only here: how an overlay upper reads (kernel Documentation/filesystems/overlayfs.rst): a 0:0 character device is a
whiteout, `trusted.overlay.opaque` = y on a directory hides what lies below it (`user.overlay.opaque` where the overlay
was mounted in a user namespace). Bounded, streaming, thread-safe.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from engine import userids
from engine.errors import EngineError
from engine.store.trees import Tree
from engine.walk import walk

OPAQUE, USER_OPAQUE = b"trusted.overlay.opaque", b"user.overlay.opaque"
MAX_CHANGES = 1_000_000
# made by the runtime to mount something over
PLACES = frozenset({b"dev", b"proc", b"sys", b"etc/hosts", b"etc/hostname", b"etc/resolv.conf", b".dockerenv"})


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


def is_place(tree: Tree | None, path: bytes, name: bytes, info: os.stat_result, parent: int) -> bool:
    """Whether the entry `name` of the directory `parent` is a mount point the runtime made: empty, not in the image."""
    if path not in PLACES or _lookup(tree, path) is not None:
        return False
    if stat.S_ISREG(info.st_mode):
        return info.st_size == 0
    if not stat.S_ISDIR(info.st_mode):
        return False
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
        return is_place(tree, path, name, info, parent)

    return hidden


def changes(upper: Path, tree: Tree | None) -> Iterator[tuple[str, bytes]]:
    """("A" | "M" | "D", absolute path), parents before children, names in byte order.

    A directory something below it changed in is M itself, as `podman diff` has it (its C). A removed tree is one D, its
    top. Without a tree (no image) everything is A. What the runtime made to mount over (/etc/hosts …) is left out, as
    from a commit. TooLarge beyond a million entries.
    """
    for path, fd, entries in walk(upper, MAX_CHANGES):
        found: list[tuple[bytes, str]] = []
        below = _lookup(tree, path)
        if tree is not None and below is not None and path and is_opaque(fd):
            here = {name for name, _ in entries}
            found += [(name, "D") for name, _, _ in tree.readdir(below) if name not in here]
        for name, info in entries:
            whole = path + b"/" + name if path else name
            if is_place(tree, whole, name, info, fd):
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
