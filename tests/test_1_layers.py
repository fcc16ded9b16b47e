"""Ingest: one pass, verified, deduplicated, bounded in memory, and nothing left behind when it fails."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from engine import host, hostmounts
from engine.errors import Busy, Damaged, InvalidArgument, NoSpace, NotFound, TooLarge
from engine.store.blobs import Blobs
from engine.store.bodies import Sieve
from engine.store.check import check, empty_tmp, remove_strays
from engine.store.index import Entry, IndexWriter, Kind, read_index
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.pipeline import FEED, gathered
from engine.store.tar import Limits
from engine.store.trees import Trees

TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    meta = Meta(tmp_path / "db.sqlite")
    store = Layers(tmp_path, meta)
    yield store
    assert check(tmp_path, meta, deep=True) == []
    assert [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("partial-")] == []
    meta.close()


def body(layers: Layers, entry: Entry) -> bytes:
    with open(layers.data_path(entry.data), "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


def contents(layers: Layers, diff_id: str) -> dict[str, bytes]:
    return {entry.path.decode(): body(layers, entry) if entry.sha256 else b"" for entry in layers.entries(diff_id)}


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.ZstdCompressor().compress, bytes], ids=["gzip", "zstd", "none"]
)
def test_a_layer_is_verified_and_readable(layers: Layers, pack: object) -> None:
    files = {"a": b"alpha", "d/b": os.urandom(10_000), "big": os.urandom(6 << 20), "empty": b"", "again": b"alpha"}
    plain = archive(files)
    packed = pack(plain)  # type: ignore[operator]
    seen: list[int] = []
    info = layers.ingest(
        (packed[at : at + 100_000] for at in range(0, len(packed), 100_000)),
        TYPE,
        diff_id=sha(plain),
        digest=sha(packed),
        size=len(packed),
        progress=seen.append,
    )
    assert info.diff_id == sha(plain) and info.tar_size == len(plain) and info.entries == 5
    assert info.size == sum(map(len, files.values()))
    assert info.data_size == sum(-(-len(data) // 4096) * 4096 for data in (b"alpha", files["d/b"], files["big"]))
    assert contents(layers, info.diff_id) == files
    assert seen[-1] == len(packed) and seen == sorted(seen)
    assert layers.has(info.diff_id) and layers.info(info.diff_id) == info and layers.all() == [info]
    (row,) = layers.meta.query("SELECT * FROM layer_blobs")
    assert (row["digest"], row["diff_id"], row["size"]) == (sha(packed), info.diff_id, len(packed))


def test_bodies_are_stored_once_within_and_across_layers(layers: Layers) -> None:
    shared, large = os.urandom(5000), os.urandom(5 << 20)
    first = layers.ingest([archive({"x": shared, "copy": shared, "large": large, "large2": large})], TYPE)
    assert first.data_size == 8192 + (5 << 20)
    second = layers.ingest([archive({"y": shared, "own": b"own", "l": large, "z": b"after"})], TYPE)
    assert second.data_size == 8192
    assert contents(layers, second.diff_id) == {"y": shared, "own": b"own", "l": large, "z": b"after"}
    assert layers.deps(second.diff_id) == [first.diff_id]
    third = layers.ingest([archive({"t": shared})], TYPE)
    assert third.data_size == 0 and layers.deps(third.diff_id) == [first.diff_id]
    with pytest.raises(Busy):
        layers.remove(first.diff_id)
    layers.remove(second.diff_id)
    with pytest.raises(Busy):
        layers.remove(first.diff_id)
    assert contents(layers, third.diff_id) == {"t": shared}
    layers.remove(third.diff_id)
    assert layers.remove(first.diff_id) == first.data_size
    assert layers.all() == [] and layers.meta.query("SELECT * FROM bodies") == []
    with pytest.raises(NotFound):
        layers.remove(first.diff_id)
    again = layers.ingest([archive({"t": shared})], TYPE)  # the body must be found nowhere now
    assert again.data_size == 8192 and contents(layers, again.diff_id) == {"t": shared}


def test_a_layer_in_a_tree_cannot_go_and_takes_its_own_tree_along(layers: Layers) -> None:
    trees = Trees(layers.root, layers.meta, layers)
    a = layers.ingest([archive({"a": b"1"})], TYPE).diff_id
    b = layers.ingest([archive({"b": b"2"})], TYPE).diff_id
    both, alone = trees.build([a, b]), trees.build([a])
    with pytest.raises(Busy):
        layers.remove(a)
    trees.remove(both)
    layers.remove(a)
    assert not trees.has(alone) and not trees.directory(alone).exists()


def test_dedup_memory_is_bounded_and_still_right(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.store.bodies.MAX_SEEN", 2)
    files = {f"{number}-{copy}": b"%d" % number * 1000 for copy in range(2) for number in range(6)}
    first = layers.ingest([archive(files)], TYPE)
    assert contents(layers, first.diff_id) == files and first.data_size == (6 + 4) * 4096
    second = layers.ingest([archive({**files, "more": b"more"})], TYPE)
    assert contents(layers, second.diff_id) == {**files, "more": b"more"} and second.data_size == 4096


def test_verify_finds_rot(layers: Layers) -> None:
    info = layers.ingest([archive({"a": b"x" * 5000, "b": b"y" * 5000, "c": b"x" * 5000})], TYPE)
    seen: list[int] = []
    layers.verify(info.diff_id, seen.append)
    assert seen == [5000, 10_000]
    path = layers.data_path(info.diff_id)
    good = path.read_bytes()
    path.write_bytes(good[:8192] + b"Y" + good[8193:])
    with pytest.raises(Damaged, match="content of b"):
        layers.verify(info.diff_id)
    path.write_bytes(good)


def test_the_same_layer_twice_is_one(layers: Layers) -> None:
    plain = archive({"a": b"x" * 10_000})
    first = layers.ingest([plain], TYPE)
    assert layers.ingest([gzip.compress(plain)], TYPE) == first
    assert layers.meta.row("SELECT COUNT(*) FROM layer_blobs")[0] == 2  # type: ignore[index]


def test_keep_stores_the_blob_and_resumes(layers: Layers) -> None:
    blobs = Blobs(layers.root, layers.meta)
    plain = archive({"a": os.urandom(400_000)})
    packed = gzip.compress(plain)

    def dropped() -> Iterator[bytes]:
        yield packed[:150_000]
        raise ConnectionError

    with pytest.raises(ConnectionError), blobs.writer(TYPE, sha(packed), len(packed)) as keep:
        layers.ingest(dropped(), TYPE, digest=sha(packed), keep=keep)
    assert layers.all() == []
    with blobs.writer(TYPE, sha(packed), len(packed)) as keep:
        assert keep.offset == 150_000

        def resumed() -> Iterator[bytes]:
            yield from keep.replay()
            yield packed[150_000:]

        info = layers.ingest(resumed(), TYPE, digest=sha(packed), size=len(packed), diff_id=sha(plain), keep=keep)
    assert blobs.read(sha(packed)) == packed and layers.has(info.diff_id)


PLAIN = archive({"f": random.Random(3).randbytes(300_000), "g": b"tail"})
PACKED = gzip.compress(PLAIN)
WRONG = {
    "digest": ({"digest": sha(b"other")}, PACKED),
    "diff_id": ({"diff_id": sha(b"other")}, PACKED),
    "size too small": ({"size": len(PACKED) - 1}, PACKED),
    "size too large": ({"size": len(PACKED) + 1}, PACKED),
    "truncated gzip": ({}, PACKED[:-100]),
    "gzip cut in its trailer": ({}, PACKED[:-3]),
    "truncated tar": ({}, PLAIN[:200_000]),
    "flipped byte": ({}, PACKED[:100_000] + bytes([PACKED[100_000] ^ 255]) + PACKED[100_001:]),
    "not a tar": ({}, os.urandom(5000)),
    "html": ({}, b"<html>not found</html>" * 100),
    "junk after gzip": ({}, PACKED + b"junk"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_does_not_match_leaves_nothing(layers: Layers, case: str) -> None:
    options, data = WRONG[case]
    with pytest.raises(Damaged) as caught:
        layers.ingest((data[at : at + 9999] for at in range(0, len(data), 9999)), TYPE, **options)  # type: ignore[arg-type]
    assert caught.value.reason
    assert layers.all() == [] and list((layers.root / "layers" / "sha256").iterdir()) == []
    assert layers.meta.query("SELECT * FROM bodies") == []


def test_malformed_expectations_are_refused(layers: Layers) -> None:
    with pytest.raises(InvalidArgument):
        layers.ingest([PACKED], TYPE, digest="sha256:zz")


def test_an_error_of_the_source_passes_through_and_threads_end(layers: Layers) -> None:
    def source() -> Iterator[bytes]:
        yield PACKED[:50_000]
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        layers.ingest(source(), TYPE)
    assert threading.active_count() == before


def test_bounds(tmp_path: Path) -> None:
    meta = Meta(tmp_path / "db.sqlite")
    for limits in (Limits(tar_size=100_000), Limits(entries=1), Limits(file_size=1000)):
        with pytest.raises(TooLarge):
            Layers(tmp_path, meta, limits).ingest([PACKED], TYPE)
    assert check(tmp_path, meta) == []
    meta.close()


def test_a_bomb_is_refused_early(tmp_path: Path) -> None:
    meta = Meta(tmp_path / "db.sqlite")
    layers = Layers(tmp_path, meta, Limits(tar_size=32 << 20))
    head = tarfile.TarInfo("bomb")
    head.size = 1 << 33
    pack = zstandard.ZstdCompressor().compressobj()
    bomb = pack.compress(head.tobuf(tarfile.GNU_FORMAT)) + b"".join(pack.compress(bytes(1 << 20)) for _ in range(256))
    with pytest.raises((TooLarge, NoSpace)):
        layers.ingest([bomb + pack.flush()], TYPE)
    assert check(tmp_path, meta) == []
    meta.close()


def test_a_full_disk_is_no_space_and_leaves_nothing(tmp_path: Path) -> None:
    if not (host.LINUX and host.is_root()):
        pytest.skip("a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    hostmounts.mount("tmpfs", disk, "tmpfs", 0, "size=16m")
    try:
        meta = Meta(disk / "db.sqlite")
        layers = Layers(disk, meta)
        for files in ({"one": os.urandom(30 << 20)}, {f"f{n}": os.urandom(1 << 20) for n in range(30)}):
            with pytest.raises(NoSpace):
                layers.ingest([archive(files)], TYPE)
            assert list((disk / "tmp").iterdir()) == [] and layers.all() == []
        blobs = Blobs(disk, meta)
        with pytest.raises(NoSpace), blobs.writer(TYPE) as writer:
            writer.write(os.urandom(30 << 20))
        assert list((disk / "tmp").iterdir()) == []
        small = layers.ingest([archive({"ok": b"fits"})], TYPE)
        assert contents(layers, small.diff_id) == {"ok": b"fits"}
        meta.close()
    finally:
        hostmounts.unmount(disk)


def test_parallel_ingests_share_bodies(layers: Layers) -> None:
    common = {f"c{n}": random.Random(n).randbytes(3000) for n in range(50)}
    archives = [archive({**common, f"own{n}": f"{n}".encode()}) for n in range(4)] * 2
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda data=data: results.append(layers.ingest([data], TYPE).diff_id))
        for data in archives
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(sha(data) for data in archives) and len(layers.all()) == 4
    for number in range(4):
        assert contents(layers, sha(archives[number])) == {**common, f"own{number}": f"{number}".encode()}


KILLED = """
import sys, time
from pathlib import Path
from engine.store.meta import Meta
from engine.store.bodies import Sieve
from engine.store.layers import Layers
root = Path(sys.argv[1])
data = Path(sys.argv[2]).read_bytes()
layers = Layers(root, Meta(root / "db.sqlite"))
def slowly():
    for at in range(0, len(data), 1 << 16):
        yield data[at : at + (1 << 16)]
        print(at, flush=True)
        time.sleep(0.002)
