"""An image's own documents, its manifest and its configuration, read together. Floor 2. Pure.

Only here: which layer of the one is which of the other, and how the image was made, in a Dockerfile's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from engine.errors import Damaged
from engine.images import manifests
from engine.model import ImageConfig


@dataclass(frozen=True, slots=True)
class ImageLayer:
    diff_id: str
    blob: str  # digest of the blob the manifest names
    media_type: str
    size: int  # bytes of that blob
    created_by: str


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """One step of how the image was made; `diff_id` is "" for a step without a layer, `size` its files' bytes."""

    created: str
    text: str
    size: int
    diff_id: str


@dataclass(frozen=True, slots=True)
class Documents:
    """Of one image, which agree."""

    manifest: manifests.Manifest
    config: ImageConfig
    layers: tuple[ImageLayer, ...]  # lowest first

    def history(self, sizes: Mapping[str, int]) -> list[HistoryLine]:
        """How the image was made, oldest step first. `sizes`: bytes of the files of its layers, by diff_id."""
        left = [layer.diff_id for layer in self.layers]
        out = []
        for step in self.config.history or ():
            diff_id = left.pop(0) if left and not step.empty_layer else ""
            text = dockerfile_line(step.created_by) or step.comment
            out.append(HistoryLine(step.created, text, sizes.get(diff_id, 0), diff_id))
        return out + [HistoryLine("", "", sizes.get(diff_id, 0), diff_id) for diff_id in left]


def read(manifest: bytes, media_type: str, config: bytes) -> Documents:
    """Both, as they were pulled. Damaged when they disagree."""
    document = manifests.parse(manifest, media_type)
    if not isinstance(document, manifests.Manifest):
        raise Damaged("an index where a manifest is expected")
    parsed = manifests.parse_config(config)
    manifests.check_pair(document, parsed)
    steps = [step for step in parsed.history or () if not step.empty_layer]
    if len(steps) != len(document.layers):  # a history that does not fit says nothing about which layer is whose
        steps = []
    layers = tuple(
        ImageLayer(
            diff_id,
            entry.digest,
            entry.media_type,
            entry.size,
            dockerfile_line(steps[n].created_by) if steps else "",
        )
        for n, (diff_id, entry) in enumerate(zip(parsed.rootfs.diff_ids, document.layers, strict=True))
    )
    return Documents(document, parsed, layers)


def moment(text: str | None) -> str:
    """`text` when it is a point in time (RFC 3339), else ''."""
    if not text:
        return ""
    try:
        datetime.fromisoformat(re.sub(r"\.\d+", "", text))
    except ValueError:
        return ""
    return text[:64]


def dockerfile_line(created_by: str) -> str:
    """`/bin/sh -c #(nop) CMD ["x"]` and `RUN /bin/sh -c y # buildkit` as a Dockerfile would say it, in one line."""
    text = " ".join(created_by.split())
    if text.startswith("/bin/sh -c #(nop) "):
        return text.removeprefix("/bin/sh -c #(nop) ").strip()
    if text.startswith("/bin/sh -c "):
        return "RUN " + text.removeprefix("/bin/sh -c ")
    return text.removesuffix(" # buildkit").replace("RUN /bin/sh -c ", "RUN ", 1)
