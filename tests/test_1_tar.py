"""The tar reader reads what Go and GNU tar read, refuses the rest cleanly, and is bounded on hostile input."""

from __future__ import annotations

import base64
import bz2
import io
import lzma
import os
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip

from engine.errors import Damaged, EngineError, TooLarge
from engine.store import pax
from engine.store.inflate import BLOCK, inflate
from engine.store.tar import Limits, Member, TarReader, parse_number

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "tar"


def content(member: Member, reader: TarReader) -> bytes:
    """The whole body, holes included."""
    stored = b"".join(reader.pieces())
    if member.sparse is None:
        return stored
    out, at = bytearray(member.size), 0
    for offset, length in member.sparse:
        out[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(out)


def read(data: bytes, limits: Limits = Limits(), step: int = 1 << 20) -> list[tuple[Member, bytes]]:  # noqa: B008
    reader = TarReader((data[at : at + step] for at in range(0, len(data), step)), limits)
    return [(member, content(member, reader) if member.size < 1 << 24 else b"") for member in reader]


def load(name: str) -> bytes:
    path = FIXTURES / name
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"fixtures are missing: {path}")
        pytest.skip(f"fixtures are missing: {path}")
    data = path.read_bytes()
    return base64.b64decode(data) if path.suffix == ".base64" else data


def all_fixtures() -> list[str]:
    names = [str(path.relative_to(FIXTURES)) for path in FIXTURES.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.endswith(".txt")) or ["missing"]


GO = "go-archive-tar/"
# file -> expected headers (name, type, size, mtime_ns, linkname) or None where Go's reader_test.go expects an error
GO_TABLE: dict[str, list[tuple[bytes, bytes, int, int, bytes]] | None] = {
    "gnu.tar": [
        (b"small.txt", b"0", 5, 1244428340 * 10**9, b""),
        (b"small2.txt", b"0", 11, 1244436044 * 10**9, b""),
    ],
    "star.tar": [
        (b"small.txt", b"0", 5, 1244592783 * 10**9, b""),
        (b"small2.txt", b"0", 11, 1244592783 * 10**9, b""),
    ],
    "v7.tar": [
        (b"small.txt", b"0", 5, 1244593104 * 10**9, b""),
        (b"small2.txt", b"0", 11, 1244593104 * 10**9, b""),
    ],
    "pax.tar": [
        (b"a/" + b"".join(b"%d" % n for n in range(1, 101)), b"0", 7, 1350244992023960108, b""),
        (b"a/b", b"2", 0, 1350266320910238425, b"".join(b"%d" % n for n in range(1, 101))),
    ],
    "pax-bad-hdr-file.tar": None,
    "pax-bad-hdr-large.tar.bz2": None,
    "pax-bad-mtime-file.tar": None,
    "pax-pos-size-file.tar": [(b"foo", b"0", 999, 1442282516 * 10**9, b"")],
    "pax-global-records.tar": [
        (b"file1", b"0", 0, 0, b""),
        (b"file2", b"0", 0, 0, b""),
        (b"file3", b"0", 0, 0, b""),
        (b"file4", b"0", 0, 1400000000 * 10**9, b""),
    ],
    "nil-uid.tar": [(b"P1050238.JPG.log", b"0", 14, 1365454838 * 10**9, b"")],
    "gnu-multi-hdrs.tar": [(b"GNU2/GNU2/long-path-name", b"2", 0, 0, b"GNU4/GNU4/long-linkpath-name")],
    "pax-multi-hdrs.tar": [(b"bar", b"2", 0, 0, b"PAX4/PAX4/long-linkpath-name")],
    "gnu-long-nul.tar": [(b"0123456789", b"0", 0, 1486082191 * 10**9, b"")],
    "gnu-incremental.tar": [  # Go says 'D' and 'S'
        (b"test2/", b"5", 0, 1441973427 * 10**9, b""),
        (b"test2/foo", b"0", 64, 1441973363 * 10**9, b""),
        (b"test2/sparse", b"0", 536870912, 1441973427 * 10**9, b""),
    ],
    "issue10968.tar": None,
    "issue11169.tar": None,
    "issue12435.tar": None,
    "neg-size.tar.base64": None,
    "pax-nul-path.tar": None,
    "pax-nul-xattrs.tar": None,
    "gnu-sparse-many-zeros.tar.bz2": None,
}


