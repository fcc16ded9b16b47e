"""From tar members to layer entries: clean paths, whiteouts, bounds of names. Pure functions.

Only here: what a name in a layer means. Paths are cleaned lexically (Go's filepath.Clean below a root), so nothing
can start outside; symlinks are resolved later, when layers are merged (merge.py).

Source: image-spec layer.md (whiteouts, opaque whiteout); containerd pkg/archive (validateWhiteout); aufs metadata
(`.wh..wh.*`) is dropped as Docker drops it.
"""

from __future__ import annotations

from engine.errors import Damaged, TooLarge
from engine.store import tar
from engine.store.index import Entry, Kind

WHITEOUT = b".wh."
META = b".wh..wh."
OPAQUE = b".wh..wh..opq"
MAX_NAME = 255
MAX_SYMLINK = 4095

_KINDS = {
    tar.REGULAR: Kind.FILE,
    tar.DIRECTORY: Kind.DIRECTORY,
    tar.SYMLINK: Kind.SYMLINK,
    tar.CHAR: Kind.CHAR,
    tar.BLOCKDEV: Kind.BLOCK,
    tar.FIFO: Kind.FIFO,
    tar.HARDLINK: Kind.HARDLINK,
}


def clean(path: bytes) -> bytes:
    """`path` below a root: no empty, `.` or `..` parts; `..` at the root stays there. b"" is the root."""
    if path[-1:] == b"/":
        path = path.rstrip(b"/")
    if path[:1] not in (b"/", b".") and b"/." not in path and b"//" not in path:
        return path
    out: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if out:
                out.pop()
        elif part and part != b".":
            out.append(part)
    return b"/".join(out)


def entry_of(member: tar.Member) -> Entry | None:
    """The entry a member stands for, without its body; None when it stands for nothing.

    Damaged for a whiteout of `.`, `..` or nothing and for an empty link; TooLarge for a name above 255 bytes.
    """
    path = clean(member.name)
    kind = _KINDS[member.type]
    where = f"byte {member.offset}"
    base = path[path.rfind(b"/") + 1 :]
    if not path:
        # the root itself: only a directory says something about it; `..` and the like resolve to it and are dropped
        if kind is not Kind.DIRECTORY or b".." in member.name.split(b"/"):
            return None
    elif len(path) > MAX_NAME and max(map(len, path.split(b"/"))) > MAX_NAME:
        raise TooLarge(f"a file name of more than {MAX_NAME} bytes in the entry at {where}", at=where)
    if path[:8] == META:  # aufs bookkeeping at the top, and what is below it
        if path == OPAQUE:
            return Entry(b"", Kind.OPAQUE)
        return None
    if base[:4] == WHITEOUT:
        parent = path[: len(path) - len(base)]
        if base == OPAQUE:
            return Entry(parent[:-1], Kind.OPAQUE)
        if base[:8] == META:
            return None
        name = base[4:]
        if name in (b"", b".", b".."):
            raise Damaged(f"invalid whiteout name {base!r} in the entry at {where}", at=where)
        return Entry(parent + name, Kind.WHITEOUT)
    link = b""
    rdev = 0
    if kind is Kind.HARDLINK:
        link = clean(member.linkname)
    elif kind is Kind.SYMLINK:
        link = member.linkname
        if not link:
            raise Damaged(f"a symlink without a target at {where}", at=where)
        if len(link) > MAX_SYMLINK:
            raise TooLarge(f"a symlink target of more than {MAX_SYMLINK} bytes at {where}", at=where)
    elif kind is Kind.CHAR or kind is Kind.BLOCK:
        rdev = encode_rdev(member.devmajor, member.devminor)
    return Entry(
        path,
        kind,
        member.mode,
        member.uid,
        member.gid,
        member.mtime_ns,
        member.size if kind is Kind.FILE else 0,
        rdev,
        link,
        xattrs=member.xattrs,
    )


def encode_rdev(major: int, minor: int) -> int:
    """Linux new_encode_dev: 12 bits of major, 20 of minor in 32 bits."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_rdev(rdev: int) -> tuple[int, int]:
    """(major, minor) of `encode_rdev`."""
    return (rdev & 0xFFF00) >> 8, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)
