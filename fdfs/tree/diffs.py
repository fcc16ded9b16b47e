"""images/<a>/diff/<b>: what image b has that a lacks, what differs, what is gone. Floor 5.

`<b>` is a name as under images/ (one with slashes is nested directories), a digest, or an id as Docker shortens it.
Listed are the other images: by their names, those without one by digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from engine.errors import EngineError
from engine.images.diff import ADDED, CHANGED, DELETED, Diff
from fdfs.diff import DiffGraft
from fdfs.entry import Dir, File, Row
from fdfs.tree.tags import names
from fdfs.tree.text import flat

Extra = dict[str, dict[str, str]]


def origins(engine: Any, digest: str) -> Extra:
    """What provenance adds for each layer of an image: what created it and its media type."""
    return {
        layer.diff_id: {"created_by": layer.created_by, "media_type": layer.media_type}
        for layer in engine.images.layers(digest)
    }


def _listed(engine: Any, digest: str, *parts: str) -> Iterable[str]:
    known = names(engine)
    here = "/".join(parts)
    out = set()
    for name in known.below.get(here, ()):
        path = f"{here}/{name}" if here else name
        if path in known.below or known.digests.get(path) != digest:
            out.add(name)
    if not parts:
        tagged = set(known.digests.values())
        out |= {image.digest for image in engine.images.all() if image.digest != digest and image.digest not in tagged}
    return out


def _row(engine: Any, digest: str, *parts: str) -> Row | None:
    if "/".join(parts) in names(engine).below:
        return NESTED
    try:
        _other(engine, parts)
    except EngineError:
        return None
    return DIFF


def _other(engine: Any, parts: tuple[str, ...]) -> str:
    """The digest of the image that is meant."""
    name = "/".join(parts)
    known = names(engine).digests.get(name)
    return known if known is not None else str(engine.images.resolve(name).digest)


def _diff(engine: Any, digest: str, *parts: str) -> tuple[Diff, str]:
    """The comparison, which may still be going on, and the other image's digest."""
    other = _other(engine, parts)
    return engine.diffs.get(engine.images.get(digest).chain_id, engine.images.get(other).chain_id), other


def _view(view: str) -> Callable[..., DiffGraft]:
    def graft(engine: Any, digest: str, *parts: str) -> DiffGraft:
        diff, other = _diff(engine, digest, *parts)
        a, b = (engine.trees.open(chain) for chain in diff.chains)
        return DiffGraft(view, diff, a, b, origins(engine, digest if view in ("before", "deleted") else other))

    return graft


def summary(engine: Any, digest: str, *keys: Any) -> bytes:
    *parts, offset, size = keys
    return _diff(engine, digest, *parts)[0].wait().read(offset, size)


def summary_size(engine: Any, digest: str, *parts: str) -> int:
    diff = _diff(engine, digest, *parts)[0]
    return diff.list_size if diff.done else 0


def state(engine: Any, digest: str, *parts: str) -> str:
    diff, other = _diff(engine, digest, *parts)
    try:
        diff.wait(0)
        text = "complete"
    except EngineError as error:
        text = "comparing" if not diff.done else f"failed: {error.reason}"
    return flat(
        {
            "state": text,
            "image": other,
            "added": diff.counts[ADDED],
            "changed": diff.counts[CHANGED],
            "deleted": diff.counts[DELETED],
            "added_bytes": diff.bytes[ADDED],
            "changed_bytes": diff.bytes[CHANGED],
            "deleted_bytes": diff.bytes[DELETED],
        }
    )


DIFF = Dir(
    name="<image>",
    doc="from this image to another one; times alone are no difference",
    rows=(
        Dir(name="added", doc="what only the other has", graft=_view("added")),
        Dir(name="changed", doc="what differs, as the other has it", graft=_view("changed")),
        Dir(name="before", doc="the same paths as this image has them", graft=_view("before")),
        Dir(name="deleted", doc="what only this image has", graft=_view("deleted")),
        File(name="summary", doc="A, M or D and a path per line", read=summary, size=summary_size),
        File(name="state", doc="whether the comparison is complete; counts and bytes, flat-keyed", show=state),
    ),
)
NESTED = Dir(name="<host or path>", doc="images whose names have a path", names=_listed, find=_row)
DIFFS = Dir(name="diff", doc="what changed from this image to another", names=_listed, find=_row, kinds=(DIFF, NESTED))
