"""store/objects/by-digest/: every distinct file content once, flat, by digest. Read-only, listed as it is read.

Floor 5. Only here: the directory as a graft whose listing is paged from the catalog (`readdir_from`), so millions of
names take neither memory nor time before the first; a known digest is one look-up. Beside `sha256:<hex>` lies
`sha256:<hex>.refs`, found by name but not listed: a `grep -r` here reads every content once and nothing else.
The bare hex digits, as `sha256sum` prints them, are another name of the same. Thread-safe, no state.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from engine import userids
from engine.errors import NotFound, ReadOnly
from engine.store.contents import MAX_PLACES, Content, read
from fdfs.entry import BLOCK, STARTED_NS, Attr
from fdfs.readonly import STATFS, ReadHandle, check_flags, one_of
from fdfs.rootfs import PREFIX
from fdfs.tree.text import paths

REFUSAL = "contents are read-only"
NAME = re.compile(rb"(?:sha256:)?([0-9a-f]{64})(\.refs)?")


def _missing(path: bytes) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))


def _ino(sha256: bytes, refs: bool = False) -> int:
    return (int.from_bytes(sha256[:8], "little") >> 2 | refs << 62) or 1


class ContentsGraft:
    """All contents of an engine's store."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def _find(self, path: bytes) -> tuple[Content, bool]:
        """The content, and whether its `.refs` is meant."""
        match = NAME.fullmatch(path)
        if match is None:
            raise _missing(path)
        try:
            return self._engine.contents.find(bytes.fromhex(match[1].decode())), match[2] is not None
        except NotFound:
            raise _missing(path) from None

    def refs(self, sha256: bytes) -> bytes:
        """Paths below the mount, one per line: where layers have it, and where images show it."""
        return references(self._engine, sha256)

    def getattr(self, path: bytes) -> Attr:
        if not path:
            return Attr(mode=stat.S_IFDIR | 0o555, ino=1, nlink=2, mtime_ns=STARTED_NS, ctime_ns=STARTED_NS)
        content, refs = self._find(path)
        size = len(self.refs(content.sha256)) if refs else content.size
        return Attr(
            mode=stat.S_IFREG | 0o444,
            size=size,
            ino=_ino(content.sha256, refs),
            uid=userids.owner()[0],
            gid=userids.owner()[1],
            mtime_ns=STARTED_NS,
            ctime_ns=STARTED_NS,
            blocks=(size + 4095 >> 12) << 3 if not refs else (size + BLOCK - 1) // BLOCK,
        )

    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]:
        for name, number, mode, _ in self.readdir_from(path, 0):
            yield name, number, mode

    def readdir_from(self, path: bytes, offset: int) -> Iterator[tuple[bytes, int, int, int]]:
        """(name, inode number, mode, offset of the next) from an offset this gave, or 0.

        Offsets are the first 63 bits of digests, so a listing goes on where it was whatever is added or removed.
        """
        if path:
            self._find(path)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        after = (offset << 1 | 1).to_bytes(8, "big") + b"\xff" * 24 if offset else b""
        while page := self._engine.contents.page(after):
            for content in page:
                key = content.sha256
                name = b"sha256:" + key.hex().encode()
                yield name, _ino(key), stat.S_IFREG, int.from_bytes(key[:8], "big") >> 1 or 1
            after = page[-1].sha256

    def readlink(self, path: bytes) -> bytes:
        self._find(path)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def open(self, path: bytes, flags: int) -> ReadHandle:
        check_flags(flags, REFUSAL)
        if not path:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        content, refs = self._find(path)
        if refs:
            text = self.refs(content.sha256)
            return ReadHandle(lambda size, offset: text[offset : offset + size], generated=True, refusal=REFUSAL)
        handle = self._engine.contents.open(content)
        return ReadHandle(lambda size, offset: read(handle, content, size, offset), refusal=REFUSAL)

    def _xattrs(self, path: bytes) -> dict[bytes, bytes]:
        if not path:
            return {}
        content, refs = self._find(path)
        if refs:
            return {}
        return {
            PREFIX + b"digest": b"sha256:" + content.sha256.hex().encode(),
            PREFIX + b"layer": content.diff_id.encode(),
        }

    def listxattr(self, path: bytes) -> list[bytes]:
        return list(self._xattrs(path))

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        return one_of(self._xattrs(path), name)

    def statfs(self) -> Mapping[str, int]:
        return STATFS

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        raise ReadOnly(REFUSAL)


def references(engine: Any, sha256: bytes) -> bytes:
    """`layers/<diff_id>/fs/<path>` of each file with this content, then `images/by-digest/<digest>/rootfs/<path>`.

    An image is listed where its merged tree shows the file, not where an upper layer has replaced it. Bounded.
    """
    row = engine.meta.row("SELECT count(*), coalesce(max(pulled_ns), 0) FROM images")
    return _references(engine, sha256, (row[0], row[1]))


@lru_cache(64)
def _references(engine: Any, sha256: bytes, state: tuple[int, int]) -> bytes:
    places: list[tuple[str, bytes]] = engine.contents.places(sha256)
    out = [f"layers/{diff_id}/fs/".encode() + path for diff_id, path in places]
    by_layer: dict[str, list[bytes]] = {}
    for diff_id, path in places:
        by_layer.setdefault(diff_id, []).append(path)
    wanted = "sha256:" + sha256.hex()
    for diff_id, found in by_layer.items():
        rows = engine.meta.query(
            "SELECT DISTINCT i.digest, i.chain_id FROM image_layers l JOIN images i ON i.digest = l.image"
            " WHERE l.diff_id = ? ORDER BY i.digest",
            (diff_id,),
        )
        for row in rows:
            tree = engine.trees.open(row["chain_id"])
            for path in found:
                if len(out) >= 2 * MAX_PLACES:
                    return paths(out) + b"# and more\n"
                try:
                    origin = tree.provenance(tree.lookup(path))
                except KeyError:
                    continue
                if origin.layer == diff_id and origin.digest == wanted:
                    out.append(f"images/by-digest/{row['digest']}/rootfs/".encode() + path)
    return paths(out)