layers.ingest(slowly(), "x")
print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("lines", [1, 20, 70, 1000])
def test_kill_9_in_the_middle_leaves_only_litter(layers: Layers, tmp_path: Path, lines: int) -> None:
    kept = layers.ingest([archive({"kept": b"kept"})], TYPE)
    source = tmp_path / "source.tar"
    source.write_bytes(archive({f"f{n}": random.Random(n).randbytes(50_000) for n in range(100)}))
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, source], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(lines):
        if child.stdout.readline() == "done\n":
            break
    time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    empty_tmp(tmp_path)
    remove_strays(tmp_path, layers.meta)
    assert check(tmp_path, layers.meta, deep=True) == []
    assert contents(layers, kept.diff_id) == {"kept": b"kept"}
    info = layers.ingest([source.read_bytes()], TYPE)
    assert info.entries == 100


def test_a_directory_without_a_row_is_replaced(layers: Layers) -> None:
    orphan = layers.directory(sha(PLAIN))
    orphan.mkdir()
    (orphan / "data").write_bytes(b"half")
    assert not layers.has(sha(PLAIN))
    layers.ingest([PACKED], TYPE)
    assert len(contents(layers, sha(PLAIN))["f"]) == 300_000


MEMORY = """
import resource, sys, tarfile
from pathlib import Path
from engine.store.meta import Meta
from engine.store.bodies import Sieve
from engine.store.layers import Layers
import zstandard
root, gibibytes = Path(sys.argv[1]), int(sys.argv[2])
pack = zstandard.ZstdCompressor(level=1).compressobj()
pattern = bytes(range(256)) * 4096
def stream():
    for number in range(2):  # half of it in one file, the rest in small ones
        if number == 0:
            info = tarfile.TarInfo("big")
            info.size = gibibytes << 29
            yield pack.compress(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(gibibytes << 9):
                yield pack.compress(pattern)
        else:
            for n in range(gibibytes << 9):
                info = tarfile.TarInfo(f"dir/{n:06}")
                info.size = 1 << 20
                yield pack.compress(info.tobuf(tarfile.GNU_FORMAT) + n.to_bytes(8, "big") + pattern[8:])
    yield pack.compress(bytes(1024)) + pack.flush()
layers = Layers(root, Meta(root / "db.sqlite"))
info = layers.ingest((chunk for chunk in stream() if chunk), "x")
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss starts at the parent's size on Linux
    peak = int(status.read_text().split("VmHWM:")[1].split()[0])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(peak, info.tar_size >> 20, info.entries)
"""