@pytest.mark.parametrize("name", sorted(GO_TABLE))
def test_headers_are_those_of_go(name: str) -> None:
    rows = GO_TABLE[name]
    data = b"".join(inflate(iter([load(GO + name)])))
    if rows is None:
        with pytest.raises(EngineError):
            read(data)
        return
    members = [member for member, _ in read(data)]
    assert [(m.name, m.type, m.size, m.mtime_ns, m.linkname) for m in members] == rows


def test_sparse_formats_have_the_contents_go_expects() -> None:
    rows = read(load(GO + "sparse-formats.tar"))
    assert [f"{zlib.crc32(body):08x}" for _, body in rows] == ["5375e1d2"] * 4 + ["8eb179ba"]


def test_header_only_types_have_no_body() -> None:
    rows = [member for member, _ in read(load(GO + "hdr-only.tar"))]
    assert len(rows) == 16
    assert [(m.name, m.type) for m in rows[:8]] == [(m.name, m.type) for m in rows[8:]]


def test_truncation_is_where_go_says() -> None:
    """Go's TestReadTruncation: (input, headers read, whether it ends in an error)."""
    gnu, reg, pax_only, sparse = (
        load(GO + name) for name in ("gnu.tar", "ustar-file-reg.tar", "pax-path-hdr.tar", "sparse-formats.tar")
    )
    reg += bytes(10 * 512)
    trash = b"garbage " * 64
    table = [
        (b"", 0, False), (gnu[:511], 0, True), (gnu[:512], 1, True), (gnu[:1024], 1, False), (gnu[:1536], 2, True),
        (gnu[:2048], 2, False), (gnu, 2, False), (gnu[:2048] + reg[:1536], 3, False), (reg[:511], 0, True),
        (reg[:512], 1, True), (reg[:1195], 1, True), (reg[:1196], 1, False), (reg[:1200], 1, False),
        (reg[:1535], 1, False), (reg[:1536], 1, False), (reg[:1536] + trash[:1], 1, True),
        (reg[:1536] + trash[:511], 1, True), (reg[:1536] + trash, 1, True), (reg[:2048], 1, False),
        (reg[:2048] + trash[:1], 1, True), (reg[:2048] + trash[:511], 1, True), (reg[:2048] + trash, 1, True),
        (reg[:2560], 1, False), (reg[:2560] + trash[:1], 1, False), (reg[:2560] + trash, 1, False),
        (reg[:3072], 1, False), (pax_only, 0, False), (pax_only + trash[:1], 0, True),
        (pax_only + trash[:511], 0, True),
        (sparse[:511], 0, True), (sparse[:512], 0, True), (sparse[:3584], 1, False), (sparse[:9200], 1, False),
        (sparse[:9216], 1, False), (sparse[:9728], 2, True), (sparse[:10240], 2, False), (sparse[:11264], 2, True),
        (sparse, 5, False), (sparse + trash, 5, False),
    ]  # fmt: skip
    for number, (data, count, fails) in enumerate(table):
        for step in (1 << 20, 512, 100):
            reader = TarReader(data[at : at + step] for at in range(0, len(data), step))
            seen, failed = 0, False
            try:
                for _ in reader:
                    seen += 1
            except Damaged as error:
                failed = True
                assert "byte " in error.reason
            assert (seen, failed) == (count, fails), f"row {number}, blocks of {step}"


TARFILE_DIFFERS = {  # where Python's tarfile departs from Go and GNU tar
    "pax-global-records.tar",  # applies global records
    "global-header.tar",
    "gnu-incremental.tar",  # takes GNU's atime for a prefix
    "gnu-multi-hdrs.tar",  # the first of several headers wins
    "pax-multi-hdrs.tar",
    "pax-nil-sparse-data.tar",  # size of sparse 1.0
    "pax-nil-sparse-hole.tar",
    "pax-sparse-big.tar.base64",
    "test_read_format_tar_timestamp_overflow.tar",  # leading NULs in a number
}


