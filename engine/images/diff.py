"""What one merged tree has that another lacks, and what differs: computed from metadata, never from file contents.

Only here: the comparison of two trees `a` (before) and `b` (after) and the cache of its results. Entries are the same
when kind, mode, owner, size, device, link target, xattrs and the digest of the body agree; times alone are no
difference, since a rebuild changes them all. What becomes a directory or ceases to be one is deleted and added. One
pass over both trees in a background thread leaves a mask for each directory (what there is below it) and the sorted
list of paths, which lies in a deleted file; directories are then listed by comparing the two again. So memory is a
few bytes for each directory that differs, whatever the trees hold; readers wait for the pass `WAIT` seconds at most.

Threading: all methods from any thread. A result holds no tree open, so a removed image frees its disk.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import Damaged, DeadlineExceeded, EngineError, TooLarge
from engine.store.blobs import no_space
from engine.store.tree import Tree
from engine.store.trees import Trees

log = logging.getLogger(__name__)

ADDED, CHANGED, DELETED = 1, 2, 4
WAIT = 0.9  # seconds a reader waits for the pass
RETRY = 10.0  # seconds a failure is believed
MAX_DIRS = 1_000_000  # directories with a difference below them
MAX_LIST = 1 << 30  # bytes of the list of paths
MAX_DEPTH = 100_000
CACHED_DIRS = 400_000  # directories of all cached results
CACHED = 32  # results: each holds a descriptor
_DIR = stat.S_IFDIR
_LETTERS = {ADDED: b"A ", CHANGED: b"M ", DELETED: b"D "}


class Pair(NamedTuple):
    """One name in a directory of both trees; -1 where it is not there, `kind_*` are file type bits."""

    name: bytes
    a: int
    b: int
    kind_a: int
    kind_b: int

    @property
    def directories(self) -> bool:
        return self.kind_a == _DIR and self.kind_b == _DIR

    @property
    def replaced(self) -> bool:
        """Both are there and only one is a directory."""
        return self.a >= 0 and self.b >= 0 and (self.kind_a == _DIR) != (self.kind_b == _DIR)


def pairs(a: Tree, in_a: int, b: Tree, in_b: int) -> Iterator[Pair]:
    """The names of a directory in one tree and its counterpart in the other, in byte order."""
    before, after = a.readdir(in_a), b.readdir(in_b)
    at, end = 0, len(before)
    for name, nid, kind in after:
        while at < end and before[at][0] < name:
            yield Pair(before[at][0], before[at][1], -1, before[at][2], 0)
            at += 1
        if at < end and before[at][0] == name:
            yield Pair(name, before[at][1], nid, before[at][2], kind)
            at += 1
        else:
            yield Pair(name, -1, nid, 0, kind)
    for name, nid, kind in before[at:]:
        yield Pair(name, nid, -1, kind, 0)


def differ(a: Tree, in_a: int, b: Tree, in_b: int) -> bool:
    """Whether two entries are not the same (see the module docstring); of directories, not what is in them."""
    one, two = a.identity(in_a), b.identity(in_b)
    if one != two:
        return True
    if stat.S_ISLNK(one[0]) and a.readlink(in_a) != b.readlink(in_b):
        return True
    return bool(one[-1]) and a.xattrs(in_a) != b.xattrs(in_b)


class Diff:
    """The result for two trees, given by chain id. `masks` is by the directory's nid in `b`."""

    def __init__(self, a: str, b: str) -> None:
        self.chains = (a, b)
        self.masks: dict[int, int] = {}
        self.counts = {ADDED: 0, CHANGED: 0, DELETED: 0}
        self.bytes = {ADDED: 0, CHANGED: 0, DELETED: 0}  # of regular files: b's of changed ones
        self.entries = 0  # looked at so far
        self.list_size = 0
        self._error: EngineError | None = None
        self._failed_at = 0.0
        self._done = threading.Event()
        self._list = -1
        self._buffer = bytearray()

    def __del__(self) -> None:
        if self._list >= 0:
            os.close(self._list)
            self._list = -1

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def stale(self) -> bool:
        """Failed a while ago: worth another attempt."""
        return self.done and self._error is not None and time.monotonic() - self._failed_at > RETRY

    def wait(self, seconds: float = WAIT) -> Diff:
        """This result when it is complete within `seconds`. DeadlineExceeded, or what made the comparison fail."""
        if not self._done.wait(seconds):
            raise DeadlineExceeded(
                f"the images are still being compared ({self.entries} entries so far)", hint="read it again in a moment"
            )
        if self._error is not None:
            raise self._error
        return self

    def read(self, offset: int, size: int) -> bytes:
        """A range of the list of paths: `A /path`, sorted by path as the trees are; only of a complete result."""
        return os.pread(self._list, size, offset) if self._list >= 0 else b""

    # --- the pass ---------------------------------------------------------------------------------------------------

    def compute(self, a: Tree, b: Tree, tmp: Path, stop: threading.Event) -> None:
        """Compare; ends in any case with `done`. Runs once, in a thread of its own."""
        try:
            with tempfile.TemporaryFile(dir=tmp, prefix="diff-") as file:
                self._list = os.dup(file.fileno())
            self._compare(a, b, stop)
            self._flush()
        except EngineError as error:
            self._error = error
        except KeyError as error:
            self._error = Damaged(f"a tree has an entry that is nowhere: {error}")
        except OSError as error:
            self._error = no_space(error) or Damaged(f"the images cannot be compared: {error}")
        except Exception:
            log.exception("comparing %s and %s", *self.chains)
            self._error = Damaged("the images cannot be compared: see engine.log")
        finally:
            self._buffer = bytearray()
            self._failed_at = time.monotonic()
            self._done.set()

    def _compare(self, a: Tree, b: Tree, stop: threading.Event) -> None:
        own = CHANGED if differ(a, a.root, b, b.root) else 0
        if own:
            self._note(CHANGED, b"/", 0)
        # (counterparts still to be looked at, path, nid in b, what was found below)
        stack: list[tuple[Iterator[Pair], bytes, int, list[int]]] = [
            (pairs(a, a.root, b, b.root), b"", b.root, [own]),
        ]
        while stack:
            below, path, nid, mask = stack[-1]
            for pair in below:
                self.entries += 1
                if not self.entries & 1023 and stop.is_set():
                    raise DeadlineExceeded("the engine is going down")
                here = path + b"/" + pair.name
                if pair.directories:
                    changed = differ(a, pair.a, b, pair.b)
                    if changed:
                        self._note(CHANGED, here, 0)
                    if len(stack) >= MAX_DEPTH:
                        raise TooLarge(f"directories more than {MAX_DEPTH} deep")
                    stack.append((pairs(a, pair.a, b, pair.b), here, pair.b, [CHANGED if changed else 0]))
                    break
                if pair.a < 0 or pair.b < 0 or pair.replaced:
                    if pair.a >= 0:
                        mask[0] |= DELETED
                        self._whole(DELETED, a, pair.a, pair.kind_a, here, stop)
                    if pair.b >= 0:
                        mask[0] |= ADDED
                        self._whole(ADDED, b, pair.b, pair.kind_b, here, stop)
                elif differ(a, pair.a, b, pair.b):
                    mask[0] |= CHANGED
                    self._note(CHANGED, here, _size(b, pair.b))
            else:
                stack.pop()
                if mask[0]:
                    if len(self.masks) >= MAX_DIRS:
                        raise TooLarge(f"more than {MAX_DIRS} directories differ")
                    self.masks[nid] = mask[0]
                    if stack:
                        stack[-1][3][0] |= mask[0]

    def _whole(self, what: int, tree: Tree, nid: int, kind: int, path: bytes, stop: threading.Event) -> None:
        """Everything at and below an entry that only one tree has."""
        self._note(what, path, _size(tree, nid))
        if kind != _DIR:
            return
        stack = [(path, iter(tree.readdir(nid)))]
        while stack:
            path, below = stack[-1]
            for name, child, sort in below:
                self.entries += 1
                if not self.entries & 1023 and stop.is_set():
                    raise DeadlineExceeded("the engine is going down")
                here = path + b"/" + name
                self._note(what, here, _size(tree, child))
                if sort == _DIR:
                    if len(stack) >= MAX_DEPTH:
                        raise TooLarge(f"directories more than {MAX_DEPTH} deep")
                    stack.append((here, iter(tree.readdir(child))))
                    break
            else:
                stack.pop()

    def _note(self, what: int, path: bytes, size: int) -> None:
        self.counts[what] += 1
        self.bytes[what] += size
        if b"\\" in path or b"\n" in path:
            path = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
        self._buffer += _LETTERS[what] + path + b"\n"
        if len(self._buffer) >= 1 << 18:
            self._flush()

    def _flush(self) -> None:
        view = memoryview(bytes(self._buffer))
        self._buffer.clear()
        if self.list_size + len(view) > MAX_LIST:
            raise TooLarge(f"the list of differences exceeds {MAX_LIST} bytes")
        while view:
            count = os.pwrite(self._list, view, self.list_size)
            self.list_size += count
            view = view[count:]


