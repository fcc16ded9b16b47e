"""Random layer stacks: the merged tree equals a flat, slow model of what Docker's layer semantics say."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Damaged
from engine.store.check import check
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Tree, Trees

Path_ = tuple[str, ...]
ROOT: Path_ = ()


class Refused(Exception):
    pass


class Model:
    """path -> inode, an inode being [kind, mode, content]; every name of a layer is remembered in `put`."""

    def __init__(self) -> None:
        self.files: dict[Path_, list[object]] = {ROOT: ["d", 0o755, None]}
        self.put: set[Path_] = set()

    def resolve(self, path: Path_) -> Path_:
        """Follow symlinks in every component, inside the root."""
        done: Path_ = ROOT
        todo = list(path)
        for _ in range(400):
            if not todo:
                return done
            name = todo.pop(0)
            inode = self.files.get((*done, name))
            if inode is not None and inode[0] == "l":
                target = str(inode[2])
                base = [] if target.startswith("/") else list(done)
                for part in target.split("/"):
                    if part == "..":
                        base[-1:] = []
                    elif part not in ("", "."):
                        base.append(part)
                done, todo = ROOT, base + todo
            elif inode is not None and inode[0] != "d":
                raise Refused
            else:
                done = (*done, name)
        raise Refused

    def directory(self, path: Path_) -> Path_:
        where = self.resolve(path)
        for depth in range(1, len(where) + 1):
            if where[:depth] not in self.files:
                self.files[where[:depth]] = ["d", 0o755, None]
                self.mark(where[:depth])
        return where

    def mark(self, path: Path_) -> None:
        for depth in range(len(path) + 1):
            self.put.add(path[:depth])

    def drop(self, path: Path_) -> None:
        for other in [other for other in self.files if other[: len(path)] == path]:
            del self.files[other]
            self.put.discard(other)

    def hide(self, path: Path_) -> None:
        for other in sorted((o for o in self.files if o[: len(path)] == path), key=len):
            if other in self.files and other not in self.put:
                self.drop(other)

    def apply(self, layer: list[tuple[str, str, str, int]]) -> None:
        self.put = {ROOT}
        for kind, name, value, mode in layer:
            parts = tuple(name.split("/"))
            parent = self.directory(parts[:-1])
            path = (*parent, parts[-1])
            if kind == "w":
                self.hide(path)
            elif kind == "o":
                where = self.directory(parts)
                self.mark(where)
                for other in [o for o in self.files if len(o) == len(where) + 1 and o[:-1] == where]:
                    self.hide(other)
            elif kind == "h":
                self.drop(path)
                goal = tuple(value.split("/"))
                target = (*self.resolve(goal[:-1]), goal[-1])
                inode = self.files.get(target)
                if inode is None or inode[0] == "d":
                    raise Refused
                self.files[path] = inode
                if inode[0] != "l":
                    inode[1] = mode
                self.mark(path)
            else:
                old = self.files.get(path)
                if old is not None and old[0] == kind == "d":
                    old[1] = mode
                else:
                    self.drop(path)
                    self.files[path] = [kind, mode, value if kind != "d" else None]
                self.mark(path)

    def listing(self) -> dict[str, tuple[object, ...]]:
        first: dict[int, str] = {}
        out: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.files):
            if path:
                inode, name = self.files[path], "/".join(path)
                group = first.setdefault(id(inode), name)
                out[name] = (inode[0], inode[1] if inode[0] != "l" else 0, inode[2], group)
        return out


def listing(tree: Tree) -> dict[str, tuple[object, ...]]:
    rows = sorted((tuple(path.decode().split("/")), nid) for path, nid in tree.walk())
    first: dict[int, str] = {}
    out: dict[str, tuple[object, ...]] = {}
    links: dict[int, int] = {}
    for path, nid in rows:
        row, name = tree.stat(nid), "/".join(path)
        kind = {stat.S_IFDIR: "d", stat.S_IFREG: "f", stat.S_IFLNK: "l"}[stat.S_IFMT(row.mode)]
        content = (
            None if kind == "d" else tree.readlink(nid).decode() if kind == "l" else tree.pread(nid, 99, 0).decode()
        )
        out[name] = (kind, row.mode & 0o7777 if kind != "l" else 0, content, first.setdefault(nid, name))
        links[nid] = links.get(nid, 0) + 1
        assert tree.lookup(name.encode()) == nid
    for nid, count in links.items():
        row = tree.stat(nid)
        if stat.S_ISDIR(row.mode):
            count = 2 + sum(kind == stat.S_IFDIR for _, _, kind in tree.readdir(nid))
        assert row.nlink == count
    return out


names = st.sampled_from(["a", "b", "c"])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
modes = st.sampled_from([0o644, 0o755, 0o4711, 0o1777, 0])
targets = st.one_of(
    paths, paths.map(lambda p: "/" + p), paths.map(lambda p: "../" + p), st.sampled_from(["..", "/", "."])
)
entries = st.one_of(
    st.tuples(st.just("d"), paths, st.just(""), modes),
    st.tuples(st.just("f"), paths, st.text("xyz", max_size=3), modes),
    st.tuples(st.just("l"), paths, targets, st.just(0o777)),
    st.tuples(st.just("h"), paths, paths, modes),
    st.tuples(st.just("w"), paths, st.just(""), st.just(0)),
    st.tuples(st.just("o"), paths, st.just(""), st.just(0)),
)
stacks = st.lists(st.lists(entries, max_size=8), min_size=1, max_size=4)


def archive(layer: list[tuple[str, str, str, int]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind, name, value, mode in layer:
            above, _, base = name.rpartition("/")
            if kind == "w":
                name = f"{above}/.wh.{base}".lstrip("/")
            elif kind == "o":
                name = f"{name}/.wh..wh..opq"
            info = tarfile.TarInfo(name)
            info.mode = mode
            info.type = {"d": b"5", "l": b"2", "h": b"1"}.get(kind, b"0")
            body = value.encode() if kind == "f" else b""
            info.size = len(body)
            if kind in "lh":
                info.linkname = value
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


@settings(max_examples=200 if os.environ.get("DUTCHMAN_SLOW_TESTS") else 60, deadline=None)
@given(stacks)
def test_merged_trees_equal_the_model(stack: list[list[tuple[str, str, str, int]]]) -> None:
    model = Model()
    expected: dict[str, tuple[object, ...]] | None
    try:
        for layer in stack:
            model.apply(layer)
        expected = model.listing()
    except Refused:
        expected = None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        meta = Meta(root / "db.sqlite")
        meta._writer.execute("PRAGMA synchronous=OFF")
        layers = Layers(root, meta)
        trees = Trees(root, meta, layers)
        ids = [layers.ingest([archive(layer)], "").diff_id for layer in stack]
        try:
            got = listing(trees.open(trees.build(ids)))
        except Damaged:
            got = None
        assert got == expected
        assert check(root, meta, deep=True) == []
        meta.close()
