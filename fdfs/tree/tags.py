"""Names of images as people type them, as a tree: ghcr.io/o/r:tag is three levels. Floor 5.

Only here: the snapshot of all short names that listings and lookups share. It is kept until the journal has a new event
(every change of a tag is one), so that listing a thousand images does not read the catalog a thousand times.
Thread-safe: a snapshot never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from engine.images.reference import parse


class Names(NamedTuple):
    """`digests`: short name -> image. `below`: directory ("" the top) -> the names in it."""

    digests: Mapping[str, str]
    below: Mapping[str, frozenset[str]]


_snapshots: WeakKeyDictionary[Any, tuple[int, Names]] = WeakKeyDictionary()


@lru_cache(1 << 14)
def short(reference: str) -> str:
    """The familiar form, unless it means another image: docker.io/r.io/x is not r.io/x."""
    familiar = parse(reference).familiar()
    return familiar if parse(familiar).normalised() == reference else reference


def names(engine: Any) -> Names:
    """All names now."""
    sequence = engine.journal.last  # before the tags are read: a change in between makes this snapshot a stale one
    known = _snapshots.get(engine)
    if known is not None and known[0] == sequence:
        return known[1]
    digests = {short(reference): digest for reference, digest in engine.images.tags().items()}
    below: dict[str, set[str]] = {"": set()}
    for name in digests:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            below.setdefault("/".join(parts[:depth]), set()).add(part)
    found = Names(digests, {key: frozenset(value) for key, value in below.items()})
    _snapshots[engine] = (sequence, found)
    return found