def _size(tree: Tree, nid: int) -> int:
    identity = tree.identity(nid)
    return identity[3] if stat.S_ISREG(identity[0]) else 0


class Diffs:
    """The comparisons asked for lately, by chain ids; at most two are computed at a time."""

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._tmp = trees.root / "tmp"
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], Diff] = OrderedDict()
        self._slots = threading.Semaphore(2)
        self._stop = threading.Event()

    def get(self, a: str, b: str) -> Diff:
        """The comparison of two trees, which goes on in the background: `wait` for it. NotFound, Damaged."""
        with self._lock:
            known = self._known.get((a, b))
            if known is not None and not known.stale:
                self._known.move_to_end((a, b))
                return known
        before, after = self._trees.open(a), self._trees.open(b)
        with self._lock:
            known = self._known.get((a, b))
            if known is not None and not known.stale:
                return known
            diff = self._known[(a, b)] = Diff(a, b)
            self._known.move_to_end((a, b))
            self._evict()
        threading.Thread(target=self._compute, args=(diff, before, after), name="diff", daemon=True).start()
        return diff

    def _compute(self, diff: Diff, a: Tree, b: Tree) -> None:
        with self._slots:
            diff.compute(a, b, self._tmp, self._stop)

    def _evict(self) -> None:
        total = sum(len(diff.masks) for diff in self._known.values())
        while len(self._known) > 1 and (len(self._known) > CACHED or total > CACHED_DIRS):
            _, gone = self._known.popitem(last=False)
            total -= len(gone.masks)

    def close(self) -> None:
        """End what is being computed. Idempotent."""
        self._stop.set()
