"""Layers read by ranges: tables of contents, what vouches for them, chunks that rot or lie, and slow places."""

from __future__ import annotations

import email.utils
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard

from engine.errors import Damaged, DeadlineExceeded, EngineError, NotFound, TooLarge, Unreachable, Unsupported
from engine.images import chunked, flights, ranges, toc
from engine.images.flights import Flights
from engine.images.manifests import OCI_LAYER, Descriptor
from engine.images.ranges import RemoteLayer
from engine.images.registry import Registry
from engine.images.transport import _retry_after
from engine.store.index import Kind, read_index


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layer:
    """A zstd:chunked layer by its definition: a frame per chunk, then the TOC in a skippable frame."""

    def __init__(self, files: dict[str, list[bytes]], **more: Any) -> None:
        blob, entries = bytearray(), []
        for name, chunks in files.items():
            whole = b"".join(chunks)
            at = 0
            for number, chunk in enumerate(chunks):
                item: dict[str, Any] = {"name": name, "type": "chunk" if number else "reg", "offset": len(blob)}
                item |= {"chunkOffset": at, "chunkSize": len(chunk), "chunkDigest": digest(chunk)}
                if not number:
                    item |= {"size": len(whole), "mode": 0o644, "digest": digest(whole)}
                entries.append(item)
                blob += zstandard.compress(chunk)
                at += len(chunk)
        self.raw = json.dumps({"version": 1, "entries": entries} | more).encode()
        packed = zstandard.compress(self.raw)
        start = len(blob) + 8
        blob += b"\x50\x2a\x4d\x18" + len(packed).to_bytes(4, "little") + packed
        self.blob = bytes(blob)
        key = "io.github.containers.zstd-chunked"
        self.annotations = {
            f"{key}.manifest-checksum": digest(packed),
            f"{key}.manifest-position": f"{start}:{len(packed)}:{len(self.raw)}:1",
        }
        self.asked: list[tuple[int, int]] = []
        self.before: Callable[[], None] = lambda: None

    @property
    def entry(self) -> Descriptor:
        return Descriptor(f"{OCI_LAYER}+zstd", digest(self.blob), len(self.blob), None, self.annotations)

    def part(self, entry: Descriptor, start: int, stop: int) -> Iterator[bytes]:
        """As Registry.part, in small pieces."""
        self.asked.append((start, stop))
        self.before()
        for at in range(start, stop, 1000):
            yield self.blob[at : min(stop, at + 1000)]

    def registry(self) -> Registry:
        return cast(Registry, self)

    def open(self, directory: Path) -> RemoteLayer:
        if not (directory / "chunks").exists():
            how = chunked.source(self.entry)
            assert how is not None
            raw, stop = chunked.fetch(self.registry(), self.entry, how)
            assert raw == self.raw
            directory.mkdir(exist_ok=True)
            toc.convert(raw, self.entry.digest, stop, directory)
            self.asked.clear()
        return RemoteLayer(directory, self.entry, self.registry)


def body(number: int, size: int = 5000) -> bytes:
    return hashlib.shake_128(bytes([number])).digest(size)


def test_files_are_fetched_once_and_found_again(tmp_path: Path) -> None:
    layer = Layer({"a": [body(1), body(2)], "b": [body(3)], "c": [b"small"]})
    opened = layer.open(tmp_path)
    offsets = {entry.path: (entry.offset, entry.size) for entry in read_index(tmp_path / "index", "x")}
    assert opened.read(*offsets[b"a"]) == body(1) + body(2)
    assert opened.read(offsets[b"a"][0] + 4990, 20) == (body(1) + body(2))[4990:5010]
    assert opened.read(*offsets[b"b"]) == body(3) and opened.read(*offsets[b"c"]) == b"small"
    assert len(layer.asked) == 1  # what follows came along
    again = layer.open(tmp_path)  # another daemon: found in the store, verified, not fetched
    assert again.read(*offsets[b"b"]) == body(3)
    assert len(layer.asked) == 1


def test_what_rotted_in_the_store_is_fetched_again(tmp_path: Path) -> None:
    layer = Layer({"a": [body(1)]})
    assert layer.open(tmp_path).read(0, 5000) == body(1)
    with open(tmp_path / "data", "r+b") as file:
        file.seek(100)
        file.write(b"rot")
    assert layer.open(tmp_path).read(0, 5000) == body(1)
    assert len(layer.asked) == 2


def test_a_registry_that_sends_something_else_is_not_believed(tmp_path: Path) -> None:
    layer = Layer({"a": [body(1)], "b": [body(2)]})
    opened = layer.open(tmp_path)
    good = layer.blob
    layer.blob = zstandard.compress(body(9)) + good[len(zstandard.compress(body(9))) :]
    with pytest.raises(Damaged, match="does not match"):
        opened.read(0, 5000)
    layer.blob = good[:300]
    with pytest.raises(Damaged):
        opened.read(0, 5000)
    layer.blob = good
    assert opened.read(0, 5000) == body(1)


