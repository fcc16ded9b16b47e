"""Layers: `layers/sha256/<hex of diff_id>/{data,index}` beside rows in `layers`, `bodies`, `layer_deps`, `layer_blobs`.

Only here: ingest, the one streaming pass from compressed bytes to a layer, and removal. Everything is made in tmp/,
verified, made durable, renamed into place, and only then visible through its row; so a row always has its files, and
a crash leaves tmp/ litter or a directory without a row, which the next ingest or check.py removes. Memory is
bounded whatever the layer's size. All methods are thread-safe; ingests run in parallel.

    caller      chunks -> sha256(compressed), keep
    inflate     -> blocks of 1 MiB
    tar digest  -> sha256(tar) = diff_id
    unpack      -> tar entries, sha256 of bodies, dedup, data + index
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from engine.errors import Busy, Damaged, NotFound, TooLarge
from engine.host import fsync_dir
from engine.model import check_digest, hex_of
from engine.store.blobs import BlobWriter, no_space
from engine.store.bodies import MAX_SEEN, DataWriter, KnownBodies, Sieve
from engine.store.entries import entry_of
from engine.store.index import Entry, IndexWriter, Kind, read_index
from engine.store.inflate import inflate
from engine.store.merge import show
from engine.store.meta import Meta
from engine.store.pipeline import Pipe, Stages, gathered
from engine.store.tar import DEFAULT_LIMITS, Limits, TarReader


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A stored layer. Sizes in bytes: `size` of its regular files, `data_size` stored here, `tar_size` uncompressed."""

    id: int
    diff_id: str
    size: int
    data_size: int
    tar_size: int
    entries: int


@dataclass(slots=True)
class _Made:
    """What the stages of one ingest find out."""

    diff_id: str = ""
    tar_size: int = 0
    size: int = 0
    entries: int = 0
    data_size: int = 0


