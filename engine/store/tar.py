"""A streaming tar reader for hostile input: v7, ustar, GNU and pax, as Go's archive/tar and GNU tar read them.

Only here (and in pax.py): tar's byte formats. One pass over an iterator of byte blocks, no seeking; bodies are handed
out as memoryviews of those blocks, never copied. Every size, count and offset is bounded before it is used; what
cannot be read raises `Damaged` naming the byte offset in the uncompressed stream, what is beyond a bound `TooLarge`.
Where the two disagree, this follows Go, because Docker does: global pax records are checked and not applied, a lone
zero block followed by anything else is damage, header-only types never have a body. One thread per reader.

Sources: POSIX.1-2017 pax "ustar Interchange Format" and "pax Interchange Format"; GNU tar manual, appendix "Tar
Internals" (Basic Tar Format, GNU extensions, sparse formats); Go src/archive/tar for what real images rely on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import adler32

from engine.errors import Damaged, TooLarge
from engine.store import pax
from engine.store.pax import MAX_SIZE, SparseMap

BLOCK = 512
ZEROS = bytes(BLOCK)

# struct posix_header (ustar); GNU reuses the space of `prefix`
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12s")

REGULAR, HARDLINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_HEADER_ONLY = frozenset((HARDLINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO))
_KNOWN = _HEADER_ONLY | {REGULAR}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one archive; the defaults are far above any real image layer."""

    tar_size: int = 64 << 30  # bytes of uncompressed archive
    entries: int = 4_000_000
    special: int = 1 << 20  # bytes of one pax header or GNU long name (Go: maxSpecialFileSize)
    path: int = 4096  # bytes of a path (Linux PATH_MAX)
    xattr: int = 65535  # bytes of one xattr's value
    xattrs: int = 128 << 10  # bytes of all xattrs of one entry, names included
    all_xattrs: int = 128 << 20  # bytes of the xattrs of all entries
    file_size: int = 1 << 43  # bytes of one file (one EROFS chunk: 2^31 blocks of 4 KiB)
    holes: int = 64 << 30  # bytes of all holes of sparse files


DEFAULT_LIMITS = Limits()


@dataclass(slots=True)
class Member:
    """One archive entry. `size` is the file's size; `stored` the bytes its body has in the archive (sparse: less)."""

    name: bytes
    type: bytes  # one of the constants above; GNU's D, 7, S and v7 spellings are translated to them
    mode: int  # permission bits, 0..0o7777
    uid: int
    gid: int
    size: int
    mtime_ns: int
    linkname: bytes
    devmajor: int
    devminor: int
    offset: int  # of its first header block in the archive
    stored: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: SparseMap | None = None  # data fragments (offset, length), ascending


