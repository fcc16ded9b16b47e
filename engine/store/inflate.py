"""Compressed layer streams: what they are (by their first bytes, as Docker does) and bounded inflation.

Only here: isal, zstandard, bz2 and lzma. `inflate` is a generator of blocks of at most BLOCK bytes, so a small input
never becomes a large allocation. One thread per stream; the libraries release the GIL while they work.

Sources: RFC 1952 (gzip, several members), RFC 8878 (zstd, several frames, skippable frames); magic numbers as in
moby pkg/archive DetectCompression.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol, cast

import zstandard
from isal import igzip_lib

from engine.errors import Damaged

BLOCK = 1 << 20
MAX_WINDOW = 1 << 27  # bytes of a zstd window: libzstd's own default limit
XZ_MEMORY = 128 << 20  # bytes an xz decoder may use

GZIP, ZSTD, BZIP2, XZ, NONE = "gzip", "zstd", "bzip2", "xz", "none"
_SKIPPABLE = tuple(bytes((0x50 + n, 0x2A, 0x4D, 0x18)) for n in range(16))


class _Decompressor(Protocol):
    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def detect(head: bytes) -> str:
    """The compression of a stream that starts with `head` (6 bytes suffice)."""
    if head[:3] == b"\x1f\x8b\x08":
        return GZIP
    if head[:4] == b"\x28\xb5\x2f\xfd" or head[:4] in _SKIPPABLE:
        return ZSTD
    if head[:3] == b"BZh":
        return BZIP2
    if head[:6] == b"\xfd7zXZ\x00":
        return XZ
    return NONE


def inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The uncompressed stream in blocks of at most BLOCK bytes (uncompressed input: as it comes, split).

    Damaged when the compressed stream is broken, truncated, or followed by anything but padding zeros.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 6:
            break
    kind = detect(head)
    source = _chain(head, chunks)
    if kind == NONE:
        yield from _plain(source)
    elif kind == ZSTD:
        yield from _zstd(source)
    else:
        yield from _members(kind, source)


def _chain(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks


def _plain(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if len(chunk) <= BLOCK:
            yield chunk
        else:
            for at in range(0, len(chunk), BLOCK):
                yield chunk[at : at + BLOCK]


_OPEN: dict[str, Callable[[], Any]] = {
    GZIP: lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    BZIP2: bz2.BZ2Decompressor,
    XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY),
}
_ERRORS: tuple[type[Exception], ...] = (
    cast(type[Exception], igzip_lib.error),
    zlib.error,
    OSError,
    EOFError,
    lzma.LZMAError,
    ValueError,
)


def _members(kind: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """gzip, bzip2 and xz: members one after another."""
    stream: _Decompressor | None = None
    done = 0
    pending = b""
    while True:
        if not pending and (stream is None or stream.needs_input):
            pending = next(chunks, b"")
            if not pending:
                if stream is not None:
                    raise Damaged(f"the {kind} stream is truncated", at=f"byte {done} uncompressed")
                return
        if stream is None:
            if done or pending[0] == 0:  # between members: zeros are padding (gzip(1) ignores them, tapes write them)
                pending = pending.lstrip(b"\0")
                if not pending:
                    continue
            stream = _OPEN[kind]()
        try:
            block = stream.decompress(pending, BLOCK)
        except _ERRORS as error:
            raise Damaged(f"the {kind} stream is damaged: {error}", at=f"byte {done} uncompressed") from error
        pending = b""
        if stream.eof:
            pending = stream.unused_data
            stream = None
        if block:
            done += len(block)
            yield block


class _Source:
    """Chunks as the file object zstandard reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.frames = _Frames()

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        piece = bytes(self._rest[:size])
        self._rest = self._rest[len(piece) :]
        self.frames.feed(piece)
        return piece


class _Frames:
    """Follows frames and blocks by their headers, to know whether the stream ended where a frame does.

    The streaming API of zstandard ends silently in the middle of a frame. RFC 8878 section 3.1.
    """

    def __init__(self) -> None:
        self._skip = 0  # bytes to pass over
        self._head = b""  # an incomplete header
        self._in_frame = False
        self._checksum = 0

    @property
    def complete(self) -> bool:
        return not (self._skip or self._head or self._in_frame)

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            need = self._needed()
            piece = data[at : at + need - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) == self._needed():
                self._header(self._head)
                self._head = b""

    def _needed(self) -> int:
        """Bytes of the present header, as far as is known from its beginning."""
        if self._in_frame:
            return 3
        if len(self._head) < 5 or self._head[:4] in _SKIPPABLE:
            return 5 if self._head[:4] not in _SKIPPABLE else 8
        flags = self._head[4]
        single = flags >> 5 & 1
        return 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]

    def _header(self, head: bytes) -> None:
        if self._in_frame:
            block = int.from_bytes(head, "little")
            self._skip = 1 if block >> 1 & 3 == 1 else block >> 3  # a run-length block is one byte
            if block & 1:
                self._in_frame = False
                self._skip += self._checksum
        elif head[:4] in _SKIPPABLE:
            self._skip = int.from_bytes(head[4:], "little")
        else:
            self._in_frame = True
            self._checksum = 4 * (head[4] >> 2 & 1)


def _zstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    done = 0
    source = _Source(chunks)
    try:
        reader = context.stream_reader(cast(IO[bytes], source), read_size=BLOCK >> 2, read_across_frames=True)
        while block := reader.read(BLOCK):
            done += len(block)
            yield block
    except zstandard.ZstdError as error:
        raise Damaged(f"the zstd stream is damaged: {error}", at=f"byte {done} uncompressed") from error
    if not source.frames.complete:
        raise Damaged("the zstd stream is truncated", at=f"byte {done} uncompressed")
