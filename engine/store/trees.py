"""Merged trees: `trees/sha256/<hex of chain id>/{erofs,prov}` beside a row in `trees`.

Only here: building them (merge.py, erofs.py) and the bounded cache of open ones (tree.py). A chain of one layer has
the layer's diff_id as its chain id. All methods are thread-safe; one tree is built at a time.

Source: image-spec config.md, "Layer ChainID".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from engine.errors import Busy, EngineError, NotFound
from engine.host import fsync_dir
from engine.model import check_digest, hex_of
from engine.store import erofs
from engine.store.blobs import no_space
from engine.store.layers import Layers
from engine.store.merge import Merger
from engine.store.meta import Meta
from engine.store.tree import Handle, Provenance, Stat, Tree

__all__ = ["Provenance", "Stat", "Tree", "Trees", "chain_id"]

PROVENANCE = b"user.dutchman."
MAX_PROVENANCE = 4096  # bytes of one provenance value: a RUN line may be longer
MAX_BEGUN = 50_000  # entries of a merge that goes on beside others: some 30 MB
OPEN_TREES = 64
OPEN_DATA = 512  # descriptors of layer data held by cached trees


def chain_id(diff_ids: Sequence[str]) -> str:
    """The OCI chain id of layers, lowest first; of no layers: the digest of nothing."""
    if not diff_ids:
        return "sha256:" + hashlib.sha256().hexdigest()
    chain = check_digest(diff_ids[0])
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {check_digest(diff_id)}".encode()).hexdigest()
    return chain


class Trees:
    """The tree store below `root`. Creates its directory."""

    def __init__(self, root: Path, meta: Meta, layers: Layers) -> None:
        self.root = root
        self.meta = meta
        self.layers = layers
        self._dir = root / "trees" / "sha256"
        self._tmp = root / "tmp"
        self._dir.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(parents=True, exist_ok=True)
        self._building = threading.Lock()
        self._lock = threading.Lock()  # the two caches; never held over I/O on layers
        self._open: OrderedDict[str, Tree] = OrderedDict()
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()

    def build(self, diff_ids: Sequence[str], merger: Merger | None = None) -> str:
        """Merge layers, lowest first, into a tree; returns its chain id. Idempotent, atomic.

        `merger`: what was begun (`begin`) with the lowest of them, used up here. NotFound for a layer the store lacks;
        Damaged when the layers cannot be applied on each other; NoSpace.
        """
        chain = chain_id(diff_ids)
        with self._building:
            if self.has(chain):
                return chain
            merger = merger or Merger()
            if merger.layers != list(diff_ids[: len(merger.layers)]):
                merger = Merger()  # begun for others
            for diff_id in diff_ids[len(merger.layers) :]:
                merger.apply(diff_id, self.layers.entries(diff_id))
            work = Path(tempfile.mkdtemp(dir=self._tmp, prefix="tree-"))
            try:
                inodes, size = self._write(work, merger, chain)
                target = self.directory(chain)
                if target.exists():  # a crash between files and row
                    shutil.rmtree(target)
                os.chmod(work, 0o755)
                fsync_dir(work)
                os.rename(work, target)
                fsync_dir(target.parent)
            except OSError as error:
                if full := no_space(error):
                    raise full from error
                raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
            with self.meta.tx() as tx:
                tx.execute(
                    "INSERT INTO trees (chain_id, layers, entries, size, created_ns) VALUES (?, ?, ?, ?, ?)",
                    (chain, json.dumps(list(diff_ids)), inodes, size, time.time_ns()),
                )
            return chain

    def begin(self, diff_ids: Sequence[str]) -> Begun:
        """The merge of layers that are still coming, as far as it goes: for `build`."""
        return Begun(self, diff_ids)

    def shown(self, chain: str, extra: Mapping[str, Mapping[str, str]]) -> Path:
        """The tree as an EROFS image for people: with xattrs `user.dutchman.layer`, `.digest`, and `extra` by layer.

        Made beside the tree when first asked for, which takes about as long as building it; a cache,
        in no row of the catalog. NotFound, NoSpace, Damaged.
        """
        path = self.directory(chain) / "shown"
        with self._building:
            diff_ids = self.layers_of(chain)
            if path.exists():
                return path
            merger = Merger()
            for diff_id in diff_ids:
                merger.apply(diff_id, self.layers.entries(diff_id))
            layers = [
                {PROVENANCE + key.encode(): value.encode()[:MAX_PROVENANCE] for key, value in values.items() if value}
                for values in ({"layer": diff_id, **extra.get(diff_id, {})} for diff_id in merger.layers)
            ]
            what = erofs.Shown(layers, PROVENANCE + b"digest")
            fd, aside = tempfile.mkstemp(dir=self._tmp, prefix="shown-")
            try:
                with open(fd, "wb") as out:
                    uuid = bytes.fromhex(hex_of(chain))
                    erofs.write(merger.root, out, None, merger.layers, uuid, self._data_blocks, what)
                    os.fchmod(out.fileno(), 0o644)
                    out.flush()
                    os.fsync(out.fileno())  # a name must never lead to half an image after a power cut
                os.rename(aside, path)
            except OSError as error:
                if full := no_space(error):
                    raise full from error
                raise
            finally:
                Path(aside).unlink(missing_ok=True)
        return path

    def _write(self, work: Path, merger: Merger, chain: str) -> tuple[int, int]:
        with open(work / "erofs", "xb") as out, open(work / "prov", "xb") as prov:
            result = erofs.write(merger.root, out, prov, merger.layers, bytes.fromhex(hex_of(chain)), self._data_blocks)
            for file in (out, prov):
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
        return result

    def _data_blocks(self, diff_id: str) -> int:
        return self.layers.info(diff_id).data_size // erofs.BLOCK

    def directory(self, chain: str) -> Path:
        return self._dir / hex_of(chain)

    def meta_path(self, chain: str) -> Path:
        """The EROFS image, to be mounted over `devices`."""
        return self.directory(chain) / "erofs"

    def has(self, chain: str) -> bool:
        return self.meta.row("SELECT 1 FROM trees WHERE chain_id = ?", (check_digest(chain),)) is not None

    def all(self) -> list[str]:
        """Chain ids, oldest first."""
        return [str(row["chain_id"]) for row in self.meta.query("SELECT chain_id FROM trees ORDER BY created_ns, 1")]

    def layers_of(self, chain: str) -> list[str]:
        """The diff_ids a tree merges, lowest first. NotFound."""
        row = self.meta.row("SELECT layers FROM trees WHERE chain_id = ?", (check_digest(chain),))
        if row is None:
            raise NotFound("no such tree", at=chain)
        return [str(diff_id) for diff_id in json.loads(row["layers"])]

    def open(self, chain: str) -> Tree:
        """The tree, from the cache where possible. NotFound, Damaged. It stays usable while referenced."""
        with self._lock:
            tree = self._open.get(chain)
            self.meta.used(chain)
            if tree is not None:
                self.meta.count("trees_hits")
                self._open.move_to_end(chain)
                return tree
        if not self.has(chain):
            raise NotFound("no such tree", at=chain)
        try:
            tree = Tree(self.directory(chain), self._handle)
        except FileNotFoundError as error:
            raise NotFound("the tree's files are gone", at=chain) from error
        with self._lock:
            self.meta.count("trees_misses")
            tree = self._open.setdefault(chain, tree)
            while len(self._open) > 1 and (len(self._open) > OPEN_TREES or len(self._handles) > OPEN_DATA):
                self._open.popitem(last=False)
        return tree

    def _handle(self, diff_id: str) -> Handle:
        with self._lock:
            handle = self._handles.get(diff_id)
            if handle is None:
                handle = self._handles[diff_id] = Handle(self.layers.data_path(diff_id))
            return handle

    def handle(self, diff_id: str) -> Handle:
        """A layer's `data`, open while somebody refers to the handle. FileNotFoundError."""
        return self._handle(diff_id)

    def devices(self, chain: str) -> list[Path]:
        """The layers' data files in the order of the image's device table, as mount_erofs wants them."""
        return [self.layers.data_path(diff_id) for diff_id in self.open(chain).devices]

    def remove_many(self, chains: Sequence[str]) -> None:
        """Rows in one transaction, then files; trees of images stay, those that are gone already do not matter."""
        with self._building:
            with self.meta.tx() as tx:
                used = {row["chain_id"] for row in tx.execute("SELECT chain_id FROM images")}
                doomed = [chain for chain in chains if chain not in used]
                tx.executemany("DELETE FROM trees WHERE chain_id = ?", [(chain,) for chain in doomed])
            for chain in doomed:
                with self._lock:
                    self._open.pop(chain, None)
                shutil.rmtree(self.directory(chain), ignore_errors=True)

    def remove(self, chain: str) -> int:
        """Row, then files; returns the bytes freed. NotFound; Busy while an image uses it."""
        with self._building:
            if not self.has(chain):
                raise NotFound("no such tree", at=chain)
            user = self.meta.row("SELECT digest FROM images WHERE chain_id = ?", (chain,))
            if user is not None:
                raise Busy(f"the tree is used by image {user['digest']}", at=chain)
            size = sum(file.stat().st_size for file in self.directory(chain).iterdir())
            with self.meta.tx() as tx:
                tx.execute("DELETE FROM trees WHERE chain_id = ?", (chain,))
            with self._lock:
                self._open.pop(chain, None)
            shutil.rmtree(self.directory(chain), ignore_errors=True)
            return size


class Begun:
    """A merge that goes on while the higher layers are still on their way. One thread.

    It holds its part of the tree in memory beside those of others, so a large one is left for `Trees.build`, which
    makes one at a time.
    """

    def __init__(self, trees: Trees, diff_ids: Sequence[str]) -> None:
        self._trees, self._diff_ids = trees, diff_ids
        self.merger: Merger | None = None if trees.has(chain_id(diff_ids)) else Merger()
        self._entries = 0

    def advance(self) -> None:
        """Merge the next layers as far as the store has them by now."""
        try:
            while self.merger is not None and len(self.merger.layers) < len(self._diff_ids):
                diff_id = self._diff_ids[len(self.merger.layers)]
                if not self._trees.layers.has(diff_id):
                    return
                self._entries += self._trees.layers.info(diff_id).entries
                if self._entries > MAX_BEGUN:
                    self.merger = None
                else:
                    self.merger.apply(diff_id, self._trees.layers.entries(diff_id))
        except EngineError:
            self.merger = None  # `build` meets it again, where it is reported