def test_memory_is_bounded_whatever_the_layer(tmp_path: Path) -> None:
    gibibytes = 2 if os.environ.get("DUTCHMAN_SLOW_TESTS") else 1
    out = subprocess.check_output([sys.executable, "-c", MEMORY, tmp_path, str(gibibytes)], text=True)
    peak, mebibytes, entries = map(int, out.split())
    assert mebibytes >= gibibytes << 10 and entries == (gibibytes << 9) + 1
    assert peak < 200 << 10, f"peak RSS {peak} KiB"


def test_the_index_round_trips_and_damage_is_found(tmp_path: Path) -> None:
    own, other = sha(b"own"), sha(b"other")
    rows = [
        Entry(b"", Kind.DIRECTORY, 0o755, 1, 2, -5),
        Entry(
            b"f",
            Kind.FILE,
            0o6755,
            2**32 - 1,
            0,
            2**62,
            2**40,
            0,
            b"",
            bytes(32),
            "",
            4096,
            {b"user.a": b"\0" * 60_000},
        ),
        Entry(b"g", Kind.FILE, 0, 0, 0, 1, 9, 0, b"", b"x" * 32, other, 8192),
        Entry(b"l" * 4000, Kind.SYMLINK, linkname=b"t" * 4000),
        Entry(b"w", Kind.WHITEOUT),
        Entry(b"d", Kind.OPAQUE),
        *(Entry(b"n%d" % n, Kind.CHAR, rdev=n) for n in range(6_000)),
    ]
    path = tmp_path / "index"
    with IndexWriter(path) as index:
        for row in rows:
            index.add(row)
        index.finish()
        assert index.deps() == [other]
    rows[1].data = own
    assert list(read_index(path, own)) == rows
    data = path.read_bytes()
    rng = random.Random(5)
    for _ in range(100):
        broken = bytearray(data)
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(broken))]
        else:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(Damaged):
            list(read_index(path, own))
    path.write_bytes(data + b"x")
    with pytest.raises(Damaged):
        list(read_index(path, own))


