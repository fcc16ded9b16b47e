"""Layers on top of each other give the tree containerd and umoci left on disk, and the reader is true to it."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.errors import Damaged, EngineError, NotFound, TooLarge
from engine.store.check import check
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Tree, Trees, chain_id

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "layers"


@dataclass
class Store:
    root: Path
    meta: Meta
    layers: Layers
    trees: Trees

    def add(self, data: bytes) -> str:
        return self.layers.ingest([data], "application/vnd.oci.image.layer.v1.tar").diff_id

    def tree(self, *layers: bytes) -> Tree:
        return self.trees.open(self.trees.build([self.add(layer) for layer in layers]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    meta = Meta(tmp_path / "db.sqlite")
    layers = Layers(tmp_path, meta)
    yield Store(tmp_path, meta, layers, Trees(tmp_path, meta, layers))
    assert check(tmp_path, meta, deep=True) == []
    assert not list((tmp_path / "tmp").iterdir())
    meta.close()


def fixture_dir(name: str) -> Path:
    path = FIXTURES / name
    if not path.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"fixtures are missing: {path}")
        pytest.skip(f"fixtures are missing: {path}")
    return path


def archive(*members: tuple[str, str, object], **common: object) -> bytes:
    """A pax archive of (name, kind, content-or-target) members; kind is one of f d l h c."""
    out = io.BytesIO()
    kinds = {
        "f": tarfile.REGTYPE,
        "d": tarfile.DIRTYPE,
        "l": tarfile.SYMTYPE,
        "h": tarfile.LNKTYPE,
        "c": tarfile.CHRTYPE,
    }
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type = kinds[kind]
            info.mode = 0o755 if kind == "d" else 0o644
            for key, item in common.items():
                setattr(info, key, item)
            body = None
            if kind == "f":
                assert isinstance(value, bytes)
                info.size, body = len(value), io.BytesIO(value)
            elif kind in "lh":
                info.linkname = str(value)
            elif kind == "c":
                assert isinstance(value, tuple)
                info.devmajor, info.devminor = value
            tar.addfile(info, body)
    return out.getvalue()


def listing(tree: Tree) -> dict[str, tuple[object, ...]]:
    """path -> (type, permissions, content, inode group) of a tree, comparable with `expected`."""
    out: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for path, nid in sorted(tree.walk()):
        st = tree.stat(nid)
        name = os.fsdecode(path)
        kind = stat.S_IFMT(st.mode)
        content: object = None
        if kind == stat.S_IFREG:
            content = tree.pread(nid, st.size + 1, 0)
        elif kind == stat.S_IFLNK:
            content = os.fsdecode(tree.readlink(nid))
        mode = 0o777 if kind == stat.S_IFLNK else st.mode & 0o7777
        group = None if kind == stat.S_IFDIR else first.setdefault(nid, name)
        out[name] = (kind, mode, content, group)
    return out


def expected(path: Path) -> dict[str, tuple[object, ...]]:
    raw: dict[str, tuple[object, ...]] = {}
    alias: dict[str, str] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            if name == ".":
                continue
            if member.islnk():
                alias[name] = os.path.normpath(member.linkname)
                continue
            kind = stat.S_IFDIR if member.isdir() else stat.S_IFLNK if member.issym() else stat.S_IFREG
            file = tar.extractfile(member) if member.isreg() else None
            content = member.linkname if member.issym() else file.read() if file else None
            raw[name] = (kind, 0o777 if member.issym() else member.mode & 0o7777, content)
    names: dict[str, list[str]] = {name: [name] for name in raw}
    for name, target in alias.items():
        names[target].append(name)
    out: dict[str, tuple[object, ...]] = {}
    for target, group in names.items():
        for name in group:
            out[name] = (*raw[target], None if raw[target][0] == stat.S_IFDIR else min(group))
    return out


def breakouts() -> list[str]:
    path = FIXTURES / "containerd-breakouts"
    return sorted(file.name.removesuffix(".layer.tar") for file in path.glob("*.layer.tar")) or ["missing"]


@pytest.mark.parametrize("case", breakouts())
def test_layer_applies_as_containerd_did_or_is_refused(store: Store, case: str) -> None:
    path = fixture_dir("containerd-breakouts")
    base, layer = ((path / f"{case}.{part}.tar").read_bytes() for part in ("base", "layer"))
    result = path / f"{case}.result.tar"
    if not result.exists():
        with pytest.raises(Damaged):
            store.tree(base, layer)
        return
    assert listing(store.tree(base, layer)) == expected(result)


def opaque_cases() -> list[str]:
    path = FIXTURES / "umoci-opaque"
    return sorted(file.name.removesuffix(".lower.tar") for file in path.glob("*.lower.tar")) or ["missing"]


@pytest.mark.parametrize("case", opaque_cases())
def test_opaque_directories_as_umoci_left_them(store: Store, case: str) -> None:
    path = fixture_dir("umoci-opaque")
    lower, upper = ((path / f"{case}.{part}.tar").read_bytes() for part in ("lower", "upper"))
    assert listing(store.tree(lower, upper)) == expected(path / f"{case}.result.tar")


def test_every_other_layer_fixture_is_stored_or_refused(store: Store) -> None:
    fixture_dir("moby-tarsum")
    seen = 0
    for path in sorted(FIXTURES.rglob("*")):
        if path.is_file() and path.suffix in (".tar", ".zst", ".gz", ".bz2", ".xz"):
            try:
                store.tree(path.read_bytes())
            except EngineError as error:
                assert error.reason
            seen += 1
    assert seen > 60


def test_whiteouts_hide_only_what_is_below_in_any_order(store: Store) -> None:
    lower = archive(("a", "f", b"low"), ("d", "d", None), ("d/x", "f", b"low"), ("d/y", "f", b"low"))
    upper = archive(
        ("d/new", "f", b"up"),
        ("d/.wh..wh..opq", "f", b""),
        ("a", "f", b"up"),
        (".wh.a", "f", b""),
        (".wh.none", "f", b""),
    )
    tree = store.tree(lower, upper)
    assert {name: row[2] for name, row in listing(tree).items()} == {"a": b"up", "d": None, "d/new": b"up"}
    assert store.layers.deleted(store.add(upper)) == [b"a", b"d/*", b"none"]


def test_whiteout_removes_a_hardlinks_lower_name_only(store: Store) -> None:
    lower = archive(("a", "f", b"body"))
    upper = archive(("b", "h", "a"), (".wh.a", "f", b""))
    assert {name: row[2] for name, row in listing(store.tree(lower, upper)).items()} == {"b": b"body"}


def test_aufs_metadata_is_dropped(store: Store) -> None:
    layer = archive(
        (".wh..wh.plnk", "d", None), (".wh..wh.plnk/1", "f", b"x"), ("d/.wh..wh.aufs", "f", b"x"), ("k", "f", b"x")
    )
    assert sorted(listing(store.tree(layer))) == ["k"]


def test_kinds_replace_each_other(store: Store) -> None:
    lower = archive(("a", "d", None), ("a/x", "f", b"1"), ("b", "f", b"1"), ("c", "l", "a"), ("e", "c", (1, 3)))
    upper = archive(("a", "f", b"2"), ("b", "d", None), ("b/y", "f", b"2"), ("c", "d", None), ("e", "l", "b"))
    rows = listing(store.tree(lower, upper))
    assert {name: (row[0], row[2]) for name, row in rows.items()} == {
        "a": (stat.S_IFREG, b"2"),
        "b": (stat.S_IFDIR, None),
        "b/y": (stat.S_IFREG, b"2"),
        "c": (stat.S_IFDIR, None),
        "e": (stat.S_IFLNK, "b"),
    }


@pytest.mark.parametrize(
    "layer",
    [
        archive(("h", "h", "missing")),
        archive(("d", "d", None), ("h", "h", "d")),
        archive(("f", "f", b""), ("f/x", "f", b"")),
        archive(("f", "f", b"x"), ("f", "h", "f")),
        archive(("l", "l", "l"), ("l/x", "f", b"")),
    ],
    ids=["hardlink to nothing", "hardlink to a directory", "below a file", "hardlink to itself", "symlink loop"],
)
def test_what_containerd_refuses_is_damaged(store: Store, layer: bytes) -> None:
    with pytest.raises(Damaged):
        store.tree(layer)


def test_a_merge_has_a_bounded_number_of_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opaque markers over a full directory, and symlinks through symlinks, would otherwise be quadratic."""
    monkeypatch.setattr("engine.store.merge.MAX_STEPS", 5000)
    files = tuple((f"d/{number}", "f", b"") for number in range(200))
    with pytest.raises(TooLarge):
        store.tree(archive(*files, *((("d/.wh..wh..opq", "f", b""),) * 50)))
    links = tuple((f"l{number}", "l", f"l{number - 1}") for number in range(1, 200))
    with pytest.raises(TooLarge):
        store.tree(
            archive(
                ("l0", "d", None),
                *links,
                *((f"l199/{n}", "f", b"") if n % 2 else ("x", "l", str(n)) for n in range(200)),
            )
        )
    assert len(listing(store.tree(archive(*files)))) == 201


