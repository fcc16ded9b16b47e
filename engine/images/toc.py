"""The table of contents of a layer that can be read by ranges: JSON to entries and a list of chunks. Floor 2.

Only here: what a TOC means. eStargz and zstd:chunked share it but for details. It becomes two files: `index`, the
same as of an ingested layer (so merge and EROFS take it as it is), whose bodies lie in a sparse `data` at offsets
given here, and `chunks`, fixed records sorted by that offset, read by mmap. The JSON is decoded entry by entry, so a
TOC of the largest size taken does not become a hundred times that in objects. Pure but for the two files; one thread.

Sources: stargz-snapshotter docs/estargz.md ("TOC"); containers/storage pkg/chunked/internal (FileMetadata).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.errors import Damaged, TooLarge, Unsupported
from engine.model import DIGEST
from engine.store import tar
from engine.store.entries import entry_of
from engine.store.index import Entry, IndexWriter, Kind

MAX_TOC = 64 << 20  # bytes of JSON
MAX_ENTRIES = 1 << 20
MAX_CHUNKS = 4 << 20
MAX_PATH = 4096
MAX_XATTRS = 64  # per file
MAX_DATA = 1 << 42  # bytes of all bodies of a layer; the file is sparse
MAX_CHUNK = 4 << 30
MAX_INNER = 64 << 20  # bytes of a gzip member in front of a chunk
ALIGN = 4096

MAGIC = b"FDCHUNK1"
HEAD = struct.Struct("<8s32sQQ")  # magic, sha256 of the records, how many, bytes of data
CHUNK = struct.Struct("<QQQQI32s4x")  # offset and size in data, start and stop in the blob, inner offset, sha256

_ENTRIES = re.compile(r'"entries"\s*:\s*\[\s*')
_NEXT = re.compile(r"\s*(,|\])\s*")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TYPES = {
    "reg": tar.REGULAR,
    "dir": tar.DIRECTORY,
    "symlink": tar.SYMLINK,
    "hardlink": tar.HARDLINK,
    "char": tar.CHAR,
    "block": tar.BLOCKDEV,
    "fifo": tar.FIFO,
}


def items(raw: bytes) -> Iterator[dict[str, Any]]:
    """The entries of a TOC as they stand in it. Damaged, TooLarge."""
    if len(raw) > MAX_TOC:
        raise TooLarge(f"a table of contents of {len(raw)} bytes where at most {MAX_TOC} are read")
    try:
        text = raw.decode()
        found = _ENTRIES.search(text)
        if found is None:
            raise Damaged("the table of contents has no entries", at="entries")
        decode, at = json.JSONDecoder().raw_decode, found.end()
        count = 0
        while text[at : at + 1] != "]" or count:
            item, at = decode(text, at)
            if not isinstance(item, dict):
                raise Damaged(f"entry {count}: an object expected", at=f"entries[{count}]")
            yield item
            count += 1
            if count > MAX_ENTRIES + MAX_CHUNKS:
                raise TooLarge(f"more than {MAX_ENTRIES + MAX_CHUNKS} entries in the table of contents")
            step = _NEXT.match(text, at)
            if step is None:
                raise Damaged("the table of contents is not JSON", at=f"character {at}")
            at = step.end()
            if step[1] == "]":
                return
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the table of contents is not JSON: {error}"[:200]) from error


def _number(item: dict[str, Any], key: str, where: str, limit: int) -> int:
    value = item.get(key) or 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Damaged(f"{where}.{key}: a number expected", at=f"{where}.{key}")
    if value > limit:
        raise TooLarge(f"{where}.{key}: {value} where at most {limit} is taken", at=f"{where}.{key}")
    return value


def _text(item: dict[str, Any], key: str, where: str) -> bytes:
    value = item.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise Damaged(f"{where}.{key}: a string expected", at=f"{where}.{key}")
    raw = value.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_PATH:
        raise TooLarge(f"{where}.{key}: more than {MAX_PATH} bytes", at=f"{where}.{key}")
    return raw


def _digest(item: dict[str, Any], key: str, where: str) -> bytes:
    value = item.get(key) or ""
    if not value:
        return b""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise Damaged(f"{where}.{key}: not a sha256 digest", at=f"{where}.{key}")
    return bytes.fromhex(value[7:])


def _time(value: Any) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time; 0 for none."""
    if not isinstance(value, str) or not value:
        return 0
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return 0
    span = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (span.days * 86400 + span.seconds) * 1_000_000_000 + span.microseconds * 1000


