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

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        piece = bytes(self._rest[:size])
        self._rest = self._rest[len(piece) :]
        return piece


def _zstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    done = 0
    try:
        reader = context.stream_reader(cast(IO[bytes], _Source(chunks)), read_size=BLOCK >> 2, read_across_frames=True)
        while block := reader.read(BLOCK):
            done += len(block)
            yield block
    except zstandard.ZstdError as error:
        raise Damaged(f"the zstd stream is damaged: {error}", at=f"byte {done} uncompressed") from error
