"""Blobs are visible only whole and right; a broken download resumes; crashes between file and row are repaired."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import Damaged, InvalidArgument, NotFound, TooLarge
from engine.store.blobs import Blobs
from engine.store.check import check, empty_tmp, remove_strays
from engine.store.meta import Meta


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[Blobs]:
    meta = Meta(tmp_path / "db.sqlite")
    store = Blobs(tmp_path, meta)
    yield store
    assert check(tmp_path, meta, deep=True) == []
    meta.close()


def tmp_files(blobs: Blobs) -> list[str]:
    return sorted(path.name for path in (blobs.root / "tmp").iterdir())


def test_put_read_remove(blobs: Blobs) -> None:
    digest = blobs.put(b"hello", "text/plain")
    assert digest == sha(b"hello") == blobs.put(b"hello", "text/plain")
    assert blobs.has(digest) and blobs.read(digest) == b"hello" and blobs.size(digest) == 5
    assert blobs.path(digest).read_bytes() == b"hello" and blobs.all() == [digest]
    assert b"".join(blobs.chunks(digest, 2)) == b"hello"
    blobs.verify(digest)
    assert blobs.remove(digest) == 5
    assert not blobs.has(digest) and not blobs.path(digest).exists()
    for call in (blobs.read, blobs.size, blobs.remove, blobs.verify):
        with pytest.raises(NotFound):
            call(digest)
    assert tmp_files(blobs) == []


def test_an_empty_blob(blobs: Blobs) -> None:
    assert blobs.read(blobs.put(b"", "x")) == b""


@pytest.mark.parametrize("bad", ["", "sha256:", "sha256:" + "A" * 64, "sha256:../../etc/passwd", "md5:" + "0" * 32])
def test_malformed_digests_reach_no_path(blobs: Blobs, bad: str) -> None:
    for call in (blobs.path, blobs.has, blobs.read, lambda text: blobs.writer("x", text)):
        with pytest.raises(InvalidArgument):
            call(bad)


def test_reading_is_bounded_and_verified(blobs: Blobs) -> None:
    digest = blobs.put(b"x" * 100, "x")
    with pytest.raises(TooLarge):
        blobs.read(digest, limit=99)
    blobs.path(digest).write_bytes(b"y" * 100)
    with pytest.raises(Damaged):
        blobs.read(digest)
    with pytest.raises(Damaged):
        blobs.verify(digest)
    blobs.path(digest).write_bytes(b"x" * 100)


def test_wrong_digest_or_size_leaves_nothing(blobs: Blobs) -> None:
    good = sha(b"good")
    with pytest.raises(Damaged), blobs.writer("x", good) as writer:
        writer.write(b"evil")
        writer.commit()
    with pytest.raises(Damaged), blobs.writer("x", good, 4) as writer:
        writer.write(b"goodness")
    with pytest.raises(Damaged), blobs.writer("x", None, 9) as writer:
        writer.write(b"short")
        writer.commit()
    assert not blobs.has(good) and tmp_files(blobs) == []


def test_a_broken_download_resumes_at_its_offset(blobs: Blobs) -> None:
    data = os.urandom(3 << 20)
    with pytest.raises(ConnectionError), blobs.writer("x", sha(data), len(data)) as writer:
        writer.write(data[:1_500_000])
        raise ConnectionError
    assert not blobs.has(sha(data))
    with blobs.writer("x", sha(data), len(data)) as writer:
        assert writer.offset == 1_500_000
        assert b"".join(writer.replay()) == data[:1_500_000]
        writer.write(data[writer.offset :])
        assert writer.commit() == sha(data)
    assert blobs.read(sha(data)) == data and tmp_files(blobs) == []


def test_restart_forgets_what_was_there(blobs: Blobs) -> None:
    with pytest.raises(ConnectionError), blobs.writer("x", sha(b"right")) as writer:
        writer.write(b"wro")
        raise ConnectionError
    with blobs.writer("x", sha(b"right")) as writer:
        writer.restart()
        writer.write(b"right")
        writer.commit()
    assert blobs.read(sha(b"right")) == b"right"


def test_two_writers_of_one_blob(blobs: Blobs) -> None:
    digest = sha(b"same")
    with blobs.writer("x", digest) as first, blobs.writer("x", digest) as second:
        first.write(b"sa")
        assert second.offset == 0
        second.write(b"same")
        second.commit()
        first.write(b"me")
        first.commit()
    assert blobs.read(digest) == b"same" and tmp_files(blobs) == []


def test_a_crash_between_file_and_row_is_invisible_and_repaired(blobs: Blobs) -> None:
    digest = sha(b"orphan")
    blobs.path(digest).write_bytes(b"orphan")
    assert not blobs.has(digest)
    assert remove_strays(blobs.root, blobs.meta) == [f"blobs/{digest[7:]}"]
    blobs.path(digest).write_bytes(b"orph")  # or the next writer replaces it
    blobs.put(b"orphan", "x")
    assert blobs.read(digest) == b"orphan"


def test_tmp_is_emptied_but_recent_parts_stay(blobs: Blobs) -> None:
    tmp = blobs.root / "tmp"
    (tmp / "ingest-x").mkdir()
    (tmp / "ingest-x" / "data").write_bytes(b"litter")
    (tmp / "blob-y").write_bytes(b"litter")
    (tmp / "partial-new").write_bytes(b"keep")
    (tmp / "partial-old").write_bytes(b"old")
    os.utime(tmp / "partial-old", (1, 1))
    assert empty_tmp(blobs.root) == ["tmp/blob-y", "tmp/ingest-x", "tmp/partial-old"]
    assert tmp_files(blobs) == ["partial-new"]


def test_a_row_whose_file_is_gone_is_reported_and_repaired_by_a_new_put(blobs: Blobs) -> None:
    digest = blobs.put(b"lost", "x")
    blobs.path(digest).unlink()
    assert not blobs.has(digest)
    with pytest.raises(NotFound):
        blobs.read(digest)
    assert check(blobs.root, blobs.meta) == [f"blob {digest[7:]}: its file is missing"]
    blobs.put(b"lost", "x")
    assert blobs.read(digest) == b"lost"
