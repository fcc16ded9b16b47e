"""The bytes of an image that leave the store: its blobs as they were pulled, its layers as tars. Floor 2.

Only here: what is done when a layer's blob is not in the store (it was never fetched because another blob of the same
layer was there, or has been dropped since). Compression cannot be repeated to the byte, so only an uncompressed blob
can be had from another form; for everything else the answer names the blob. Stateless, thread-safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from engine.errors import Damaged, NotFound
from engine.images import manifests
from engine.images.catalog import Images
from engine.images.documents import ImageLayer
from engine.jobs import Task
from engine.store.inflate import inflate

PIECE = 1 << 20


def has_blob(images: Images, layer: ImageLayer) -> bool:
    """Whether the blob the manifest names can be had."""
    return images.blobs.has(layer.blob) or (layer.blob == layer.diff_id and _source(images, layer.diff_id) is not None)


def missing(layer: ImageLayer) -> NotFound:
    return NotFound(
        f"the blob {layer.blob} of layer {layer.diff_id} is not in the store, and compressing it again would give "
        "other bytes",
        at=layer.blob,
        hint="remove the image and pull it again, or save it with format=docker, whose layers are not compressed",
    )


def blob(images: Images, layer: ImageLayer, task: Task) -> Iterator[bytes]:
    """A layer's blob in pieces, checked against its digest at the end. NotFound naming the blob; Damaged."""
    if images.blobs.has(layer.blob):
        return _checked(images.blobs.chunks(layer.blob, PIECE), layer.blob, task)
    if layer.blob == layer.diff_id:
        return tar(images, layer, task)
    raise missing(layer)


def tar(images: Images, layer: ImageLayer, task: Task) -> Iterator[bytes]:
    """A layer's uncompressed tar in pieces, from whichever of its blobs is here. NotFound; Damaged."""
    source = layer.blob if images.blobs.has(layer.blob) else _source(images, layer.diff_id)
    if source is None:
        raise NotFound(
            f"the blob {layer.blob} of layer {layer.diff_id} is not in the store, nor any other form of that layer",
            at=layer.blob,
            hint="remove the image and pull it again",
        )
    return _checked(inflate(images.blobs.chunks(source, PIECE)), layer.diff_id, task)


def _source(images: Images, diff_id: str) -> str | None:
    """A blob in the store that inflates to `diff_id`."""
    rows = images.meta.query("SELECT digest FROM layer_blobs WHERE diff_id = ? ORDER BY digest", (diff_id,))
    return next((str(row["digest"]) for row in rows if images.blobs.has(row["digest"])), None)


def _checked(pieces: Iterator[bytes], digest: str, task: Task) -> Iterator[bytes]:
    digester = hashlib.sha256()
    for piece in pieces:
        task.check()
        digester.update(piece)
        yield piece
    if digester.hexdigest() != digest[7:]:
        raise Damaged("the stored content does not match its digest", at=digest, hint="pull the image again")


def manifest_of(images: Images, digest: str) -> tuple[bytes, manifests.Manifest]:
    """An image's manifest, as bytes and read."""
    raw = images.manifest(digest)
    document = manifests.parse(raw, images.get(digest).media_type)
    assert isinstance(document, manifests.Manifest)
    return raw, document