def test_chain_ids_follow_the_specification() -> None:
    a, b = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    assert chain_id([a]) == a
    assert chain_id([a, b]) == "sha256:" + __import__("hashlib").sha256(f"{a} {b}".encode()).hexdigest()
    assert chain_id([a, b]) != chain_id([b, a])


def test_times_before_1970_become_zero_as_in_docker(store: Store) -> None:
    tree = store.tree(archive(("f", "f", b"x"), mtime=-1.5), archive(("g", "f", b"x"), mtime=1.25))
    assert tree.stat(tree.lookup(b"f")).mtime_ns == 0
    assert tree.stat(tree.lookup(b"g")).mtime_ns == 1_250_000_000


def test_building_is_idempotent_and_deterministic(store: Store, tmp_path: Path) -> None:
    layers = [archive(("a", "f", b"1"), ("d/x", "f", b"2"), ("h", "h", "a")), archive(("d/.wh.x", "f", b""))]
    ids = [store.add(layer) for layer in layers]
    chain = store.trees.build(ids)
    assert store.trees.build(ids) == chain
    again = tmp_path / "again"
    again.mkdir()
    meta = Meta(again / "db.sqlite")
    other = Store(again, meta, Layers(again, meta), None)  # type: ignore[arg-type]
    other.trees = Trees(again, meta, other.layers)
    for layer in layers:
        other.add(layer)
    assert other.trees.build(ids) == chain
    for name in ("erofs", "prov"):
        assert (store.trees.directory(chain) / name).read_bytes() == (other.trees.directory(chain) / name).read_bytes()
    meta.close()


