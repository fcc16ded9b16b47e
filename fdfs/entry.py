"""The declared namespace: File, Dir and Link rows, and the one walk over them.

Floor 5. Only here: what a row is, how a path becomes a row with its keys, and what follows from a row: mode bits, stat,
readdir, documentation. Handlers named by rows take `(engine, *keys)`, return text or bytes or raise an EngineError;
they know no paths, offsets or errnos. A key is the name of one dynamic child on the way down, so
`/containers/web/state` is the row STATE with keys ("web",). A new virtual file is one function and one row.

Foreign trees (an image's files, a volume's data) hang below a Dir with `graft`; the walk stops there and hands back
what is left of the path as bytes. Everything here is stateless and thread-safe.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from engine import userids
from engine.errors import AccessDenied, NotFound

if TYPE_CHECKING:
    from fdfs.ctl import Verb

Handler = Callable[..., Any]

BLOCK = 512  # bytes of one st_blocks unit
STARTED_NS = time.time_ns()  # mtime of rows that have no better one: stable, so editors see no change


class Attr(NamedTuple):
    """What stat(2) says. Times in nanoseconds since the epoch, `blocks` in 512-byte units."""

    mode: int
    size: int = 0
    ino: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    atime_ns: int = 0
    rdev: int = 0
    blocks: int = 0
    blksize: int = 4096


class Handle(Protocol):
    """One open file. Offsets and sizes in bytes."""

    direct: bool  # the kernel keeps no pages of it: generated and growing files
    keep: bool  # the kernel may keep its pages across opens: immutable files

    def read(self, size: int, offset: int) -> bytes: ...
    def write(self, data: bytes, offset: int) -> int: ...
    def truncate(self, size: int) -> None: ...
    def flush(self) -> None: ...
    def fsync(self) -> None: ...
    def attr(self) -> Attr | None: ...  # None: ask by path
    def close(self) -> None: ...


class Graft(Protocol):
    """A tree that is not declared. Paths are bytes relative to its root, b"" being the root; never followed out of it.

    Raises OSError or EngineError. `change` is every operation that modifies the tree, by its FUSE name; a read-only
    tree answers EROFS.
    """

    def getattr(self, path: bytes) -> Attr: ...
    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]: ...  # name, inode number, mode
    def readlink(self, path: bytes) -> bytes: ...
    def open(self, path: bytes, flags: int) -> Handle: ...
    def listxattr(self, path: bytes) -> list[bytes]: ...
    def getxattr(self, path: bytes, name: bytes) -> bytes: ...  # OSError ENODATA
    def statfs(self) -> Mapping[str, int]: ...
    def change(self, operation: str, path: bytes, *arguments: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class BindSource:
    """What the kernel can show in place of a graft: an immutable tree by chain id, or a host directory."""

    chain: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One virtual file. Exactly one way to read it and at most one way to write it."""

    name: str
    doc: str
    show: Handler | None = None  # (engine, *keys) -> str | bytes: rendered once per open
    read: Handler | None = None  # (engine, *keys, offset, size) -> bytes: grows, never shrinks; needs `size`
    size: Handler | None = None  # (engine, *keys) -> int: with `read`; with `show` where rendering is dear
    first: Handler | None = None  # (engine, *keys) -> int: with `read`; offset of the oldest byte that is still kept
    wait: Handler | None = None  # (engine, *keys) -> str: rendered when read, may take up to a second
    mtime: Handler | None = None  # (engine, *keys) -> Unix time in nanoseconds
    verbs: Mapping[str, Verb] | None = None  # control file: a written line runs inside write(2)
    valid: Handler | None = None  # (engine, *keys) -> names of the verbs that are valid now; None: all
    commit: Handler | None = None  # (engine, *keys, bytes): a whole document, applied at flush
    set: Handler | None = None  # (engine, *keys, str): one value, applied inside write(2)
    feed: Handler | None = None  # (engine, *keys, bytes) -> how many were taken: a stream, inside write(2)
    opens: Handler | None = None  # (engine, *keys) -> Handle: what is written to it says what is read
    object: Handler | None = None  # (engine, *keys) -> the object whose `error` records failed writes

    @property
    def writable(self) -> bool:
        return bool(self.verbs is not None or self.commit or self.set or self.feed or self.opens)

    @property
    def readable(self) -> bool:
        return bool(self.show or self.read or self.wait or self.opens or self.verbs is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A symlink: "refers to"."""

    name: str
    doc: str
    target: Handler  # (engine, *keys) -> str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dir:
    """A directory of fixed `rows`, of dynamic children (`names` lists, `find` gives the row of one), or a graft."""

    name: str
    doc: str
    rows: tuple[Row, ...] = ()
    names: Handler | None = None  # (engine, *keys) -> iterable of names
    find: Handler | None = None  # (engine, *keys, name) -> Row | None
    kinds: tuple[Row, ...] = ()  # every row `find` can give: for the documentation and the tests
    mkdir: Handler | None = None  # (engine, *keys, name)
    rmdir: Handler | None = None  # (engine, *keys): removes this very directory's object
    rename: Handler | None = None  # (engine, *keys, name): gives this very directory's object another name
    pin: Handler | None = None  # (engine, *keys) -> keys that an open file below it keeps: they survive a rename
    object: Handler | None = None  # (engine, *keys) -> the object whose `error` records a failed mkdir or rmdir
    graft: Handler | None = None  # (engine, *keys) -> Graft
    bind: Handler | None = None  # (engine, *keys) -> BindSource: what may be bound over the graft to make it faster
    scratch: bool = False  # holds a document: editors' swap, backup and temporary files live here, in memory
    index: dict[str, Row] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {row.name: row for row in self.rows})


Row = File | Link | Dir
Keys = tuple[str, ...]


class Found(NamedTuple):
    """Where a path leads: the row, the keys collected on the way, and inside a graft what is left of the path."""

    row: Row
    keys: Keys
    rest: bytes | None = None  # None: the row itself; b"" is the root of its graft
    pin: tuple[Handler, int] | None = None  # the `pin` met last on the way, and how many keys it takes


def split(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part]


def child(engine: Any, row: Dir, keys: Keys, name: str) -> tuple[Row, Keys]:
    """The row called `name` in a directory. NotFound when there is none; fixed rows win over dynamic ones."""
    fixed = row.index.get(name)
    if fixed is not None:
        return fixed, keys
    if row.find is not None:
        dynamic = row.find(engine, *keys, name)
        if dynamic is not None:
            return dynamic, (*keys, name)
    raise NotFound(f"there is no {name!r} here", at=name)


def walk(engine: Any, root: Dir, path: bytes) -> Found:
    """The row at `path`. NotFound; symlinks are not followed (the kernel does that)."""
    row: Row = root
    keys: Keys = ()
    pin: tuple[Handler, int] | None = None
    parts = split(path)
    for position, part in enumerate(parts):
        if not isinstance(row, Dir):
            raise NotFound("not a directory", at=os.fsdecode(part))
        if row.graft is not None:
            return Found(row, keys, b"/".join(parts[position:]))
        try:
            name = part.decode()
        except UnicodeDecodeError:
            raise NotFound("names here are UTF-8", at=ascii(part)) from None
        row, keys = child(engine, row, keys, name)
        if isinstance(row, Dir) and row.pin is not None:
            pin = row.pin, len(keys)
    if isinstance(row, Dir) and row.graft is not None:
        return Found(row, keys, b"")
    return Found(row, keys, None, pin)


def pinned(engine: Any, found: Found) -> Keys:
    """The keys for an open file: those of a `pin` in place of names that may change."""
    if found.pin is None:
        return found.keys
    handler, count = found.pin
    return (*handler(engine, *found.keys[:count]), *found.keys[count:])


def listing(engine: Any, row: Dir, keys: Keys) -> list[tuple[str, Row]]:
    """(name, row) of everything in a declared directory: fixed rows first, then the dynamic children, sorted."""
    out: list[tuple[str, Row]] = [(fixed.name, fixed) for fixed in row.rows]
    if row.names is not None and row.find is not None:
        for name in sorted(row.names(engine, *keys)):
            if name in row.index:
                continue
            try:
                dynamic = row.find(engine, *keys, name)
            except NotFound:  # removed between the two calls
                continue
            if dynamic is not None:
                out.append((name, dynamic))
    return out


def mode_of(row: Row) -> int:
    """Type and permission bits that follow from a row."""
    if isinstance(row, Dir):
        return stat.S_IFDIR | (0o755 if row.mkdir or row.scratch else 0o555)
    if isinstance(row, Link):
        return stat.S_IFLNK | 0o777
    bits = (0o444 if row.readable else 0) | (0o200 if row.writable else 0)
    return stat.S_IFREG | bits


def inode(path: bytes) -> int:
    """A stable inode number of a declared path."""
    return int.from_bytes(hashlib.blake2b(path.strip(b"/"), digest_size=8).digest(), "little") >> 1 or 1


def render(engine: Any, row: File, keys: Keys) -> bytes:
    """The whole content of a `show` file or the verb list of a ctl. AccessDenied when it cannot be read."""
    if row.verbs is not None:
        from fdfs.ctl import listing as verbs_now

        return verbs_now(engine, row, keys).encode()
    if row.show is None:
        raise AccessDenied(f"{row.name} cannot be read")
    content = row.show(engine, *keys)
    return content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogateescape")


def size_of(engine: Any, row: File, keys: Keys) -> int:
    """The true size of a virtual file in bytes; 0 for one that is only known by waiting."""
    if row.size is not None:
        return int(row.size(engine, *keys))
    if row.wait is not None or row.opens is not None or not row.readable:
        return 0
    return len(render(engine, row, keys))


def attr_of(engine: Any, found: Found, path: bytes) -> Attr:
    """stat(2) of a declared row."""
    row, keys = found.row, found.keys
    size = gone = 0
    mtime = STARTED_NS
    if isinstance(row, File):
        size = size_of(engine, row, keys)
        if row.first is not None:  # as of a sparse file: du shows what is kept
            gone = min(size, int(row.first(engine, *keys)))
        if row.mtime is not None:
            mtime = int(row.mtime(engine, *keys))
    elif isinstance(row, Link):
        size = len(os.fsencode(row.target(engine, *keys)))
    uid, gid = userids.owner()
    return Attr(
        mode=mode_of(row),
        size=size,
        ino=inode(path),
        nlink=2 if isinstance(row, Dir) else 1,
        uid=uid,
        gid=gid,
        mtime_ns=mtime,
        ctime_ns=mtime,
        atime_ns=mtime,
        blocks=(size - gone + BLOCK - 1) // BLOCK,
    )


# --- desktop manners --------------------------------------------------------------------------------------------

_LITTER = frozenset(
    b".DS_Store .hidden .directory desktop.ini Desktop.ini Thumbs.db .Trash .Trashes .fseventsd .Spotlight-V100"
    b" .TemporaryItems .apdisk .VolumeIcon.icns autorun.inf .localized".split()
)
HIDDEN = b".fuse_hidden"  # libfuse renames open files that are removed to this


def is_litter(name: bytes) -> bool:
    """Whether a desktop, not a person, wants to create `name`: refused in declared directories."""
    return name in _LITTER or name.startswith((b"._", b".Trash-", b".xdg-volume-info", b".~lock."))


# --- documentation ----------------------------------------------------------------------------------------------


def rows_below(root: Dir, prefix: str = "", depth: int = 12) -> Iterator[tuple[str, Row]]:
    """(path with placeholders, row) of everything declared, depth first; each row once per place."""
    for row in (*root.rows, *root.kinds):
        path = f"{prefix}/{row.name}" if prefix else row.name
        yield path, row
        if isinstance(row, Dir) and depth and row is not root:
            yield from rows_below(row, path, depth - 1)


def table(root: Dir) -> Sequence[tuple[str, str]]:
    """(path, doc) of every declared row; verbs appear below their ctl."""
    out: list[tuple[str, str]] = []
    for path, row in rows_below(root):
        suffix = "/" if isinstance(row, Dir) else " ->" if isinstance(row, Link) else ""
        out.append((path + suffix, row.doc))
        if isinstance(row, File) and row.verbs is not None:
            for verb in row.verbs.values():
                out.append((f"  {verb.usage}", verb.doc))
    return out