def test_the_sieve_never_denies_a_body_that_is_there(tmp_path: Path) -> None:
    meta = Meta(tmp_path / "db.sqlite")
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
    with meta.tx() as tx:
        tx.executemany("INSERT INTO bodies VALUES (?, 1, 0, 1)", [(digest,) for digest in digests[:1000]])
    sieve = Sieve(meta.path)
    assert sieve.may_have(digests[3999])  # nothing is known yet: all must be asked for
    sieve.ready()
    for digest in digests[1000:2000]:
        sieve.add(digest)
    assert all(map(sieve.may_have, digests[:2000]))
    assert sum(map(sieve.may_have, digests[2000:])) < 5
    sieve.MOST = 1999
    assert all(map(sieve.may_have, digests)), "fuller than it can be of use: all are asked for"


def test_a_failed_ingest_leaves_its_turn_to_the_next(layers: Layers) -> None:
    """Also while its error, whose traceback holds everything it had, is still around."""
    good = archive({"a": bytes(5000)})
    with pytest.raises(Damaged) as caught:
        layers.ingest([good[:512] + b"\1" * 5120, b"\1" * (4 << 20)], "")
    taken: list[str] = []
    other = threading.Thread(target=lambda: taken.append(layers.ingest([good], "").diff_id), daemon=True)
    other.start()
    other.join(60)
    assert taken == ["sha256:" + hashlib.sha256(good).hexdigest()], caught.value


def test_small_pieces_are_gathered_and_what_came_before_a_failure_is_handed_on() -> None:
    def broken() -> Iterator[bytes]:
        yield from (b"a" * 1000, b"b" * FEED, b"c", b"d")
        raise NotFound("gone")

    out: list[bytes] = []
    with pytest.raises(NotFound, match="gone"):
        out.extend(gathered(broken()))
    assert b"".join(out) == b"a" * 1000 + b"b" * FEED + b"cd" and out[-1] == b"cd"
    assert [len(piece) for piece in gathered([bytes(3 * FEED + 1)])] == [FEED, FEED, FEED, 1]
    assert len(list(gathered([b"x"] * 100))) < 100
