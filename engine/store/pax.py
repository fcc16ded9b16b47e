"""pax extended header records and GNU sparse maps: the text parts of tar. Pure; ValueError says what is bad.

Sources: POSIX.1-2017 pax, "pax Extended Header"; GNU tar manual, "PAX Format, Versions 0.0, 0.1, 1.0"; SCHILY.xattr
as star and GNU tar write it; LIBARCHIVE.xattr (libarchive tar(5)): URL-encoded name, base64 value.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Protocol
from urllib.parse import unquote_to_bytes

SparseMap = list[tuple[int, int]]
MAX_SIZE = (1 << 63) - 1
MAX_FRAGMENTS = 100_000  # of one sparse file
IN_BODY: list[int] = []  # marker (by identity): the map is at the start of the body

_TIME = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?\Z")
_XATTR, _LIBXATTR = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."
_NO_NUL_VALUE = frozenset((b"path", b"linkpath", b"uname", b"gname"))


class _Fields(Protocol):
    name: bytes
    linkname: bytes
    size: int
    stored: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]


def decimal(text: bytes) -> int:
    """Digits only, of a number below 2^63; leading zeros do not count."""
    if not text.isdigit():
        raise ValueError(f"not a decimal number: {text[:24]!r}")
    digits = text.lstrip(b"0")
    value = int(digits or b"0") if len(digits) <= 19 else MAX_SIZE + 1
    if value > MAX_SIZE:
        raise ValueError(f"number out of range: {text[:24]!r}")
    return value


def parse(data: bytes) -> tuple[dict[bytes, bytes], list[int]]:
    """Records "<length> <key>=<value>\\n" as a dict, and format 0.0's repeated GNU.sparse.offset/numbytes in order."""
    records: dict[bytes, bytes] = {}
    sparse: list[int] = []
    at, end = 0, len(data)
    while at < end:
        space = data.find(b" ", at, at + 20)
        if space < 0:
            raise ValueError(f"no length: {data[at : at + 20]!r}")
        length = decimal(data[at:space])
        stop = at + length
        if length < 5 or stop > end or stop <= space + 1 or data[stop - 1] != 10:
            raise ValueError(f"length {length} does not end at a newline")
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise ValueError(f"no key=value: {key[:40]!r}")
        if b"\0" in (value if key in _NO_NUL_VALUE else key):
            raise ValueError(f"NUL byte in {key[:40]!r}")
        if key == b"GNU.sparse.offset" or key == b"GNU.sparse.numbytes":
            if (len(sparse) % 2 == 0) != (key == b"GNU.sparse.offset"):
                raise ValueError("sparse offsets and lengths do not alternate")
            sparse.append(decimal(value))
            if len(sparse) > 2 * MAX_FRAGMENTS:
                raise ValueError(f"more than {MAX_FRAGMENTS} sparse fragments")
        else:
            records[key] = value
        at = stop
    return records, sparse


def parse_time(text: bytes) -> int:
    """Seconds with an optional fraction as nanoseconds, truncated like Go; negative values are before 1970."""
    match = _TIME.match(text)
    if not match:
        raise ValueError(f"not a time: {text[:40]!r}")
    sign, whole, fraction = match.groups()
    value = int(whole) * 1_000_000_000 + int(((fraction or b"") + b"000000000")[:9])
    return -value if sign else value


def apply(member: _Fields, records: dict[bytes, bytes], value_limit: int, total_limit: int) -> None:
    """Override the header's fields; an empty value leaves the header's, as Go does."""
    total = 0
    for key, value in records.items():
        if key.startswith(_XATTR):
            name = key[len(_XATTR) :]
        elif key.startswith(_LIBXATTR):
            name = unquote_to_bytes(key[len(_LIBXATTR) :])
            if _XATTR + name in records:
                continue
            try:
                value = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"xattr {name[:40]!r} is not base64") from error
        else:
            if value:
                _apply_field(member, key, value)
            continue
        if not 0 < len(name) <= 255 or b"\0" in name:
            raise ValueError(f"bad xattr name {name[:40]!r}")
        if len(value) > value_limit:
            raise ValueError(f"xattr {name[:40]!r} of {len(value)} bytes (at most {value_limit})")
        total += len(name) + len(value)
        if total > total_limit:
            raise ValueError(f"more than {total_limit} bytes of xattrs")
        member.xattrs[name] = value


def _apply_field(member: _Fields, key: bytes, value: bytes) -> None:
    if key == b"path":
        member.name = value
    elif key == b"linkpath":
        member.linkname = value
    elif key == b"mtime":
        member.mtime_ns = parse_time(value)
    elif key == b"size":
        member.size = member.stored = decimal(value)
    elif key == b"uid":
        member.uid = decimal(value)
    elif key == b"gid":
        member.gid = decimal(value)
    elif key == b"GNU.sparse.name":
        member.name = value


def is_sparse(records: dict[bytes, bytes]) -> bool:
    """Whether the records say GNU sparse 0.0, 0.1 or 1.0 (an unknown version is an ordinary file, as in Go)."""
    version = (records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b""))
    if version in ((b"0", b"0"), (b"0", b"1"), (b"1", b"0")):
        return True
    return version == (b"", b"") and (b"GNU.sparse.map" in records or b"GNU.sparse.size" in records)


def sparse_numbers(records: dict[bytes, bytes], repeated: list[int]) -> tuple[int, list[int]]:
    """(real size, offset and length pairs in one list); the list is IN_BODY for format 1.0."""
    size = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
    if not size:
        raise ValueError("no GNU.sparse.size")
    real = decimal(size)
    if records.get(b"GNU.sparse.major") == b"1":
        return real, IN_BODY
    if b"GNU.sparse.map" in records:
        text = records[b"GNU.sparse.map"]
        if text.count(b",") > 2 * MAX_FRAGMENTS:
            raise ValueError(f"more than {MAX_FRAGMENTS} fragments")
        return real, [decimal(part) for part in text.split(b",")] if text else []
    return real, list(repeated)


def check_map(numbers: list[int], real: int, stored: int) -> SparseMap:
    """Pairs as fragments: ascending, apart, within `real`, and `stored` bytes together. Empty ones are dropped."""
    if len(numbers) % 2:
        raise ValueError("an offset without a length")
    if real < 0:
        raise ValueError(f"size {real} is negative")
    out: SparseMap = []
    end = total = 0
    for at in range(0, len(numbers), 2):
        offset, length = numbers[at], numbers[at + 1]
        if offset < end or length < 0 or offset + length > real:
            raise ValueError(f"fragment {offset}+{length} overlaps or lies outside the file of {real} bytes")
        end = offset + length
        total += length
        if length:
            out.append((offset, length))
    if total != stored:
        raise ValueError(f"fragments of {total} bytes for {stored} stored")
    return out
