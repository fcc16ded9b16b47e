"""Hostile archives through the engine's own `load` and `import`: applied as Docker does or refused with the reason.

Nothing outside the store may change, the store stays sound, and what a small archive makes the engine take of memory,
disk and time is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import bombs
import pytest
from ociimages import make_docker_archive

from engine.engine import Engine
from engine.errors import EngineError, NotFound
from engine.images.archive import import_rootfs, load
from engine.images.manifests import parse, parse_config
from engine.store.check import check

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
SLOW_TESTS = bool(os.environ.get("DUTCHMAN_SLOW_TESTS"))  # for gigabytes of holes and millions of entries
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")


def archives(*folders: str) -> list[str]:
    """Every file of the folders but what explains them."""
    return sorted(
        str(path.relative_to(FIXTURES))
        for folder in folders
        for path in FIXTURES.joinpath(folder).rglob("*")
        if path.is_file() and path.suffix not in (".txt", ".md", ".go")
    )


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything below a directory: kind and mode, owner, time, content."""
    out = {}
    for path in (root, *root.rglob("*")):
        st = path.lstat()
        body = (
            path.read_bytes()
            if stat.S_ISREG(st.st_mode)
            else os.fsencode(os.readlink(path))
            if path.is_symlink()
            else b""
        )
        out[str(path)] = (st.st_mode, st.st_uid, st.st_mtime_ns, body)
    return out


class Place:
    """A store in the middle of things that must not change."""

    def __init__(self, base: Path) -> None:
        self.around = base / "around"
        for name in ("etc", "tmp", "victim", "root"):
            (self.around / name).mkdir(parents=True)
            (self.around / name / "passwd").write_text("do not touch\n")
        (self.around / "etc" / "link").symlink_to("../victim")
        self.store = base / "around-store" / "store"
        self.store.parent.mkdir()
        self.engine = Engine(self.store, runtime="fake")
        self.before = snapshot(self.around)

    def unchanged(self) -> None:
        assert snapshot(self.around) == self.before
        assert sorted(os.listdir(self.store.parent)) == ["store"]
        left = [name for name in os.listdir(self.store / "tmp") if not name.startswith("partial-")]
        assert left == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("hostile"))
    with place.engine as engine:
        yield place
        assert check(engine.store, engine.meta, deep=True) == []


def reason(error: EngineError) -> str:
    assert error.reason and "\n" not in error.reason and len(error.reason) < 500
    return error.reason


@needs_fixtures
@pytest.mark.parametrize("name", [name for name in archives("layers", "tar") if SLOW_TESTS or "many-zeros" not in name])
def test_every_archive_as_a_root_filesystem_and_as_an_image(place: Place, name: str) -> None:
    path = FIXTURES / name
    for attempt in ("import", "load"):
        try:
            if attempt == "import":
                images = [import_rootfs(place.engine.images, path, "hostile:1")]
            else:
                images = load(place.engine.images, path)
            for image in images:
                tree = place.engine.trees.open(image.chain_id)
                for _, nid in tree.walk():
                    tree.stat(nid)
                if image.size < 64 << 20:  # archives of holes stand for gigabytes
                    place.engine.images.verify(image.digest)
        except EngineError as error:
            reason(error)
    place.unchanged()


def contents(engine: Engine, chain: str) -> dict[str, tuple[str, bytes]]:
    tree = engine.trees.open(chain)
    out = {}
    for path, nid in tree.walk():
        st = tree.stat(nid)
        kind = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}.get(stat.S_IFMT(st.mode), "special")
        body = tree.pread(nid, st.size, 0) if kind == "file" else tree.readlink(nid) if kind == "link" else b""
        out[path.decode()] = (kind, body)
    return out