def test_a_missing_layer_or_tree_is_not_found(store: Store) -> None:
    nowhere = "sha256:" + "0" * 64
    with pytest.raises(NotFound):
        store.trees.build([nowhere])
    with pytest.raises(NotFound):
        store.trees.open(nowhere)


def test_lookup_in_directories_of_every_size(store: Store) -> None:
    for count in (0, 1, 2, 90, 91, 92, 400, 5000):
        names = [f"n{number:05}" + "x" * (number % 37) for number in range(count)]
        tree = store.tree(archive(("d", "d", None), *((f"d/{name}", "f", b"") for name in names)))
        directory = tree.lookup(b"d")
        rows = tree.readdir(directory)
        assert [name for name, _, _ in rows] == sorted(name.encode() for name in names)
        for name, nid, kind in rows:
            assert kind == stat.S_IFREG
            assert tree.child(directory, name) == nid == tree.lookup(b"/d/" + name)
        for absent in (b"", b".", b"..", b"a", b"n", b"n00001", b"zzz", b"n00002\0"):
            if absent not in [row[0] for row in rows]:
                with pytest.raises(KeyError):
                    tree.child(directory, absent)
    with pytest.raises(KeyError):
        tree.lookup(b"d/none/more")


def test_directory_blocks_that_fill_exactly(store: Store) -> None:
    """Entries of 12 bytes and a name: sizes around one and two whole blocks, where the tail is empty."""
    for total in range(4090, 4100):
        used = 12 + 1 + 12 + 2  # . and ..
        names = []
        while total - used > 260:
            names.append(f"{len(names):03}" + "y" * 85)
            used += 100
        if total - used > 15:
            names.append("z" * (total - used - 12))
        tree = store.tree(archive(("d", "d", None), *((f"d/{name}", "f", b"") for name in names)))
        directory = tree.lookup(b"d")
        assert [row[0] for row in tree.readdir(directory)] == sorted(name.encode() for name in names)
        for name in names:
            tree.child(directory, name.encode())