class Layers:
    """The layer store below `root`. `limits` bound what one archive may be."""

    def __init__(self, root: Path, meta: Meta, limits: Limits = DEFAULT_LIMITS) -> None:
        self.root = root
        self.meta = meta
        self.limits = limits
        self._dir = root / "layers" / "sha256"
        self._tmp = root / "tmp"
        self._dir.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(parents=True, exist_ok=True)
        self._sieve = Sieve(meta.path)
        self._lock = threading.Lock()  # pins and removal; never held over an ingest
        self._turn = threading.Lock()  # held by the ingest that unpacks a block; never over a wait for input
        self._publish = threading.Lock()  # one layer at a time takes its place
        self._pins: Counter[str] = Counter()  # layers whose data a running ingest refers to

    # --- reading -------------------------------------------------------------------------------------------------

    def has(self, diff_id: str) -> bool:
        return self.meta.row("SELECT 1 FROM layers WHERE diff_id = ?", (check_digest(diff_id),)) is not None

    def info(self, diff_id: str) -> LayerInfo:
        """NotFound."""
        rows = self.meta.query(f"{_SELECT} WHERE diff_id = ?", (check_digest(diff_id),))
        if not rows:
            raise NotFound("no such layer", at=diff_id)
        return LayerInfo(*rows[0])

    def all(self) -> list[LayerInfo]:
        """Every layer, oldest first."""
        return [LayerInfo(*row) for row in self.meta.query(f"{_SELECT} ORDER BY id")]

    def directory(self, diff_id: str) -> Path:
        return self._dir / hex_of(diff_id)

    def data_path(self, diff_id: str) -> Path:
        return self.directory(diff_id) / "data"

    def index_path(self, diff_id: str) -> Path:
        return self.directory(diff_id) / "index"

    def entries(self, diff_id: str) -> Iterator[Entry]:
        """Every entry in tar order, whiteouts included. NotFound, Damaged."""
        if not self.has(diff_id):
            raise NotFound("no such layer", at=diff_id)
        return read_index(self.index_path(diff_id), diff_id)

    def deleted(self, diff_id: str) -> list[bytes]:
        """Paths the layer removes from those below, sorted; `<dir>/*` for an opaque directory (`*` for the root)."""
        out = set()
        for entry in self.entries(diff_id):
            if entry.kind is Kind.WHITEOUT:
                out.add(entry.path)
            elif entry.kind is Kind.OPAQUE:
                out.add(entry.path + b"/*" if entry.path else b"*")
        return sorted(out)

    def deps(self, diff_id: str) -> list[str]:
        """Other layers whose data this one refers to, sorted."""
        rows = self.meta.query("SELECT dep FROM layer_deps WHERE diff_id = ? ORDER BY dep", (check_digest(diff_id),))
        return [str(row["dep"]) for row in rows]

    def verify(self, diff_id: str, progress: Callable[[int], None] | None = None) -> None:
        """Read every body of the layer and compare it with its digest; `progress` gets the bytes read so far.

        NotFound, Damaged naming the first file whose content rotted.
        """
        seen: set[bytes] = set()
        done = 0
        for entry in self.entries(diff_id):
            if not entry.sha256 or entry.sha256 in seen:
                continue
            if len(seen) < MAX_SEEN:
                seen.add(entry.sha256)
            digester, left = hashlib.sha256(), entry.size
            try:
                with open(self.data_path(entry.data), "rb", buffering=0) as file:
                    file.seek(entry.offset)
                    while left and (piece := file.read(min(left, 1 << 20))):
                        digester.update(piece)
                        left -= len(piece)
            except FileNotFoundError as error:
                raise Damaged(f"the data of layer {entry.data} is gone", at=diff_id) from error
            if digester.digest() != entry.sha256:
                raise Damaged(f"the content of {show(entry.path)} does not match its digest", at=diff_id)
            done += entry.size
            if progress is not None:
                progress(done)

    # --- ingest --------------------------------------------------------------------------------------------------

    def ingest(
        self,
        chunks: Iterable[bytes],
        media_type: str,
        *,
        diff_id: str | None = None,
        digest: str | None = None,
        size: int | None = None,
        keep: BlobWriter | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> LayerInfo:
        """Store the layer whose (compressed) bytes are `chunks`, taken in the calling thread.

        `digest` and `size` are of those bytes, `diff_id` of the uncompressed tar; each given one must match, else
        Damaged and nothing remains. The compression is found from the bytes; `media_type` is only recorded. `keep`
        receives the same bytes and is committed; when it already has an `offset`, that many bytes are not written
        again. `progress` is called with the bytes taken so far. A layer the store has is verified, not stored twice.
        Raises Damaged, TooLarge, NoSpace, and whatever `chunks` raises.
        """
        for given in (diff_id, digest):
            if given is not None:
                check_digest(given)
        feed = _Feed(chunks, digest, size, keep, progress)
        made = _Made()
        pins: list[str] = []
        work = Path(tempfile.mkdtemp(dir=self._tmp, prefix="ingest-"))
        try:
            known = KnownBodies(self.meta.path, lambda dep: self._pin(dep, pins), self._sieve)
            try:
                with (
                    DataWriter(work / "data", known) as data,
                    IndexWriter(work / "index") as index,
                ):
                    self._run(feed, made, data, index)
                    if diff_id is not None and made.diff_id != diff_id:
                        raise Damaged(f"the layer's diff_id is {made.diff_id}, not the expected one", at=diff_id)
                    data.finish()
                    os.fsync(index.finish())
                    made.data_size = data.size
                    self.meta.count("bodies_hits", data.hits)
                    self.meta.count("bodies_misses", data.misses)
                    deps = index.deps()
            finally:
                known.close()
            if keep is not None:
                keep.commit()
            return self._take_place(work, made, deps, feed, media_type)
        except OSError as error:
            if full := no_space(error):
                raise full from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._unpin(pins)

    def _run(self, feed: _Feed, made: _Made, data: DataWriter, index: IndexWriter) -> None:
        """The four stages, to the end of the stream."""
        packed, blocks, tar = Pipe(2), Pipe(3), Pipe(3)

        def inflating() -> None:
            for block in inflate(iter(packed)):
                tar.put(block)
                blocks.put(block)
            tar.close()
            blocks.close()

        def digesting() -> None:
            digester = hashlib.sha256()
            for block in tar:
                digester.update(block)
                made.tar_size += len(block)
            made.diff_id = "sha256:" + digester.hexdigest()

        def unpacking() -> None:
            with closing(self._in_turns(blocks)) as turns:  # a failure must not keep the turn
                reader = TarReader(turns, self.limits)
                holes = 0
                for member in reader:
                    entry = entry_of(member)
                    if entry is None:
                        continue
                    if entry.size:
                        if member.sparse is not None:
                            holes += member.size - member.stored
                            if holes > self.limits.holes:
                                raise TooLarge(f"more than {self.limits.holes} bytes of holes in sparse files")
                        made.size += entry.size
                        data.store(entry, reader, member.stored, member.sparse)
                    index.add(entry)
                reader.drain()
            made.entries = index.entries

        with Stages([packed, blocks, tar]) as stages:
            stages.start("inflate", inflating)
            stages.start("tar-digest", digesting)
            stages.start("unpack", unpacking)
            for chunk in feed:
                packed.put(chunk)
            packed.close()

    def _in_turns(self, blocks: Iterable[bytes]) -> Generator[bytes, None, None]:
        """Each block when its turn has come, which ends when the next is asked for: the interpreter runs one thread at
        a time, and unpackers that take it from each other at every call spend more on switching than on work."""
        for block in blocks:
            with self._turn:
                yield block

    def _take_place(self, work: Path, made: _Made, deps: list[str], feed: _Feed, media_type: str) -> LayerInfo:
        """Rename into place, then the rows, all in one transaction."""
        diff_id = made.diff_id
        target = self.directory(diff_id)
        with self._publish:
            if self.has(diff_id):
                with self.meta.tx() as tx:
                    tx.execute(_BLOB, (feed.digest, diff_id, media_type, feed.total))
                return self.info(diff_id)
            if target.exists():  # a crash or a removal between files and row
                shutil.rmtree(target)
            os.chmod(work, 0o755)
            fsync_dir(work)
            os.rename(work, target)
            fsync_dir(target.parent)
            try:
                with self.meta.tx() as tx:
                    cursor = tx.execute(
                        "INSERT INTO layers (diff_id, size, data_size, tar_size, entries, created_ns)"
                        " VALUES (?, ?, ?, ?, ?, ?)",
                        (diff_id, made.size, made.data_size, made.tar_size, made.entries, time.time_ns()),
                    )
                    layer = cursor.lastrowid
                    tx.executemany(
                        "INSERT OR IGNORE INTO bodies (sha256, layer, offset, size) VALUES (?, ?, ?, ?)",
                        ((entry.sha256, layer, entry.offset, entry.size) for entry in self._own(target, diff_id)),
                    )
                    tx.execute(
                        "UPDATE layers SET body_size = (SELECT coalesce(sum(size), 0) FROM bodies WHERE layer = ?1)"
                        " WHERE id = ?1",
                        (layer,),
                    )
                    tx.executemany("INSERT INTO layer_deps VALUES (?, ?)", ((diff_id, dep) for dep in deps))
                    tx.execute(_BLOB, (feed.digest, diff_id, media_type, feed.total))
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
        return self.info(diff_id)

    def _own(self, directory: Path, diff_id: str) -> Iterator[Entry]:
        """Entries of a fresh index (whose own data is called "") with a body stored in this layer, to become rows."""
        for entry in read_index(directory / "index", diff_id):
            if entry.sha256 and entry.data == diff_id:
                self._sieve.add(entry.sha256)
                yield entry

    def _pin(self, diff_id: str, pins: list[str]) -> None:
        """Keep a layer from being removed until `_unpin`."""
        with self._lock:
            self._pins[diff_id] += 1
            pins.append(diff_id)

    def _unpin(self, pins: list[str]) -> None:
        with self._lock:
            self._pins.subtract(pins)
            self._pins += Counter()  # drops the zeros

    # --- removal -------------------------------------------------------------------------------------------------

    def users(self, diff_id: str) -> list[str]:
        """Why the layer cannot be removed: layers that share its bodies, images and merged trees made of it."""
        check_digest(diff_id)
        out = [
            f"layer {row['diff_id']}"
            for row in self.meta.query("SELECT diff_id FROM layer_deps WHERE dep = ? ORDER BY 1", (diff_id,))
        ]
        out += [
            f"image {row['image']}"
            for row in self.meta.query("SELECT DISTINCT image FROM image_layers WHERE diff_id = ?", (diff_id,))
        ]
        out += [
            f"tree {row['chain_id']}"
            for row in self.meta.query(
                "SELECT chain_id FROM trees, json_each(trees.layers) AS part WHERE part.value = ? AND chain_id <> ?",
                (diff_id, diff_id),
            )
        ]
        return out

    def remove_many(self, diff_ids: Iterable[str]) -> None:
        """`remove` of many in one transaction, in any order; what something else uses stays, what is gone is fine."""
        with self._publish, self._lock:
            doomed = {check_digest(diff_id) for diff_id in diff_ids if not self._pins[diff_id]}
            with self.meta.tx() as tx:
                used = {str(row[0]) for row in tx.execute("SELECT diff_id FROM image_layers")}
                for row in tx.execute("SELECT part.value FROM trees, json_each(trees.layers) AS part"
                                      " WHERE part.value <> chain_id"):  # fmt: skip
                    used.add(str(row[0]))
                deps: dict[str, set[str]] = {}
                for row in tx.execute("SELECT diff_id, dep FROM layer_deps"):
                    deps.setdefault(str(row["diff_id"]), set()).add(str(row["dep"]))
                todo = [*used, *(diff_id for diff_id in deps if diff_id not in doomed), *self._pins]
                while todo:  # what stays keeps what it shares bodies with
                    used.add(last := todo.pop())
                    todo += [dep for dep in deps.get(last, ()) if dep not in used]
                gone = sorted(doomed - used)
                keys = [(diff_id,) for diff_id in gone]
                tx.executemany("DELETE FROM bodies WHERE layer = (SELECT id FROM layers WHERE diff_id = ?)", keys)
                tx.executemany("DELETE FROM layer_deps WHERE diff_id = ?", keys)
                tx.executemany("DELETE FROM trees WHERE chain_id = ?", keys)
                tx.executemany("DELETE FROM layers WHERE diff_id = ?", keys)
            for diff_id in gone:
                shutil.rmtree(self.root / "trees" / "sha256" / hex_of(diff_id), ignore_errors=True)
                shutil.rmtree(self.directory(diff_id), ignore_errors=True)

    def remove(self, diff_id: str) -> int:
        """Rows, then files, with the layer's own single-layer tree; returns the bytes freed. NotFound, Busy."""
        with self._publish, self._lock:
            info = self.info(diff_id)
            users = self.users(diff_id)
            if self._pins[diff_id]:
                users.append("a layer that is being stored")
            if users:
                more = f" and {len(users) - 1} more" if len(users) > 1 else ""
                raise Busy(f"the layer is used by {users[0]}{more}", at=diff_id)
            with self.meta.tx() as tx:
                tx.execute("DELETE FROM bodies WHERE layer = ?", (info.id,))
                tx.execute("DELETE FROM layer_deps WHERE diff_id = ?", (diff_id,))
                tx.execute("DELETE FROM trees WHERE chain_id = ?", (diff_id,))
                tx.execute("DELETE FROM layers WHERE id = ?", (info.id,))
            shutil.rmtree(self.root / "trees" / "sha256" / hex_of(diff_id), ignore_errors=True)
            shutil.rmtree(self.directory(diff_id), ignore_errors=True)
            return info.data_size


_SELECT = "SELECT id, diff_id, size, data_size, tar_size, entries FROM layers"
_BLOB = "INSERT OR REPLACE INTO layer_blobs (digest, diff_id, media_type, size) VALUES (?, ?, ?, ?)"


class _Feed:
    """The caller's chunks, counted, hashed, kept and verified on the way into the pipeline."""

    def __init__(
        self,
        chunks: Iterable[bytes],
        digest: str | None,
        size: int | None,
        keep: BlobWriter | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._chunks, self._expected, self._size, self._keep, self._progress = chunks, digest, size, keep, progress
        self._kept = keep.offset if keep is not None else 0
        self.total = 0
        self.digest = ""

    def __iter__(self) -> Iterator[bytes]:
        keep, digester = self._keep, hashlib.sha256()
        for piece in gathered(self._chunks):
            before = self.total
            self.total += len(piece)
            if self._size is not None and self.total > self._size:
                raise Damaged(f"more than the announced {self._size} bytes", at=self._expected)
            yield piece  # first, so that the other stages work while this one hashes
            if keep is None:
                digester.update(piece)
            elif self.total > self._kept:
                keep.write(memoryview(piece)[max(0, self._kept - before) :])
            if self._progress is not None:
                self._progress(self.total)
        self.digest = keep.digest() if keep is not None else "sha256:" + digester.hexdigest()
        if self._size is not None and self.total != self._size:
            raise Damaged(f"{self.total} bytes where {self._size} were announced", at=self._expected)
        if self._expected is not None and self.digest != self._expected:
            raise Damaged(f"the content's digest is {self.digest}, not the expected one", at=self._expected)