class TarReader:
    """Iterate to get the members; read or skip each body before going on (`pieces`, `whole`). Not reusable."""

    def __init__(self, blocks: Iterator[bytes], limits: Limits = DEFAULT_LIMITS) -> None:
        self._blocks = blocks
        self.limits = limits
        self._block = b""
        self._view = memoryview(b"")
        self._pos = 0
        self._end = 0
        self._base = 0  # archive offset of the present block
        self._left = 0  # body bytes not yet handed out
        self._pad = 0  # padding after the body
        self._numbers: dict[bytes, int] = {}

    # --- bytes ---------------------------------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Bytes of the archive consumed so far."""
        return self._base + self._pos

    def _next_block(self) -> bool:
        """Move on to the next block; False at the end of the stream."""
        for block in self._blocks:
            if block:
                self._base += self._end
                self._block, self._view, self._pos, self._end = block, memoryview(block), 0, len(block)
                if self._base + self._end > self.limits.tar_size:
                    raise TooLarge(f"the archive is larger than {self.limits.tar_size} bytes uncompressed")
                return True
        self._base += self._end
        self._block, self._view, self._pos, self._end = b"", memoryview(b""), 0, 0
        return False

    def _take(self, count: int) -> bytes:
        """Exactly `count` bytes (small), or fewer at the end of the stream."""
        pos = self._pos
        if self._end - pos >= count:
            self._pos = pos + count
            return self._block[pos : pos + count]
        out = bytearray()
        while len(out) < count:
            if self._pos == self._end and not self._next_block():
                break
            piece = self._block[self._pos : self._pos + count - len(out)]
            self._pos += len(piece)
            out += piece
        return bytes(out)

    def _truncated(self, what: str) -> Damaged:
        return Damaged(f"the archive ends at byte {self.offset} inside {what}", at=f"byte {self.offset}")

    def _bad(self, offset: int, what: str) -> Damaged:
        return Damaged(f"bad tar header at byte {offset}: {what}", at=f"byte {offset}")

    def pieces(self) -> Iterator[memoryview]:
        """The rest of the present body as views into the stream's blocks. Damaged when the archive ends early."""
        while self._left:
            if self._pos == self._end and not self._next_block():
                raise self._truncated("a file's content")
            pos = self._pos
            piece = self._view[pos : pos + self._left]
            self._pos = pos + len(piece)
            self._left -= len(piece)
            yield piece

    def whole(self) -> memoryview | None:
        """The entire body as one view when it lies in the present block (the usual small file), else None."""
        pos, size = self._pos, self._left
        if self._end - pos < size:
            return None
        self._pos = pos + size
        self._left = 0
        return self._view[pos : pos + size]

    def _skip(self, count: int, what: str) -> None:
        while count:
            if self._pos == self._end and not self._next_block():
                if not what:  # padding may be missing at the end, as Go and GNU tar allow
                    return
                raise self._truncated(what)
            step = min(count, self._end - self._pos)
            self._pos += step
            count -= step

    def drain(self) -> None:
        """Read the stream to its end (what follows the end marker belongs to the digest, not to the archive)."""
        while self._next_block():
            pass
        self._pos = self._end

    # --- headers -------------------------------------------------------------------------------------------------

    def _header(self) -> bytes | None:
        """The next header block; None at the end: no more bytes, or two zero blocks, or one at the very end."""
        block = self._take(BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise self._truncated("a header")
        if block[0] == 0 and block == ZEROS:
            second = self._take(BLOCK)
            if second == ZEROS or not second:
                return None
            if len(second) < BLOCK:
                raise self._truncated("the end marker")
            raise self._bad(self.offset - 2 * BLOCK, "a zero block in the middle of the archive")
        return block

    def _number(self, text: bytes, offset: int, what: str) -> int:
        """Octal or GNU base-256; memoised because mode, uid, gid and device fields repeat."""
        known = self._numbers.get(text)
        if known is not None:
            return known
        value = parse_number(text)
        if value is None:
            raise self._bad(offset, f"{what} is not a number: {text[:16]!r}")
        if len(self._numbers) > 4096:
            self._numbers.clear()
        self._numbers[text] = value
        return value

    def __iter__(self) -> Iterator[Member]:
        """Members in archive order. Damaged, TooLarge."""
        limits = self.limits
        records: dict[bytes, bytes] | None = None
        sparse_records: list[int] = []
        long_name = long_link = b""
        start = -1  # offset of the first of the headers that make up this member
        count = special = xattrs = 0
        while True:
            if self._left or self._pad:
                self._skip(self._left, "a file's content")
                self._left = 0
                self._skip(self._pad, "")
                self._pad = 0
            here = self._base + self._pos
            block = self._header()
            if block is None:
                return
            if start < 0:
                start = here
            name, mode, uid, gid, size, mtime, chksum, kind, link, magic, version, _, _, major, minor, prefix, tail = (
                _HEADER.unpack(block)
            )
            self._check_sum(block, chksum, here)
            length = self._number(size, here, "size")
            if length < 0 or length > MAX_SIZE:
                raise self._bad(here, f"size {length} is out of range")
            if kind in b"xXgLK":
                special += 1
                if special > 64:
                    raise self._bad(here, "more than 64 extension headers before one entry")
                if length > limits.special:
                    raise TooLarge(f"extension header of {length} bytes at byte {here}", at=f"byte {here}")
                data = self._take(length)
                if len(data) < length:
                    raise self._truncated("an extension header")
                self._skip(-length % BLOCK, "")
                if kind == b"L":
                    long_name = data.split(b"\0", 1)[0]
                elif kind == b"K":
                    long_link = data.split(b"\0", 1)[0]
                else:
                    try:
                        parsed, sparse = pax.parse(data)
                    except ValueError as error:
                        raise self._bad(here, f"pax record: {error}") from error
                    if kind != b"g":
                        records, sparse_records = parsed, sparse
                continue
            if kind == b"V":  # GNU volume label: a name and nothing else
                self._left, self._pad = length, -length % BLOCK
                start, records, long_name, long_link, special = -1, None, b"", b"", 0
                continue
            count += 1
            if count > limits.entries:
                raise TooLarge(f"more than {limits.entries} entries in the archive")

            ustar = magic == b"ustar\0"
            gnu = magic == b"ustar " and version == b" \0"
            name = name.split(b"\0", 1)[0]
            if ustar and prefix[0]:
                if tail[8:] == b"tar\0":  # star: atime and ctime sit in the end of prefix
                    prefix = prefix[:131]
                name = prefix.split(b"\0", 1)[0] + b"/" + name
            elif gnu and prefix[0] and kind != b"S" and parse_number(prefix[:12]) is None:
                # Go before 1.8 wrote ustar prefixes under GNU magic
                name = prefix.split(b"\0", 1)[0] + b"/" + name
            member = Member(
                name,
                kind,
                self._number(mode, here, "mode") & 0o7777,
                self._number(uid, here, "uid"),
                self._number(gid, here, "gid"),
                length,
                self._number(mtime, here, "mtime") * 1_000_000_000,
                link.split(b"\0", 1)[0] if link[0] else b"",
                0,
                0,
                start,
                length,
            )
            if kind in b"34" and (ustar or gnu):
                member.devmajor = self._number(major, here, "device number")
                member.devminor = self._number(minor, here, "device number")
            if records is not None:
                try:
                    pax.apply(member, records, limits.xattr, limits.xattrs)
                except ValueError as error:
                    raise self._bad(here, f"pax record: {error}") from error
            if long_name:
                member.name = long_name
            if long_link:
                member.linkname = long_link
            if member.xattrs:
                xattrs += sum(len(key) + len(value) for key, value in member.xattrs.items())
                if xattrs > limits.all_xattrs:
                    raise TooLarge(f"more than {limits.all_xattrs} bytes of xattrs in the archive")
            self._settle(member, kind, block, here, records, sparse_records)
            start, records, long_name, long_link, special = -1, None, b"", b"", 0
            yield member

    def _settle(
        self,
        member: Member,
        kind: bytes,
        block: bytes,
        here: int,
        records: dict[bytes, bytes] | None,
        sparse_records: list[int],
    ) -> None:
        """Translate the type, find the sparse map, fix the body's length, check the bounds."""
        if kind == b"\0":  # v7: a directory is a name that ends in a slash
            member.type = DIRECTORY if member.name.endswith(b"/") else REGULAR
        elif kind == b"7":  # contiguous file: regular everywhere
            member.type = REGULAR
        elif kind == b"D":  # GNU incremental directory: its body lists names, of no use here
            member.type = DIRECTORY
        elif kind == b"S":
            member.type = REGULAR
        elif kind not in _KNOWN:
            raise self._bad(here, f"unsupported entry type {kind!r}")
        if kind in _HEADER_ONLY or (kind == b"\0" and member.type == DIRECTORY):
            member.size = member.stored = 0
        if kind == b"D":
            self._left, self._pad, member.size, member.stored = member.stored, -member.stored % BLOCK, 0, 0
        else:
            self._left, self._pad = member.stored, -member.stored % BLOCK
        if member.type == REGULAR and (kind == b"S" or (records is not None and pax.is_sparse(records))):
            self._sparse(member, kind, block, here, records or {}, sparse_records)
        limits = self.limits
        if len(member.name) > limits.path or len(member.linkname) > limits.path:
            raise TooLarge(f"a path longer than {limits.path} bytes at byte {here}", at=f"byte {here}")
        if b"\0" in member.name or b"\0" in member.linkname:
            raise self._bad(here, "a NUL byte in a path")
        if member.size > limits.file_size:
            raise TooLarge(f"a file of {member.size} bytes at byte {here}", at=f"byte {here}")
        if not (0 <= member.uid < 1 << 32 and 0 <= member.gid < 1 << 32):
            raise self._bad(here, f"uid {member.uid} or gid {member.gid} is out of range")
        if not (0 <= member.devmajor < 1 << 12 and 0 <= member.devminor < 1 << 20):
            raise self._bad(here, f"device number {member.devmajor}:{member.devminor} is out of range")

    def _check_sum(self, block: bytes, chksum: bytes, here: int) -> None:
        stated = self._number(chksum, here, "checksum")
        # adler32's low half is 1 + the sum of bytes mod 65521, exact for 256 bytes: the fastest sum Python has
        total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2 - sum(chksum) + 256
        if total != stated and total - 256 * sum(b > 127 for b in block[:148] + block[156:]) != stated:
            raise self._bad(here, "checksum mismatch")

    # --- sparse files --------------------------------------------------------------------------------------------

    def _sparse(
        self,
        member: Member,
        kind: bytes,
        block: bytes,
        here: int,
        records: dict[bytes, bytes],
        sparse_records: list[int],
    ) -> None:
        """Fill `member.sparse` and the real size from whichever of GNU's five sparse formats this is."""
        numbers: list[int]
        if kind == b"S":
            if block[257:263] != b"ustar ":
                raise self._bad(here, "a GNU sparse file without GNU magic")
            real = self._number(block[483:495], here, "real size")
            numbers = self._old_sparse(block[386:482], here)
            extended = block[482]
            while extended:
                more = self._take(BLOCK)
                if len(more) < BLOCK:
                    raise self._truncated("a sparse map")
                numbers += self._old_sparse(more[:504], here)
                extended = more[504]
                if len(numbers) > pax.MAX_FRAGMENTS * 2:
                    raise TooLarge(f"a sparse map of more than {pax.MAX_FRAGMENTS} fragments", at=f"byte {here}")
        else:
            try:
                real, numbers = pax.sparse_numbers(records, sparse_records)
                if numbers is pax.IN_BODY:
                    numbers = self._body_map(member)
            except ValueError as error:
                raise self._bad(here, f"sparse map: {error}") from error
        try:
            member.sparse = pax.check_map(numbers, real, self._left)
        except ValueError as error:
            raise self._bad(here, f"sparse map: {error}") from error
        member.size = real
        member.stored = self._left

    def _old_sparse(self, area: bytes, here: int) -> list[int]:
        """offset and numbytes pairs of 12 bytes each, up to the first empty one."""
        out: list[int] = []
        for at in range(0, len(area) - 23, 24):
            if not area[at]:
                break
            out.append(self._number(area[at : at + 12], here, "sparse offset"))
            out.append(self._number(area[at + 12 : at + 24], here, "sparse length"))
        return out

    def _body_map(self, member: Member) -> list[int]:
        """GNU sparse 1.0: the map is decimal lines at the start of the body, padded to whole blocks."""
        text = bytearray()

        def more() -> None:
            if self._left < BLOCK:
                raise ValueError("it does not end within the file")
            if len(text) > 2 * 21 * pax.MAX_FRAGMENTS:
                raise ValueError(f"more than {pax.MAX_FRAGMENTS} fragments")
            piece = self._take(BLOCK)
            if len(piece) < BLOCK:
                raise self._truncated("a sparse map")
            self._left -= BLOCK
            text.extend(piece)

        more()
        while b"\n" not in text:
            more()
        count = pax.decimal(bytes(text[: text.index(b"\n")]))
        if count > pax.MAX_FRAGMENTS:
            raise ValueError(f"more than {pax.MAX_FRAGMENTS} fragments")
        lines = text.count(b"\n")
        while lines < 1 + 2 * count:
            before = len(text)
            more()
            lines += text.count(b"\n", before)
        return [pax.decimal(bytes(part)) for part in text.split(b"\n", 2 * count + 1)[1 : 2 * count + 1]]


def parse_number(text: bytes) -> int | None:
    """A numeric header field: octal digits between spaces and NULs, or base-256 when bit 7 of the first byte is set.

    None when it is neither, or does not fit in 63 bits and a sign.
    """
    if text and text[0] & 0x80:
        value = int.from_bytes(text, "big")
        bits = 8 * len(text)
        # bit 7 only marks the format; bit 6 is the sign of the two's complement rest
        value = value - (1 << bits) if text[0] & 0x40 else value - (1 << (bits - 1))
        return value if -(1 << 63) <= value < 1 << 63 else None
    digits = text.strip(b" \0")
    digits = digits.split(b"\0", 1)[0]
    if not digits:
        return 0
    if digits.isdigit():
        try:
            value = int(digits, 8)
        except ValueError:
            return None
        return value if value < 1 << 63 else None
    return None