def expected(path: Path) -> dict[str, tuple[str, bytes]]:
    """What a recorded result holds; a hardlink has the content of its target."""
    out: dict[str, tuple[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            if name in (".", "/"):
                continue
            if member.isdir():
                out[name] = ("dir", b"")
            elif member.issym():
                out[name] = ("link", os.fsencode(member.linkname))
            elif member.islnk():
                out[name] = out[os.path.normpath(member.linkname)]
            else:
                content = tar.extractfile(member)
                out[name] = ("file", content.read() if content else b"")
    return out


@needs_fixtures
@pytest.mark.parametrize("layer", [name for name in archives("layers/containerd-breakouts") if ".layer." in name])
def test_breakouts_of_an_image_end_as_containerd_ends_them(place: Place, layer: str, tmp_path: Path) -> None:
    path = FIXTURES / layer
    tars = [path.with_name(path.name.replace(".layer.", ".base.")), path]
    make_docker_archive(tmp_path / "image.tar", [tar.read_bytes() for tar in tars], tags=["breakout:1"])
    result = path.with_name(path.name.replace(".layer.", ".result."))
    if result.exists():
        (image,) = load(place.engine.images, tmp_path / "image.tar")
        assert contents(place.engine, image.chain_id) == expected(result)
    else:
        with pytest.raises(EngineError) as caught:
            load(place.engine.images, tmp_path / "image.tar")
        reason(caught.value)
    place.unchanged()


@needs_fixtures
@pytest.mark.parametrize(
    "name", sorted({name.split("/")[2] for name in archives("oci-layouts") if name.count("/") > 2})
)
def test_layouts(place: Place, name: str) -> None:
    for path in sorted((FIXTURES / "oci-layouts").rglob("index.json")):
        if name in path.parts:
            try:
                assert load(place.engine.images, path.parent)
            except EngineError as error:
                reason(error)
    place.unchanged()


@needs_fixtures
@pytest.mark.parametrize("name", archives("manifests"))
def test_manifests_in_a_layout(place: Place, name: str, tmp_path: Path) -> None:
    """Each as the only entry of a layout without the blobs it names: refused, never a crash."""
    raw = (FIXTURES / name).read_bytes()
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    digest = hashlib.sha256(raw).hexdigest()
    (blobs / digest).write_bytes(raw)
    try:
        kind = json.loads(raw).get("mediaType") or "application/vnd.oci.image.manifest.v1+json"
    except (ValueError, AttributeError):
        kind = "application/vnd.oci.image.manifest.v1+json"
    index = {"schemaVersion": 2, "manifests": [{"mediaType": kind, "digest": f"sha256:{digest}", "size": len(raw)}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    with pytest.raises(EngineError) as caught:
        load(place.engine.images, tmp_path)
    reason(caught.value)
    place.unchanged()


@pytest.mark.parametrize("raw", [
    b"[" * 100_000, b'{"a":' * 100_000, b'{"schemaVersion":2,"layers":[' + b"{}," * 200_000 + b"{}]}",
    b'{"schemaVersion":2,"annotations":{' + b",".join(b'"%d":"x"' % n for n in range(100_000)) + b"}}",
    b"9" * 100_000,
    b'{"schemaVersion":' + b"9" * 5000 + b"}", b'"\\ud800"', b"\xff\xfe", b"",
    b'{"schemaVersion":1e999}', b'{"schemaVersion":2,"schemaVersion":1}', b"null", b"{}", b" " * (5 << 20),
])  # fmt: skip
def test_manifests_no_one_should_write(raw: bytes) -> None:
    for call in (parse, parse_config):
        try:
            call(raw)
        except EngineError as error:
            reason(error)


# --- bombs: each in a process of its own, which reports its peak ------------------------------------------------

RUN = """
import json, resource, sys, time
from pathlib import Path
from engine.engine import Engine
from engine.errors import EngineError
from engine.images.archive import import_rootfs
store, archive = Path(sys.argv[1]), Path(sys.argv[2])
start, answer = time.process_time(), ""
with Engine(store, runtime="fake") as engine:
    try:
        import_rootfs(engine.images, archive, "bomb:1")
    except EngineError as error:
        answer = f"{type(error).__name__}: {error.reason}"
    seconds = time.process_time() - start  # of CPU: the machine may be busy with others
    layers = len(engine.layers.all())
status = Path("/proc/self/status")
peak = int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0
print(json.dumps({"answer": answer, "peak": peak, "seconds": seconds, "layers": layers}))
"""


def blow(tmp_path: Path, archive: Path) -> tuple[str, int, int, float]:
    """(refusal or "", peak RSS in MiB, MiB of disk the store takes, seconds of CPU)."""
    store = tmp_path / "store"
    out = subprocess.check_output([sys.executable, "-c", RUN, store, archive], text=True, timeout=110)
    result = json.loads(out)
    if result["answer"]:
        assert result["layers"] == 0, "what was refused stays on disk"
    disk = sum(path.lstat().st_blocks for path in store.rglob("*")) >> 11
    shutil.rmtree(store)
    return result["answer"], result["peak"] >> 10, disk, result["seconds"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_zeros_takes_neither_memory_nor_disk(tmp_path: Path, suffix: str) -> None:
    size = (40 if SLOW_TESTS else 1) << 28
    archive = bombs.write(tmp_path / f"bomb{suffix}", bombs.zeros(size))
    assert archive.stat().st_size < size >> 9
    answer, peak, disk, _ = blow(tmp_path, archive)
    assert answer == "" and peak < 120 and disk < 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_in_a_bomb_is_inflated_once(tmp_path: Path, suffix: str) -> None:
    archive = bombs.write(tmp_path / f"bomb{suffix}", bombs.zeros((4 if SLOW_TESTS else 1) << 28), times=2)
    assert archive.stat().st_size < 100_000
    answer, peak, disk, seconds = blow(tmp_path, archive)
    assert "not a tar archive but bytes" in answer, answer
    assert peak < 120 and disk < 20 and seconds < 10


CASES = {
    "entries": (bombs.entries(40_000), "", 130, 30),
    "deep": (bombs.deep(10), "", 130, 20),
    "ladder": (bombs.ladder(10_000), "resolves to more than 4096 names", 130, 20),
    "links": (bombs.links(3_000), "", 160, 40),
    "xattrs": (bombs.xattrs(3_000), "xattrs in the archive", 160, 20),
    "one xattr": (bombs.one_xattr(1 << 19), "xattr", 100, 20),
    "xattr header": (bombs.one_xattr(1 << 21), "extension header", 100, 20),
    "long name": (bombs.long_name(5000), "path longer", 100, 20),
}


@pytest.mark.parametrize("name", CASES)
def test_small_archives_that_stand_for_much(tmp_path: Path, name: str) -> None:
    pieces, refusal, most, disk_most = CASES[name]
    archive = bombs.write(tmp_path / "bomb.gz", pieces)
    answer, peak, disk, seconds = blow(tmp_path, archive)
    assert refusal in answer and bool(answer) == bool(refusal), answer
    assert peak < most and disk < disk_most and seconds < 20, (peak, disk, seconds)


SLOW = {"entries": bombs.entries(1_000_000), "deep": bombs.deep(2000), "links": bombs.links(200_000)}


if SLOW_TESTS:  # not a skip: what runs on request only is no part of the session

    @pytest.mark.parametrize("name", SLOW)
    def test_memory_has_a_bound_at_any_size(tmp_path: Path, name: str) -> None:
        answer, peak, disk, seconds = blow(tmp_path, bombs.write(tmp_path / "bomb.gz", SLOW[name]))
        assert bool(answer) is (name != "entries"), answer
        assert peak < 450 and disk < 300 and seconds < 60, (peak, disk, seconds)


def test_an_archive_that_is_not_there(place: Place) -> None:
    for call in (
        lambda: load(place.engine.images, "/nonexistent"),
        lambda: import_rootfs(place.engine.images, "/nonexistent", "x:1"),
    ):
        with pytest.raises(NotFound):
            call()