def test_a_reader_leaves_a_slow_registry_and_finds_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SILENCE", 0.1)
    layer = Layer({"a": [body(1)]})
    opened = layer.open(tmp_path)
    go = threading.Event()
    layer.before = lambda: cast(None, go.wait(100))
    for _ in range(2):
        with pytest.raises(DeadlineExceeded):
            opened.read(0, 100)
    go.set()
    deadline = time.monotonic() + 40
    while True:
        try:
            assert opened.read(0, 5000) == body(1)
            break
        except DeadlineExceeded:
            assert time.monotonic() < deadline
    assert len(layer.asked) == 1


def test_a_table_of_contents_is_vouched_for_by_the_manifest(tmp_path: Path) -> None:
    layer = Layer({"a": [body(1)]})
    how = chunked.source(layer.entry)
    assert how is not None and how.kind == "zstd:chunked"
    layer.blob = layer.blob[:-3] + bytes(3)
    with pytest.raises(Damaged, match="vouches"):
        chunked.fetch(layer.registry(), layer.entry, how)
    layer.annotations = {}
    assert chunked.source(layer.entry) is None


BAD: list[tuple[Any, type[EngineError]]] = [
    ("nothing", Damaged),
    ({"type": "reg", "name": "a", "size": 5, "offset": 0}, Unsupported),  # nothing to verify it by
    ({"type": "reg", "name": "a", "size": 5, "offset": 0, "digest": "md5:1"}, Damaged),
    ({"type": "reg", "name": "a", "size": -5}, Damaged),
    ({"type": "reg", "name": "a", "size": 5, "offset": 10**9, "digest": digest(b"x")}, TooLarge),
    ({"type": "reg", "name": "a", "size": 5, "offset": 100, "digest": digest(b"x")}, Damaged),
    ({"type": "reg", "name": "a", "size": 1 << 60, "digest": digest(b"x")}, TooLarge),
    ({"type": "reg", "name": "a", "size": 5, "chunkOffset": 1, "digest": digest(b"x")}, Damaged),
    ({"type": "reg", "name": "a", "size": 5, "chunkSize": 3, "digest": digest(b"x")}, Damaged),
    ({"type": "socket", "name": "a"}, Damaged),
    ({"type": "dir", "name": "a" * 5000}, TooLarge),
    ({"type": "dir", "name": "a\0b"}, Damaged),
    ({"type": "dir", "name": "a", "xattrs": {"user.x": "no base64!"}}, Damaged),
    ({"type": "dir", "name": "a", "xattrs": {"user.x": 5}}, Damaged),
]


@pytest.mark.parametrize(("item", "error"), BAD)
def test_a_hostile_table_is_refused(tmp_path: Path, item: Any, error: type[EngineError]) -> None:
    with pytest.raises(error):
        toc.convert(json.dumps({"entries": [item]}).encode(), digest(b""), 100, tmp_path)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"\xff", b'{"entries": [', b'{"entries": [{}', b'{"entries": []}', b"[" * 9999]
)
def test_what_is_no_table_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(Damaged):
        toc.convert(raw, digest(b""), 100, tmp_path)


def test_nothing_starts_outside_and_whiteouts_mean_what_they_mean(tmp_path: Path) -> None:
    items = [
        {"type": "symlink", "name": "../../etc/x", "linkName": "/y", "modtime": "2024-01-02T03:04:05.5Z"},
        {"type": "reg", "name": "d/.wh.gone"},
        {"type": "reg", "name": "d/.wh..wh..opq"},
        {"type": "hardlink", "name": "h", "linkName": "/../a"},
    ]
    toc.convert(json.dumps({"entries": items}).encode(), digest(b""), 100, tmp_path)
    found = list(read_index(tmp_path / "index", "x"))
    assert [(entry.path, entry.kind) for entry in found] == [
        (b"etc/x", Kind.SYMLINK), (b"d/gone", Kind.WHITEOUT), (b"d", Kind.OPAQUE), (b"h", Kind.HARDLINK),
    ]  # fmt: skip
    assert found[0].mtime_ns == 1704164645_500000000 and found[3].linkname == b"a"


def test_a_silent_place_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "PATIENCE", 1.0)
    asked, go = Flights(), threading.Event()

    def slow() -> int:
        go.wait(100)
        return 7

    since = time.monotonic()
    for key in ("a", "b", "a", "c"):
        with pytest.raises(DeadlineExceeded):
            asked.ask("host", key, slow, 60)
    assert time.monotonic() - since < 3
    assert asked.ask("other", "d", lambda: 8, 60) == 8  # nobody else suffers
    go.set()
    deadline = time.monotonic() + 40
    while asked.known("a") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked.ask("host", "a", slow, 60) == 7


def test_what_is_known_stands_while_its_place_is_out_of_reach() -> None:
    asked, calls = Flights(), []

    def work() -> int:
        calls.append(1)
        if len(calls) > 1:
            raise Unreachable("gone")
        return 7

    assert asked.ask("host", "a", work, 0.0) == 7
    for _ in range(3):
        assert asked.ask("host", "a", work, 0.0) == 7
        time.sleep(0.05)

    def missing() -> int:
        raise NotFound("no")

    for _ in range(2):
        with pytest.raises(NotFound):
            asked.ask("host", "b", missing, 60)


def test_how_long_a_registry_wants_to_be_left_alone() -> None:
    """RFC 9110, Retry-After: seconds or a date."""
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (_retry_after(later) or 0) <= 30
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert _retry_after("12") == 12 and _retry_after("") is None and _retry_after("soon") is None
