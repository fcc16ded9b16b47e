"""`index`: every entry of one layer in tar order, compact and checksummed; and the Entry it holds.

Only here: the format. Written once by ingest, read as a stream by everything that builds trees. Version 1:

    file   = magic "FDINDEX1", frame*, trailer
    frame  = u32 length, u32 crc32 of the payload, payload; the payload is whole records
    record = u8 kind, then
             DEP:    32 bytes sha256 of the next data layer (numbered from 1; 0 is this layer itself)
             others: _FIXED (below), then path, linkname, [32 bytes body sha256, u32 data layer, u64 offset when the
                     entry is a regular file of size > 0], [xattrs: u8 name length, u16 value length, name, value]*
    trailer= u32 0, u32 crc32 of the next 16 bytes, u64 records that are entries, u64 offset of the trailer

All integers are little-endian. Readers treat the file as possibly damaged: `Damaged`, never a crash. A writer or an
iterator belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from zlib import crc32

from engine.errors import Damaged, NotFound
from engine.store.blobs import no_space

MAGIC = b"FDINDEX1"
FRAME = 256 << 10  # payload bytes after which a frame is closed
MAX_FRAME = 4 << 20
_FIXED = struct.Struct("<HIIqQIHHH")  # mode uid gid mtime_ns size rdev path_len link_len xattr_count
_BODY = struct.Struct("<32sIQ")
_XATTR = struct.Struct("<BH")
_HEAD = struct.Struct("<II")
_TRAILER = struct.Struct("<QQ")
_DEP = 0


class Kind(IntEnum):
    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    CHAR = 4
    BLOCK = 5
    FIFO = 6
    HARDLINK = 7
    WHITEOUT = 8  # path is what it removes
    OPAQUE = 9  # path is the directory whose lower content is hidden


@dataclass(slots=True)
class Entry:
    """One entry. `path` is clean: relative, no empty, `.` or `..` parts; b"" is the root."""

    path: bytes
    kind: Kind
    mode: int = 0  # permission bits with setuid, setgid and sticky; no type
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0  # may be negative, as the archive said
    size: int = 0
    rdev: int = 0  # Linux encoding: minor & 0xff | major << 8 | (minor & ~0xff) << 12
    linkname: bytes = b""  # symlink: as is; hardlink: a clean path
    sha256: bytes = b""  # of the body, b"" without one
    data: str = ""  # diff_id of the layer whose `data` has the body
    offset: int = 0  # bytes into that data, a multiple of 4096
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class IndexWriter:
    """Appends entries to a new file at `path`. A context manager; `finish` completes the file."""

    def __init__(self, path: Path, diff_id: str = "") -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._frame = bytearray()
        self._devices: dict[str, int] = {diff_id: 0}
        self._offset = 0
        self.entries = 0
        self._write(MAGIC)

    def _write(self, data: bytes | bytearray) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            if full := no_space(error):
                raise full from error
            raise
        self._offset += len(data)

    def add(self, entry: Entry) -> None:
        """`entry.data` is the writer's own diff_id (usually "") for bodies in this layer."""
        frame = self._frame
        device = 0
        if entry.sha256 and (device := self._devices.get(entry.data, -1)) < 0:
            device = self._devices[entry.data] = len(self._devices)
            frame.append(_DEP)
            frame += bytes.fromhex(entry.data[7:])
        frame.append(entry.kind)
        frame += _FIXED.pack(
            entry.mode,
            entry.uid,
            entry.gid,
            max(-(1 << 63), min(entry.mtime_ns, (1 << 63) - 1)),
            entry.size,
            entry.rdev,
            len(entry.path),
            len(entry.linkname),
            len(entry.xattrs),
        )
        frame += entry.path
        frame += entry.linkname
        if entry.sha256:
            frame += _BODY.pack(entry.sha256, device, entry.offset)
        if entry.xattrs:
            for name, value in entry.xattrs.items():
                frame += _XATTR.pack(len(name), len(value))
                frame += name
                frame += value
        self.entries += 1
        if len(frame) >= FRAME:
            self._flush()

    def _flush(self) -> None:
        if self._frame:
            self._write(_HEAD.pack(len(self._frame), crc32(self._frame)) + self._frame)
            self._frame = bytearray()

    def deps(self) -> list[str]:
        """diff_ids of the other layers whose data is referenced."""
        return list(self._devices)[1:]

    def finish(self) -> int:
        """Write the trailer; returns the open file's descriptor for fsync (closed by leaving the context)."""
        self._flush()
        trailer = _TRAILER.pack(self.entries, self._offset)
        self._write(_HEAD.pack(0, crc32(trailer)) + trailer)
        return self._file.fileno()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def read_index(path: Path, diff_id: str) -> Iterator[Entry]:
    """Entries of the index at `path`, of layer `diff_id`, in tar order. Damaged, NotFound."""
    try:
        file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115
    except FileNotFoundError as error:
        raise NotFound("no such layer", at=diff_id) from error
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise Damaged("not a layer index", at=str(path))
        devices = [diff_id]
        entries = 0
        offset = len(MAGIC)
        while True:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                raise Damaged(f"the layer index ends at byte {offset}", at=str(path))
            length, check = _HEAD.unpack(head)
            if length > MAX_FRAME:
                raise Damaged(f"bad frame at byte {offset} of the layer index", at=str(path))
            payload = file.read(length or _TRAILER.size)
            if len(payload) != (length or _TRAILER.size) or crc32(payload) != check:
                raise Damaged(f"checksum mismatch at byte {offset} of the layer index", at=str(path))
            if not length:
                if _TRAILER.unpack(payload) != (entries, offset) or file.read(1):
                    raise Damaged("the layer index does not end where it says", at=str(path))
                return
            try:
                for entry in _records(payload, devices):
                    entries += 1
                    yield entry
            except (struct.error, IndexError, ValueError) as error:
                raise Damaged(f"bad record after byte {offset} of the layer index: {error}", at=str(path)) from error
            offset += _HEAD.size + length