def _xattrs(item: dict[str, Any], where: str) -> dict[bytes, bytes]:
    value = item.get("xattrs") or {}
    if not isinstance(value, dict) or len(value) > MAX_XATTRS:
        raise Damaged(f"{where}.xattrs: at most {MAX_XATTRS} expected", at=f"{where}.xattrs")
    out = {}
    for name, data in value.items():
        key = name.encode("utf-8", "surrogatepass")
        try:
            raw = base64.b64decode(data, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise Damaged(f"{where}.xattrs: base64 expected", at=f"{where}.xattrs") from error
        if not 0 < len(key) <= 255 or b"\0" in key or len(raw) > 65535:
            raise TooLarge(f"{where}.xattrs: a name or value out of bounds", at=f"{where}.xattrs")
        out[key] = raw
    return out


def _member(item: dict[str, Any], where: str, number: int) -> tar.Member:
    kind = _TYPES.get(item.get("type") or "")
    if kind is None:
        raise Damaged(f"{where}.type: {str(item.get('type'))[:40]!r} is not known", at=f"{where}.type")
    return tar.Member(
        _text(item, "name", where),
        kind,
        _number(item, "mode", where, 1 << 32) & 0o7777,
        _number(item, "uid", where, (1 << 32) - 1),
        _number(item, "gid", where, (1 << 32) - 1),
        _number(item, "size", where, MAX_DATA) if kind == tar.REGULAR else 0,
        _time(item.get("modtime")),
        _text(item, "linkName", where),
        _number(item, "devMajor", where, 0xFFF),
        _number(item, "devMinor", where, 0xFFFFF),
        number,
        0,
        _xattrs(item, where),
    )


class _Writer:
    """Files and their chunks in TOC order; `finish` gives every chunk its end."""

    def __init__(self, layer: str, index: IndexWriter, stop: int) -> None:
        self._layer, self._index, self._stop = layer, index, stop
        self._chunks: list[tuple[int, int, int, int, bytes]] = []  # data offset, size, blob start, inner, digest
        self._file: Entry | None = None
        self._whole = b""  # its digest, which is that of its only chunk too
        self._pieces: list[tuple[int, int, int, int, bytes, str]] = []  # offset in the file …, where
        self.end = 0
        self.size = 0

    def item(self, item: dict[str, Any], number: int) -> None:
        where = f"entries[{number}]"
        if item.get("type") == "chunk":
            if self._file is not None:
                self._piece(item, where)
            return
        self._close()
        entry = entry_of(_member(item, where, number))
        if entry is None:
            return
        if entry.kind is Kind.FILE and entry.size:
            self._file, self._whole = entry, _digest(item, "digest", where)
            self._piece(item, where)
        else:
            self._index.add(entry)

    def _piece(self, item: dict[str, Any], where: str) -> None:
        assert self._file is not None
        at = _number(item, "chunkOffset", where, self._file.size)
        size = _number(item, "chunkSize", where, MAX_CHUNK)
        start = _number(item, "offset", where, self._stop)
        inner = _number(item, "innerOffset", where, MAX_INNER)
        self._pieces.append((at, size, start, inner, _digest(item, "chunkDigest", where), where))

    def _close(self) -> None:
        """The file whose chunks have all been seen: they must cover it, each with a digest."""
        entry, pieces = self._file, self._pieces
        if entry is None:
            return
        self._file, self._pieces = None, []
        whole = self._whole or (pieces[0][4] if len(pieces) == 1 else b"")
        if not whole:
            raise Unsupported("a file without a digest cannot be verified", at=pieces[0][5])
        position = 0
        for number, (at, size, start, inner, digest, where) in enumerate(pieces):
            after = pieces[number + 1][0] if number + 1 < len(pieces) else entry.size
            if at != position or after <= at or (size and size != after - at) or after - at > MAX_CHUNK:
                raise Damaged(f"{where}: the chunks do not make up the file", at=where)
            digest = digest or (whole if len(pieces) == 1 else b"")
            if not digest:
                raise Unsupported(f"{where}: a chunk without a digest cannot be verified", at=where)
            self._chunks.append((self.end + at, after - at, start, inner, digest))
            position = after
        if len(self._chunks) > MAX_CHUNKS:
            raise TooLarge(f"more than {MAX_CHUNKS} chunks in the layer")
        entry.sha256, entry.data, entry.offset = whole, self._layer, self.end
        self.end += entry.size + -entry.size % ALIGN
        self.size += entry.size
        if self.end > MAX_DATA:
            raise TooLarge(f"more than {MAX_DATA} bytes of files in the layer")
        self._index.add(entry)

    def finish(self, path: Path) -> None:
        """What the blob has from one chunk's start to the next start belongs to the first of the two."""
        self._close()
        starts = sorted({start for _, _, start, _, _ in self._chunks})
        starts.append(self._stop)
        records = bytearray()
        for offset, size, start, inner, digest in self._chunks:
            stop = starts[min(bisect_right(starts, start), len(starts) - 1)]
            if stop <= start:
                raise Damaged(f"a chunk starts at byte {start}, behind the files", at="offset")
            records += CHUNK.pack(offset, size, start, stop, inner, digest)
        head = HEAD.pack(MAGIC, sha256(records).digest(), len(self._chunks), self.end)
        path.write_bytes(head + records)


def convert(raw: bytes, layer: str, stop: int, directory: Path) -> int:
    """Write `index` and `chunks` of the layer `layer` (the digest of its blob) into `directory`; returns bytes of data.

    `stop` is where the blob's files end (its TOC begins). Damaged, TooLarge, Unsupported name the entry at fault.
    """
    with IndexWriter(directory / "index", "") as index:
        writer = _Writer("", index, stop)
        number = -1
        for number, item in enumerate(items(raw)):
            writer.item(item, number)
        writer.finish(directory / "chunks")
        index.finish()
    if number < 0:
        raise Damaged("the table of contents is empty", at="entries")
    return writer.end
