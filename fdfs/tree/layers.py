"""layers/: every layer in the store by diff_id, with its own files. Floor 5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.errors import InvalidArgument, NotFound
from engine.store.index import Kind
from fdfs.entry import BindSource, Dir, File, Row
from fdfs.rootfs import TreeGraft
from fdfs.tree.text import line, lines, paths


def _names(engine: Any) -> list[str]:
    return [layer.diff_id for layer in engine.layers.all()]


def _find(engine: Any, diff_id: str) -> Row | None:
    try:
        return LAYER if engine.layers.has(diff_id) else None
    except (NotFound, InvalidArgument):
        return None


def _blob(engine: Any, diff_id: str) -> Any:
    """The newest known compressed form, or None."""
    return engine.meta.row(
        "SELECT digest, media_type, size FROM layer_blobs WHERE diff_id = ? ORDER BY rowid DESC LIMIT 1", (diff_id,)
    )


def blob(engine: Any, diff_id: str) -> str:
    found = _blob(engine, diff_id)
    return line(found["digest"]) if found else ""


def digest(engine: Any, diff_id: str) -> str:
    return line(engine.layers.info(diff_id).diff_id)


def media_type(engine: Any, diff_id: str) -> str:
    found = _blob(engine, diff_id)
    return line(found["media_type"]) if found else ""


def compressed_bytes(engine: Any, diff_id: str) -> str:
    found = _blob(engine, diff_id)
    return line(found["size"]) if found else ""


def size_bytes(engine: Any, diff_id: str) -> str:
    return line(engine.layers.info(diff_id).size)


def _images(engine: Any, diff_id: str) -> list[str]:
    rows = engine.meta.query("SELECT DISTINCT image FROM image_layers WHERE diff_id = ? ORDER BY image", (diff_id,))
    return [row["image"] for row in rows]


def _origin(engine: Any, diff_id: str) -> str:
    """What an image that has it says created it; the first that says so."""
    for image in _images(engine, diff_id):
        try:
            for layer in engine.images.layers(image):
                if layer.diff_id == diff_id and layer.created_by:
                    return str(layer.created_by)
        except NotFound:
            continue
    return ""


def created_by(engine: Any, diff_id: str) -> str:
    return line(_origin(engine, diff_id).replace("\n", " "))


def used_by(engine: Any, diff_id: str) -> str:
    return lines(_images(engine, diff_id))


def deleted(engine: Any, diff_id: str) -> bytes:
    return paths(engine.layers.deleted(diff_id))


def _below(engine: Any, diff_id: str) -> Any:
    """The tree of the layers below this one in the first image that has it; None when it is lowest or in no image."""
    for image in _images(engine, diff_id):
        try:
            diffs = [layer.diff_id for layer in engine.images.layers(image)]
        except NotFound:
            continue
        position = diffs.index(diff_id)
        if not position:
            return None
        from engine.store.trees import chain_id

        chain = chain_id(diffs[:position])
        return engine.trees.open(chain) if engine.trees.has(chain) else None
    return None


def changes(engine: Any, diff_id: str) -> bytes:
    """A, M or D and a path per line. Without the tree below at hand, what is there counts as added."""
    below = _below(engine, diff_id)
    out: list[tuple[bytes, str]] = [(_absolute(path), "D") for path in engine.layers.deleted(diff_id)]
    for path, what in _entries(engine, diff_id):
        out.append((path, "M" if below is not None and _in(below, path) else what))
    return b"".join(kind.encode() + b" " + paths([path]) for path, kind in sorted(out))


def _entries(engine: Any, diff_id: str) -> Iterator[tuple[bytes, str]]:
    """Every path the layer brings, by its tree; of one that makes no tree by itself, by its archive."""
    if not engine.trees.has(diff_id):
        seen = {
            entry.path for entry in engine.layers.entries(diff_id) if entry.kind not in (Kind.WHITEOUT, Kind.OPAQUE)
        }
        yield from ((_absolute(path), "A") for path in sorted(seen - {b""}))
        return
    for path, _ in engine.trees.open(diff_id).walk():
        yield _absolute(path), "A"


def _absolute(path: bytes) -> bytes:
    return b"/" + path.lstrip(b"/")


def _in(tree: Any, path: bytes) -> bool:
    try:
        tree.lookup(path)
    except KeyError:
        return False
    return True


def files(engine: Any, diff_id: str) -> TreeGraft:
    if not engine.trees.has(diff_id):
        raise NotFound("the tree of this layer has not been built", at=diff_id)
    found = _blob(engine, diff_id)
    extra = {"created_by": _origin(engine, diff_id), "media_type": found["media_type"] if found else ""}
    return TreeGraft(engine.trees.open(diff_id), diff_id, {diff_id: extra})


def files_source(engine: Any, diff_id: str) -> BindSource:
    return BindSource(chain=diff_id if engine.trees.has(diff_id) else "")


LAYER = Dir(
    name="sha256:<diff_id>",
    doc="one layer, by the digest of its uncompressed tar",
    rows=(
        Dir(name="fs", doc="what this layer adds or changes, read-only", graft=files, bind=files_source),
        File(name="deleted", doc="what it removes, one path per line", show=deleted),
        File(name="changes", doc="A, M or D and a path per line, against the layers below", show=changes, size=None),
        File(name="blob", doc="digest of its compressed form as pulled", show=blob),
        File(name="digest", doc="its diff_id", show=digest),
        File(name="media_type", doc="of its compressed form", show=media_type),
        File(name="created_by", doc="the build step that made it", show=created_by),
        File(name="size_bytes", doc="sum of its files", show=size_bytes),
        File(name="compressed_bytes", doc="size of its compressed form", show=compressed_bytes),
        File(name="used_by", doc="images that have it, one digest per line", show=used_by),
    ),
)

LAYERS = Dir(name="layers", doc="every layer in the store", names=_names, find=_find, kinds=(LAYER,))
