"""Archives that are small and stand for a lot, streamed to a file: what a hostile registry or user can send."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

END = bytes(1024)


def header(name: str, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT)


def zeros(size: int) -> Iterator[bytes]:
    """One file of zeros."""
    yield header("zeros", size=size)
    piece = bytes(1 << 20)
    for _ in range(size >> 20):
        yield piece


def entries(count: int) -> Iterator[bytes]:
    """Empty files, a thousand to a directory."""
    for number in range(count):
        yield header(f"d{number // 1000}/f{number}")


def deep(count: int) -> Iterator[bytes]:
    """Paths of PATH_MAX bytes that have nothing in common: two thousand directories each."""
    for number in range(count):
        yield header(f"{number}/" + "d/" * 2040 + "f")


def ladder(levels: int) -> Iterator[bytes]:
    """A tree deeper than any path: each rung of 2000 directories begins at a symlink to the end of the last one."""
    base = ""
    for rung in range(levels // 1000):
        yield header(base + "d/" * 1000 + "f")
        yield header(f"l{rung}", type=tarfile.SYMTYPE, linkname=base + "d/" * 999 + "d")
        base = f"l{rung}/"


def links(count: int) -> Iterator[bytes]:
    """Symlinks with targets of 4000 bytes."""
    for number in range(count):
        yield header(f"l{number}", type=tarfile.SYMTYPE, linkname="x" * 4000)


def xattrs(count: int) -> Iterator[bytes]:
    """Files with 120 kB of xattrs each."""
    for number in range(count):
        values = {f"SCHILY.xattr.user.x{k}": chr(97 + number % 26) * 60000 for k in range(2)}
        yield header(f"f{number}", pax_headers=values)


def one_xattr(size: int) -> Iterator[bytes]:
    """A file with one xattr of `size` bytes."""
    yield header("f", pax_headers={"SCHILY.xattr.user.x": "x" * size})


def long_name(size: int) -> Iterator[bytes]:
    """A path of `size` bytes."""
    yield header("n/" * (size // 2))


def write(path: Path, pieces: Iterator[bytes], times: int = 1) -> Path:
    """Compressed by the suffix (.gz, .zst), `times` over: a bomb in a bomb."""

    def packer() -> Callable[[bytes], tuple[bytes, Callable[[], bytes]]]:
        if path.suffix == ".zst":
            zst = zstandard.ZstdCompressor(level=1).compressobj()
            return lambda data: (zst.compress(data), zst.flush)
        deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
        return lambda data: (deflate.compress(data), deflate.flush)

    packers = [packer() for _ in range(times)]

    def through(data: bytes, first: int) -> bytes:
        for pack in packers[first:]:
            data = pack(data)[0]
        return data

    with open(path, "wb") as out:
        for piece in pieces:
            out.write(through(piece, 0))
        out.write(through(END, 0))
        for number, pack in enumerate(packers):
            out.write(through(pack(b"")[1](), number + 1))
    return path
