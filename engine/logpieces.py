"""Rendered pieces of logs, shared by all who read the same: a hundred followers cost one rendering. Floor 1.

Only here: how much of them is kept. Bounded in bytes for all logs together, the piece used last stays longest.
Thread-safe; its lock is held for a look-up only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

from engine.logindex import Segment

MOST = 24 << 20  # bytes

Key = tuple[Segment, str, int]  # the segment, the view, and the raw offset where the piece begins


class Pieces:
    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, tuple[int, bytes]] = OrderedDict()  # the raw offset of its end, and the text
        self.size = 0  # bytes of text

    def get(self, segment: Segment, view: str, start: int, end: int) -> bytes:
        """The text from `start` to `end` or further. What a piece has grown by is rendered and added.

        A segment's own lock must be held, as for every call of a segment.
        """
        key = segment, view, start
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        if known is not None and known[0] >= end:
            return known[1]
        until, text = known or (start, b"")
        text += segment.rendered(view, until, end)
        with self._lock:
            self.size += len(text) - len(self._known.get(key, (0, b""))[1])
            self._known[key] = end, text
            self._known.move_to_end(key)
            while self.size > self._most and len(self._known) > 1:
                self.size -= len(self._known.popitem(last=False)[1][1])
        return text

    def forget(self, segments: Collection[Segment]) -> None:
        gone = set(segments)
        with self._lock:
            for key in [key for key in self._known if key[0] in gone]:
                self.size -= len(self._known.pop(key)[1])


shared = Pieces()