def test_provenance_names_layer_and_body(store: Store) -> None:
    import hashlib

    first, second = archive(("a", "f", b"one"), ("d", "d", None)), archive(("b", "f", b"two"), ("e", "f", b""))
    ids = [store.add(first), store.add(second)]
    tree = store.trees.open(store.trees.build(ids))
    assert tree.provenance(tree.lookup(b"a")) == (ids[0], "sha256:" + hashlib.sha256(b"one").hexdigest())
    assert tree.provenance(tree.lookup(b"b")) == (ids[1], "sha256:" + hashlib.sha256(b"two").hexdigest())
    assert tree.provenance(tree.lookup(b"e")) == (ids[1], "")
    assert tree.provenance(tree.lookup(b"d")) == (ids[0], "")


def test_an_empty_chain_is_an_empty_root(store: Store) -> None:
    tree = store.trees.open(store.trees.build([]))
    assert tree.readdir(tree.root) == []
    assert stat.S_ISDIR(tree.stat(tree.root).mode)


def test_a_damaged_image_is_an_error_never_a_crash(store: Store) -> None:
    import random

    chain = store.trees.build(
        [store.add(archive(*((f"d/{n}", "f", b"x" * n) for n in range(200)), ("l", "l", "d/1"), ("h", "h", "d/5")))]
    )
    directory = store.root / "copy"
    directory.mkdir()
    image = (store.trees.directory(chain) / "erofs").read_bytes()
    prov = (store.trees.directory(chain) / "prov").read_bytes()
    (directory / "prov").write_bytes(prov)
    rng = random.Random(1)
    for round_ in range(300):
        broken = bytearray(image)
        for _ in range(rng.randrange(1, 30)):
            broken[rng.randrange(4096, len(broken))] = rng.choice((0, 255, rng.randrange(256)))
        if round_ % 10 == 0:
            broken = broken[: rng.randrange(len(broken))]
        (directory / "erofs").write_bytes(broken)
        try:
            tree = Tree(directory, store.trees._handle)
            for path, nid in tree.walk():
                try:
                    tree.stat(nid), tree.xattrs(nid), tree.provenance(nid), tree.lookup(path)
                    if stat.S_ISREG(tree.stat(nid).mode):
                        tree.pread(nid, 4096, 0)
                    elif stat.S_ISLNK(tree.stat(nid).mode):
                        tree.readlink(nid)
                except (KeyError, Damaged):
                    pass
        except (KeyError, Damaged):
            pass


def test_directories_in_a_loop_are_damaged(store: Store) -> None:
    chain = store.trees.build([store.add(archive(("a", "d", None), ("a/b", "d", None)))])
    directory = store.root / "copy"
    directory.mkdir()
    image = bytearray((store.trees.directory(chain) / "erofs").read_bytes())
    (directory / "prov").write_bytes((store.trees.directory(chain) / "prov").read_bytes())
    tree = store.trees.open(chain)
    a, b = tree.lookup(b"a"), tree.lookup(b"a/b")
    image = bytearray(bytes(image).replace(struct.pack("<QHBB", b, 38, 2, 0)[:8], struct.pack("<Q", a)))
    (directory / "erofs").write_bytes(image)
    with pytest.raises(Damaged):
        list(Tree(directory, store.trees._handle).walk())
