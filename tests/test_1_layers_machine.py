"""A state machine over the store: whatever is stored, refused or removed, acknowledged layers stay whole."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import Busy, Damaged
from engine.store.check import check, empty_tmp, remove_strays
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees

BODIES = [bytes([number]) * size for number, size in enumerate((1, 4096, 4097, 9000, 70_000))]


def body(number: int) -> bytes:
    return BODIES[number]


bodies = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 4).map(body), max_size=4)


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.stored: dict[str, dict[str, bytes]] = {}
        self.merged: dict[str, list[str]] = {}
        self.open()

    def open(self) -> None:
        self.meta = Meta(self.root / "db.sqlite")
        self.meta._writer.execute("PRAGMA synchronous=OFF")
        self.layers = Layers(self.root, self.meta)
        self.trees = Trees(self.root, self.meta, self.layers)

    @rule(files=bodies, packed=st.booleans())
    def ingest(self, files: dict[str, bytes], packed: bool) -> None:
        plain = archive(files)
        info = self.layers.ingest([gzip.compress(plain) if packed else plain], "x")
        assert info.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest()
        self.stored[info.diff_id] = files

    @rule(files=bodies, cut=st.integers(1, 400))
    def fail(self, files: dict[str, bytes], cut: int) -> None:
        before = self.layers.all()
        try:
            self.layers.ingest([gzip.compress(archive(files))[:-cut]], "x")
        except Damaged:
            pass
        else:  # nothing of it was left: an empty stream is an empty layer
            self.stored.setdefault("sha256:" + hashlib.sha256().hexdigest(), {})
            return
        assert self.layers.all() == before

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def build(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.stored)), min_size=1, max_size=3))
        self.merged[self.trees.build(ids)] = ids

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def drop_tree(self, data: st.DataObject) -> None:
        chain = data.draw(st.sampled_from(sorted(self.merged)))
        self.trees.remove(chain)
        del self.merged[chain]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        diff_id = data.draw(st.sampled_from(sorted(self.stored)))
        used = any(diff_id in self.layers.deps(other) for other in self.stored)
        used |= any(diff_id in ids and chain != diff_id for chain, ids in self.merged.items())
        try:
            self.layers.remove(diff_id)
            assert not used
            del self.stored[diff_id]
            self.merged.pop(diff_id, None)
        except Busy:
            assert used

    @rule(name=st.sampled_from(["layers", "trees", "blobs"]))
    def crash_and_reopen(self, name: str) -> None:
        """A kill between rename and row, and one in tmp/."""
        self.meta.close()
        (self.root / name / "sha256").mkdir(parents=True, exist_ok=True)
        (self.root / name / "sha256" / ("e" * 64)).mkdir()
        (self.root / "tmp" / "ingest-litter").mkdir()
        self.open()
        assert len(empty_tmp(self.root) + remove_strays(self.root, self.meta)) == 2

    @invariant()
    def everything_acknowledged_is_whole(self) -> None:
        assert check(self.root, self.meta, deep=True) == []
        assert {info.diff_id for info in self.layers.all()} == set(self.stored)
        for diff_id, files in self.stored.items():
            seen = {}
            for entry in self.layers.entries(diff_id):
                with open(self.layers.data_path(entry.data or diff_id), "rb") as file:
                    file.seek(entry.offset)
                    seen[entry.path.decode()] = file.read(entry.size)
            assert seen == files
        for chain, ids in self.merged.items():
            tree = self.trees.open(chain)
            wanted = {name: body for diff_id in ids for name, body in self.stored[diff_id].items()}
            assert {name.decode(): tree.pread(nid, 1 << 20, 0) for name, nid, _ in tree.readdir(tree.root)} == wanted

    def teardown(self) -> None:
        self.meta.close()
        shutil.rmtree(self.root)


TestStore = Store.TestCase
EXAMPLES = 40 if os.environ.get("DUTCHMAN_SLOW_TESTS") else 14
TestStore.settings = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None)
