"""Every distinct file content of the store, once, by its digest. Floor 1.

Only here: how a content is found, listed in digest order without loading all of them, and where it is used.
Thread-safe.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import Damaged, NotFound
from engine.store.index import find_body
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.tree import Handle
from engine.store.trees import Trees

PAGE = 1000  # contents read from the catalog at a time
MAX_PLACES = 10_000  # of one content
CACHED = 64  # answers of `places` kept


@dataclass(frozen=True, slots=True)
class Content:
    """`size` bytes from `offset` of the `data` of layer `diff_id`."""

    sha256: bytes
    diff_id: str
    offset: int
    size: int


class Contents:
    """Of the store that `layers` and `trees` are in."""

    def __init__(self, meta: Meta, layers: Layers, trees: Trees) -> None:
        self._meta, self._layers, self._trees = meta, layers, trees
        self._lock = threading.Lock()
        self._places: OrderedDict[bytes, tuple[tuple[int, int], list[tuple[str, bytes]]]] = OrderedDict()

    def find(self, sha256: bytes) -> Content:
        """NotFound."""
        row = self._meta.row(f"{_SELECT} WHERE b.sha256 = ?", (sha256,))
        if row is None:
            raise NotFound("no file in the store has this content", at=sha256.hex())
        return Content(*row)

    def page(self, after: bytes) -> list[Content]:
        """The next PAGE contents in order of digest, from the first one above `after` (b"" for all) on."""
        rows = self._meta.query(f"{_SELECT} WHERE b.sha256 > ? ORDER BY b.sha256 LIMIT {PAGE}", (after,))
        return [Content(*row) for row in rows]

    def count(self) -> int:
        row = self._meta.row("SELECT count(*) AS n FROM bodies")
        return int(row["n"]) if row else 0

    def open(self, content: Content) -> Handle:
        """The file that has the content, open as long as somebody refers to it. Damaged when it is gone."""
        try:
            return self._trees.handle(content.diff_id)
        except FileNotFoundError as error:
            raise Damaged("the layer's data is gone", at=content.diff_id, hint="pull its images again") from error

    def places(self, sha256: bytes) -> list[tuple[str, bytes]]:
        """(diff_id, path) of the files with this content, at most MAX_PLACES. NotFound, Damaged.

        Found by looking through the indexes of the layers that can have it, on demand; the last answers are kept.
        """
        content = self.find(sha256)
        row = self._meta.row("SELECT count(*), coalesce(max(id), 0) FROM layers")
        assert row is not None
        state = (int(row[0]), int(row[1]))
        with self._lock:
            known = self._places.get(sha256)
            if known is not None and known[0] == state:
                self._places.move_to_end(sha256)
                return known[1]
        found = list(self._search(content))
        with self._lock:
            self._places[sha256] = (state, found)
            while len(self._places) > CACHED:
                self._places.popitem(last=False)
        return found

    def _search(self, content: Content) -> Iterator[tuple[str, bytes]]:
        rows = self._meta.query("SELECT diff_id FROM layer_deps WHERE dep = ? ORDER BY diff_id", (content.diff_id,))
        left = MAX_PLACES
        for diff_id in [content.diff_id, *(str(row["diff_id"]) for row in rows)]:
            try:
                for entry in find_body(self._layers.index_path(diff_id), diff_id, content.sha256):
                    yield diff_id, entry.path
                    left -= 1
                    if not left:
                        return
            except NotFound:
                continue  # removed meanwhile


_SELECT = "SELECT b.sha256, l.diff_id, b.offset, b.size FROM bodies b JOIN layers l ON l.id = b.layer"


def read(handle: Handle, content: Content, size: int, offset: int) -> bytes:
    """Up to `size` bytes of a content from `offset`; short at the end. Damaged when the data is cut off."""
    left = min(size, content.size - offset)
    out = b""
    while left > len(out):
        piece = os.pread(handle.fd, left - len(out), content.offset + offset + len(out))
        if not piece:
            raise Damaged("the layer's data is truncated", at=content.diff_id, hint="pull its images again")
        out = out + piece if out else piece
    return out