@pytest.mark.parametrize("name", all_fixtures())
def test_every_fixture_is_read_as_tarfile_reads_it_or_refused(name: str) -> None:
    data = load(name)
    try:
        plain = b"".join(inflate(iter([data])))
        ours = [member for member, _ in read(plain)]
    except EngineError as error:
        assert error.reason
        return
    for step in (512, 1000):
        assert [m.name for m, _ in read(plain, step=step)] == [m.name for m in ours]
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            theirs = tar.getmembers()
    except (tarfile.TarError, ValueError):
        return
    if Path(name).name in TARFILE_DIFFERS or len(theirs) != len(ours):
        return
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.name.rstrip(b"/") == os.fsencode(other.name).rstrip(b"/")
        assert (mine.mode, mine.uid, mine.gid) == (other.mode & 0o7777, other.uid, other.gid)
        if mine.type == b"0" and other.isreg():
            assert mine.size == other.size
        if mine.type in b"12":
            assert mine.linkname == os.fsencode(other.linkname)
        assert mine.mtime_ns // 10**9 == int(other.mtime // 1)


XATTRS = {b"user.data1": b"ABCDEFG", b"user.data2": b"XYZ"}


@pytest.mark.parametrize("kind", ["all", "libarchive", "schily"])
def test_xattrs_in_both_spellings(kind: str) -> None:
    ((member, _),) = read(load(f"libarchive/test_pax_xattr_header_{kind}.tar"))
    assert {key: len(value) for key, value in member.xattrs.items()} == {b"user.data1": 7, b"user.data2": 3}


def test_times_before_the_epoch() -> None:
    assert pax.parse_time(b"-1.5") == -1_500_000_000
    assert pax.parse_time(b"1.123456789999") == 1_123_456_789
    assert pax.parse_time(b"0.000000001") == 1
    for bad in (b"", b"-", b"1.2.3", b"+1", b"1e5", b" 1", b"1_0", b"--1", b"9" * 30):
        with pytest.raises(ValueError):
            pax.parse_time(bad)
    ((member, _),) = read(load("libarchive/test_read_format_tar_pax_negative_time.tar"))
    assert member.mtime_ns < 0


def test_numbers() -> None:
    assert parse_number(b"0000644\0") == 0o644
    assert parse_number(b" 644 \0\0\0") == 0o644
    assert parse_number(b"") == parse_number(b"\0" * 8) == parse_number(b"        ") == 0
    assert parse_number(b"\x80" + bytes(10) + b"\x05") == 5
    assert parse_number(b"\xff" * 12) == -1
    assert parse_number(b"\x80" + b"\xff" * 11) is None
    for bad in (b"8", b"12x", b"-1", b"1_0", b"0o7"):
        assert parse_number(bad) is None, bad


