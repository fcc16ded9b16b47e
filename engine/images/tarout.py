"""Writing tar archives: headers in ustar with pax records where ustar cannot say it. Pure functions. Floor 2.

Only here: the bytes of a header. The same input gives the same bytes: what is written depends on nothing but the
fields of `Member`. Pax records are used for long or non-ASCII names (names that are not UTF-8 stay raw, as GNU tar
writes them), numbers beyond octal, times with fractions or before 1970, and xattrs (SCHILY.xattr).

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

BLOCK = 512
END = bytes(2 * BLOCK)
REGULAR, HARDLINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCKDEV,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: FIFO,
}
_OCTAL7, _OCTAL11 = 0o7777777, 0o77777777777


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `mode` has permission bits only; `size` counts for REGULAR alone."""

    name: bytes
    kind: bytes = REGULAR
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    linkname: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


def padding(size: int) -> bytes:
    """What follows a body of `size` bytes."""
    return bytes(-size % BLOCK)


def header(member: Member) -> bytes:
    """The header blocks of a member, pax records included."""
    name = member.name + b"/" if member.kind == DIRECTORY and not member.name.endswith(b"/") else member.name
    records: dict[bytes, bytes] = {}
    seconds, fraction = divmod(member.mtime_ns, 1_000_000_000)
    if _long(name):
        records[b"path"] = name
    if _long(member.linkname):
        records[b"linkpath"] = member.linkname
    size = member.size if member.kind == REGULAR else 0
    for key, value, most in ((b"uid", member.uid, _OCTAL7), (b"gid", member.gid, _OCTAL7), (b"size", size, _OCTAL11)):
        if value > most:
            records[key] = b"%d" % value
    if fraction or not 0 <= seconds <= _OCTAL11:
        records[b"mtime"] = _time(member.mtime_ns)
    for key, content in member.xattrs.items():
        records[b"SCHILY.xattr." + key] = content
    out = b""
    if records:
        body = b"".join(_record(key, records[key]) for key in sorted(records))
        base = name.rstrip(b"/").rpartition(b"/")[2]
        out = _ustar(b"PaxHeaders.0/" + base[:80], b"x", 0o644, 0, 0, len(body), 0, b"", (0, 0))
        out += body + padding(len(body))
    return out + _ustar(
        name, member.kind, member.mode, member.uid, member.gid, size, seconds, member.linkname, member.rdev
    )


def archive(members: Iterable[tuple[Member, Iterable[bytes]]]) -> Iterator[bytes]:
    """A whole archive in pieces: each member with its body. ValueError when a body is not as long as announced."""
    for member, body in members:
        yield header(member)
        if member.kind == REGULAR:
            count = 0
            for piece in body:
                count += len(piece)
                yield piece
            if count != member.size:
                raise ValueError(f"{count} bytes of {member.name!r} where {member.size} were announced")
            yield padding(count)
    yield END


def _long(name: bytes) -> bool:
    """Whether a name needs a pax record."""
    if len(name) > 100:
        return True
    if name.isascii():
        return False
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _time(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    return sign + b"%d" % seconds + (b".%09d" % fraction).rstrip(b"0").rstrip(b".")


def _record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`, the length counting itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _octal(value: int, width: int) -> bytes:
    most = 8 ** (width - 1) - 1
    return b"%0*o\0" % (width - 1, value if 0 <= value <= most else 0)


def _ustar(
    name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes, rdev: tuple[int, int]
) -> bytes:
    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            _octal(mode & 0o7777, 8),
            _octal(uid, 8),
            _octal(gid, 8),
            _octal(size, 12),
            _octal(mtime, 12),
            b" " * 8,
            kind,
            link[:100].ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),
            _octal(rdev[0], 8),
            _octal(rdev[1], 8),
            bytes(167),
        )
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
