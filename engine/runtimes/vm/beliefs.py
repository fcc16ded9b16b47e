"""What a guest has told of its files and may be believed for a moment, so that it is not asked the same again. Floor 2.

Only here: how long what is believed. A guest changes its files without a word to us, so each belief is short: what was
told just now (FRESH) as often as somebody asks; what came with a listing, or as the answer to a change, for BELIEVED
seconds, USES times (a lookup and a stat), for the sake of `ls -l`, `find` and `cp -a`, which ask for each file soon
after. That a name is not there is believed only of directories whose entries are all known, made or listed by us, and
only just after the guest has told, with an answer to something else, that no other entry came or went meanwhile
(FOLDER in verbs.py): `cp -a` looks for every file it is about to make. Thread-safe; never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine.runtimes.vm import protocol
from engine.runtimes.vm.protocol import Attr, Folder, Values

FRESH = 0.05  # seconds
BELIEVED = 2.0
USES = 2
KNOWN_SECONDS = 60.0  # how long the names in a directory are followed before it has to be listed again
MAX_BELIEVED = 1 << 16

Key = tuple[str, bytes]  # root, path
Names = tuple[bytes, ...]


class Entry(NamedTuple):
    told: float
    uses: int
    attr: Attr


class Xattrs(NamedTuple):
    told: float
    names: Names


@dataclass(slots=True)
class Directory:
    """One whose entries are known: all of them, as of `sure`."""

    names: set[bytes]
    folder: Folder
    since: float
    sure: float


def parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


class Beliefs:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # of all below
        self._attrs: dict[Key, Entry] = {}
        self._xattrs: dict[Key, Xattrs] = {}
        self._directories: dict[Key, Directory] = {}
        self._turn = 0

    # --- asking ---------------------------------------------------------------------------------------------------

    def attr(self, root: str, path: bytes, *, fresh: bool = False) -> Attr | None:
        """`fresh`: only what was told just now."""
        now = time.monotonic()
        with self._lock:
            entry = self._attrs.get((root, path))
            if entry is None:
                return None
            if now - entry.told < FRESH:
                return entry.attr
            if fresh or not entry.uses or now - entry.told > BELIEVED:
                return None
            self._attrs[root, path] = entry._replace(uses=entry.uses - 1)
            return entry.attr

    def xattrs(self, root: str, path: bytes) -> Names | None:
        with self._lock:
            known = self._xattrs.get((root, path))
            return known.names if known is not None and time.monotonic() - known.told < BELIEVED else None

    def absent(self, root: str, path: bytes) -> bool:
        """Whether there is certainly nothing at `path`."""
        directory, _, name = path.rpartition(b"/")
        now = time.monotonic()
        with self._lock:
            known = self._directories.get((root, directory))
            return known is not None and now - known.sure < FRESH and name not in known.names

    @property
    def turn(self) -> int:
        """Of changes. What was asked for in an earlier one is not believed."""
        return self._turn

    # --- telling --------------------------------------------------------------------------------------------------

    def told(self, turn: int, root: str, path: bytes, values: Values, uses: int = 0) -> Attr:
        """An answer with attributes of `path`. Without `uses` they are believed while they are fresh, no longer: who
        asks again and again waits for something to happen."""
        attr = protocol.parse_attr(values.need("attr"))
        names = values.get("names")
        self.learn(turn, root, [(path, attr, None if names is None else protocol.parse_names(names))], uses)
        return attr

    def learn(
        self, turn: int, root: str, entries: Iterable[tuple[bytes, Attr, Names | None]], uses: int = USES
    ) -> None:
        now = time.monotonic()
        with self._lock:
            if turn != self._turn:
                return
            for kept in (self._attrs, self._xattrs, self._directories):
                if len(kept) >= MAX_BELIEVED:
                    kept.clear()
            for path, attr, names in entries:
                self._attrs[root, path] = Entry(now, uses, attr)
                if names is not None:
                    self._xattrs[root, path] = Xattrs(now, names)

    def listed(self, turn: int, root: str, path: bytes, names: set[bytes], values: Values) -> None:
        """All names of a directory came in one answer."""
        found = values.get("folder")
        if found is None:
            return
        before, after = protocol.parse_folder(found)
        with self._lock:
            if turn == self._turn and before == after:
                self._directories[root, path] = Directory(names, after, time.monotonic(), time.monotonic())

    def made(self, turn: int, root: str, path: bytes, attr: Attr) -> None:
        """A new directory: nothing is in it."""
        with self._lock:
            if turn == self._turn:
                folder = attr.mtime_ns, attr.ctime_ns
                self._directories[root, path] = Directory(set(), folder, time.monotonic(), time.monotonic())

    def entry(self, root: str, path: bytes, values: Values, *, there: bool) -> None:
        """An answer that tells of the directory of `path`, which is now there or not."""
        found = values.get("folder")
        if found is None:
            return
        before, after = protocol.parse_folder(found)
        directory, _, name = path.rpartition(b"/")
        now = time.monotonic()
        with self._lock:
            known = self._directories.get((root, directory))
            if known is None:
                return
            if known.folder != before or now - known.since > KNOWN_SECONDS:
                del self._directories[root, directory]  # somebody else was there
                return
            (known.names.add if there else known.names.discard)(name)
            known.folder, known.sure = after, now

    # --- forgetting -----------------------------------------------------------------------------------------------

    def written(self, root: str, path: bytes) -> int:
        """Its size and times are others now; its xattrs (the kernel asks for them at every write) are not. The turn."""
        with self._lock:
            self._turn += 1
            self._attrs.pop((root, path), None)
            return self._turn

    def forget(self, root: str, *paths: bytes, names: bool = False) -> int:
        """Attributes of these files and of the directories they are in; with `names` also which names are in those.
        The turn."""
        with self._lock:
            self._turn += 1
            for path in paths:
                for gone in (path, parent(path)):
                    self._attrs.pop((root, gone), None)
                    self._xattrs.pop((root, gone), None)
                self._directories.pop((root, path), None)
                if names:
                    self._directories.pop((root, parent(path)), None)
            return self._turn

    def forget_below(self, root: str, path: bytes) -> None:
        """All of a tree that is somewhere else now."""
        with self._lock:
            self._turn += 1
            for kept in (self._attrs, self._xattrs, self._directories):
                for key in [key for key in kept if key[0] == root and key[1].startswith(path + b"/")]:
                    del kept[key]