def sealed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header(
    name: bytes = b"f", size: bytes = b"00000000000\0", kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytearray:
    out = bytearray(512)
    out[: len(name)] = name
    out[100:108] = out[108:116] = out[116:124] = b"0000644\0"
    out[124:136], out[136:148], out[156:157], out[257:265] = size, b"00000000000\0", kind, magic
    return out


def records(*pairs: tuple[str, bytes]) -> bytes:
    body = b""
    for key, value in pairs:
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + len(str(len(rest) + 3))
        while len(str(length)) + len(rest) != length:
            length += 1
        body += b"%d" % length + rest
    return sealed(header(b"pax", b"%011o\0" % len(body), b"x")) + body + bytes(-len(body) % 512)


def sparse_01(size: bytes, fragments: bytes, stored: int) -> bytes:
    pairs = records(("GNU.sparse.size", size), ("GNU.sparse.map", fragments))
    return pairs + sealed(header(size=b"%011o\0" % stored)) + bytes(-(-stored // 512) * 512)


def sparse_10(body: bytes) -> bytes:
    pairs = records(("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9"))
    return pairs + sealed(header(size=b"%011o\0" % len(body))) + body


HOSTILE = {
    "negative size": sealed(header(size=b"\xff" * 12)),
    "huge size": sealed(header(size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7)),
    "minus in octal": sealed(header(size=b"-0000000001\0")),
    "pax size too big": records(("size", b"9" * 19)) + sealed(header()),
    "negative pax size": records(("size", b"-1")) + sealed(header()),
    "pax header of 2 MiB": sealed(header(size=b"%011o\0" % (2 << 20), kind=b"x")) + bytes(2 << 20),
    "pax header larger than the archive": sealed(header(size=b"%011o\0" % 1000, kind=b"x")) + bytes(100),
    "long name of 2 MiB": sealed(header(size=b"%011o\0" % (2 << 20), kind=b"L")) + b"a" * (2 << 20),
    "path of 5000 bytes": records(("path", b"a/" * 2500)) + sealed(header()),
    "NUL in path": records(("path", b"a\0b")) + sealed(header()),
    "a hundred pax headers": records(("comment", b"x")) * 100 + sealed(header()),
    "uid out of range": records(("uid", b"4294967296")) + sealed(header()),
    "xattr of 70 KiB": records(("SCHILY.xattr.user.a", b"x" * 70_000)) + sealed(header()),
    "xattrs of 600 KiB": records(*((f"SCHILY.xattr.user.{n}", b"x" * 60_000) for n in range(10))) + sealed(header()),
    "xattr name of 300 bytes": records(("SCHILY.xattr.user." + "n" * 300, b"x")) + sealed(header()),
    "unknown type": sealed(header(kind=b"M")),
    "sparse map outside": sparse_01(b"10", b"5,10", 10),
    "sparse map overlapping": sparse_01(b"99", b"5,10,8,10", 20),
    "sparse map odd": sparse_01(b"99", b"5", 0),
    "sparse map of other size": sparse_01(b"99", b"5,10", 0),
    "sparse 1.0 endless": sparse_10(b"1" * 1024),
    "sparse 1.0 of 2^60 fragments": sparse_10(b"1152921504606846976\n" + bytes(492)),
    "sparse 1.0 of bad numbers": sparse_10(b"1\n-5\n5\n" + bytes(505)),
    "sparse of 2^62 bytes": records(("GNU.sparse.size", b"%d" % (1 << 62)), ("GNU.sparse.map", b"")) + sealed(header()),
    "lone zero block": sealed(header()) + bytes(512) + sealed(header()),
    "half a header": sealed(header())[:300],
    "body missing": sealed(header(size=b"%011o\0" % 10_000)) + b"x" * 5000,
    "checksum": bytes(header()),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_archives_are_refused_with_the_byte(name: str) -> None:
    with pytest.raises((Damaged, TooLarge)) as caught:
        read(HOSTILE[name])
    assert "byte" in caught.value.reason


def test_bounds_on_the_whole_archive() -> None:
    data = sealed(header()) * 50 + bytes(1024)
    with pytest.raises(TooLarge):
        read(data, Limits(entries=49))
    with pytest.raises(TooLarge):
        read(data, Limits(tar_size=1000))
    assert len(read(data, Limits(entries=50))) == 50


def test_signed_checksums_of_old_writers() -> None:
    raw = header("höhe".encode("latin-1"))
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % (sum(raw) - 256 * sum(byte > 127 for byte in raw))
    assert [member.name for member, _ in read(bytes(raw))] == ["höhe".encode("latin-1")]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_tarfile_writes_is_read_back(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    long = 90 if form == tarfile.USTAR_FORMAT else 300
    part = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
    names = (
        st.lists(part, min_size=1, max_size=20).map("/".join).filter(lambda n: len(n.encode()) <= long and n.strip("/"))
    )
    big = 1 << (21 if form == tarfile.USTAR_FORMAT else 31)
    out = io.BytesIO()
    wanted = []
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for _ in range(data.draw(st.integers(0, 6))):
            info = tarfile.TarInfo(data.draw(names))
            info.type = data.draw(st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6"]))
            info.mode, info.uid, info.gid = (data.draw(st.integers(0, top)) for top in (0o7777, big - 1, big - 1))
            info.mtime = data.draw(st.integers(0, (1 << 33) - 1))
            if info.type in (b"1", b"2"):
                info.linkname = data.draw(names)
            if info.type in (b"3", b"4"):
                info.devmajor, info.devminor = data.draw(st.integers(0, 4095)), data.draw(st.integers(0, (1 << 20) - 1))
            body = data.draw(st.binary(max_size=1500)) if info.type == b"0" else b""
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
            wanted.append((info, body))
    got = read(out.getvalue(), step=data.draw(st.sampled_from([1, 300, 512, 4096])))
    assert len(got) == len(wanted)
    for (member, body), (info, original) in zip(got, wanted, strict=True):
        assert member.name.rstrip(b"/") == info.name.encode().rstrip(b"/")
        assert (member.type, member.mode, member.uid, member.gid) == (info.type, info.mode, info.uid, info.gid)
        assert (member.mtime_ns, body) == (info.mtime * 10**9, original)
        if info.type in (b"1", b"2"):
            assert member.linkname == info.linkname.encode()
        if info.type in (b"3", b"4"):
            assert (member.devmajor, member.devminor) == (info.devmajor, info.devminor)


def test_random_damage_never_escapes_as_another_error() -> None:
    rng = random.Random(7)
    for name in ("sparse-formats.tar", "pax.tar", "gnu-multi-hdrs.tar", "xattrs.tar", "gnu-incremental.tar"):
        data = load(GO + name)
        for _ in range(200):
            broken = bytearray(data)
            for _ in range(rng.randrange(1, 8)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            for at in range(0, len(broken), 512):  # half of the time with a valid checksum, to get further
                if rng.random() < 0.5 and broken[257 + at : 262 + at] == b"ustar":
                    block = broken[at : at + 512]
                    broken[at : at + 512] = sealed(block)
            try:
                read(bytes(broken[: rng.randrange(len(broken))] if rng.random() < 0.2 else broken))
            except (Damaged, TooLarge):
                pass


# --- compression -----------------------------------------------------------------------------------------------------

PLAIN = bytes(range(256)) * 9000
PACKERS = {
    "gzip": igzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "none": lambda data: data,
}


def split(data: bytes, step: int) -> Iterator[bytes]:
    return (data[at : at + step] for at in range(0, len(data), step))


@pytest.mark.parametrize("kind", sorted(PACKERS))
@pytest.mark.parametrize("step", [7, 1000, 1 << 30])
def test_inflate_by_first_bytes_with_several_members(kind: str, step: int) -> None:
    pack = PACKERS[kind]
    data = pack(PLAIN) + pack(b"second member") + (pack(b"") if kind != "none" else b"")
    blocks = list(inflate(split(data, step)))
    assert b"".join(blocks) == PLAIN + b"second member"
    assert max(map(len, blocks)) <= BLOCK


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_truncated_and_damaged_streams(kind: str) -> None:
    data = PACKERS[kind](os.urandom(100_000))
    assert b"".join(inflate(split(data + bytes(100), 999)))  # padding zeros are fine
    for broken in (
        data[:-1],
        data[:1000],
        data[: len(data) // 2] + b"\xff" * 50 + data[len(data) // 2 + 50 :],
        data + b"junk",
    ):
        with pytest.raises(Damaged):
            list(inflate(split(broken, 4096)))


def test_damaged_zstd() -> None:
    data = zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(100_000))
    with pytest.raises(Damaged):
        list(inflate(split(data[:50_000] + b"\0" * 50 + data[50_050:], 4096)))
    with pytest.raises(Damaged):
        list(inflate(split(data[:-1000], 4096)))


def test_a_bomb_comes_in_small_blocks() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 20_000
    total = 0
    for block in inflate(iter([bomb])):
        assert len(block) <= BLOCK
        total += len(block)
    assert total == 1 << 28


def test_compressions_from_other_hands() -> None:
    folder = FIXTURES.parent / "layers" / "compression"
    if not folder.is_dir():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"fixtures are missing: {folder}")
    for path in folder.glob("Hello.*"):
        assert b"".join(inflate(iter([path.read_bytes()]))) == b"Hello"