class _AnyLayer(list[str]):
    """Stands for the data layers where only some frames are read."""

    def __getitem__(self, _: object) -> str:  # type: ignore[override]
        return ""


def find_body(path: Path, diff_id: str, sha256: bytes) -> Iterator[Entry]:
    """The entries of an index whose body has this digest, `data` left empty; only frames that can have one are parsed.

    Damaged, NotFound. (Names that are hard links to such an entry are entries of their own and not found.)
    """
    try:
        file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115
    except FileNotFoundError as error:
        raise NotFound("no such layer", at=diff_id) from error
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise Damaged("not a layer index", at=str(path))
        while True:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                raise Damaged("the layer index is cut off", at=str(path))
            length, check = _HEAD.unpack(head)
            if not length:
                return
            payload = file.read(length) if length <= MAX_FRAME else b""
            if len(payload) != length or crc32(payload) != check:
                raise Damaged("checksum mismatch in the layer index", at=str(path))
            if sha256 in payload:
                try:
                    yield from (entry for entry in _records(payload, _AnyLayer()) if entry.sha256 == sha256)
                except (struct.error, IndexError, ValueError) as error:
                    raise Damaged(f"bad record in the layer index: {error}", at=str(path)) from error


_KINDS = {int(kind): kind for kind in Kind}


def _records(payload: bytes, devices: list[str]) -> Iterator[Entry]:
    at, end = 0, len(payload)
    fixed, fixed_size = _FIXED.unpack_from, _FIXED.size
    file_kind = Kind.FILE
    while at < end:
        code = payload[at]
        at += 1
        if code == _DEP:
            if at + 32 > end:
                raise ValueError("short dependency")
            devices.append("sha256:" + payload[at : at + 32].hex())
            at += 32
            continue
        kind = _KINDS.get(code)
        if kind is None:
            raise ValueError(f"kind {code}")
        mode, uid, gid, mtime_ns, size, rdev, path_len, link_len, xattr_count = fixed(payload, at)
        at += fixed_size
        path = payload[at : at + path_len]
        at += path_len
        link = payload[at : at + link_len]
        at += link_len
        entry = Entry(path, kind, mode, uid, gid, mtime_ns, size, rdev, link)
        if kind is file_kind and size:
            entry.sha256, device, entry.offset = _BODY.unpack_from(payload, at)
            entry.data = devices[device]
            at += _BODY.size
        for _ in range(xattr_count):
            name_len, value_len = _XATTR.unpack_from(payload, at)
            at += _XATTR.size
            entry.xattrs[payload[at : at + name_len]] = payload[at + name_len : at + name_len + value_len]
            at += name_len + value_len
        if at > end:
            raise ValueError("record crosses its frame")
        yield entry
