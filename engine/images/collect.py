"""What nothing refers to, and whether what is here is whole. Floor 2.

Only here: the order in which unreferenced things go (merged trees, then layers from the top of the sharing order down,
then blobs), and the check of an image's bytes. The caller (catalog.py) sees to it that no pull is under way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

from engine.errors import Busy, Damaged, NotFound
from engine.images.manifests import Manifest
from engine.jobs import Task
from engine.store.blobs import Blobs
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees

CHUNK = 1 << 20


def unreferenced(meta: Meta, blobs: Blobs, layers: Layers, trees: Trees) -> int:
    """Delete what no image needs; returns the bytes freed. What is still held by someone stays for the next time."""
    freed = 0
    kept = {row["diff_id"] for row in meta.query("SELECT diff_id FROM image_layers")}
    deps: dict[str, list[str]] = {}
    for row in meta.query("SELECT diff_id, dep FROM layer_deps"):
        deps.setdefault(row["diff_id"], []).append(row["dep"])
    todo = list(kept)
    while todo:  # a layer keeps those whose bodies it shares
        for dep in deps.get(todo.pop(), ()):
            if dep not in kept:
                kept.add(dep)
                todo.append(dep)
    chains = {row["chain_id"] for row in meta.query("SELECT chain_id FROM images")}
    for row in meta.query("SELECT chain_id FROM trees"):
        if row["chain_id"] not in chains and row["chain_id"] not in kept:
            freed += _try(trees.remove, row["chain_id"])
    doomed = [info.diff_id for info in layers.all() if info.diff_id not in kept]
    while doomed:
        users = {dep for diff_id in doomed for dep in deps.get(diff_id, ())}
        free = [diff_id for diff_id in doomed if diff_id not in users] or doomed
        for diff_id in free:
            freed += _try(layers.remove, diff_id)
        doomed = [] if free is doomed else [diff_id for diff_id in doomed if diff_id not in free]
    rows = meta.query(
        "SELECT digest FROM blobs WHERE digest NOT IN (SELECT digest FROM images)"
        " AND digest NOT IN (SELECT config FROM images) AND digest NOT IN (SELECT blob FROM image_layers)"
    )
    for row in rows:
        freed += _try(blobs.remove, row["digest"])
    return freed


def _try(remove: Callable[[str], int], digest: str) -> int:
    try:
        return remove(digest)
    except (Busy, NotFound):
        return 0  # in use at this moment, or gone already


def verify(
    meta: Meta,
    blobs: Blobs,
    layers: Layers,
    manifest: Manifest,
    digest: str,
    diff_ids: Sequence[str],
    progress: Task | Callable[[str], None] | None,
) -> str:
    """Hash the blobs of an image that are here and every body of its layers. Damaged names the first fault."""
    task = progress if isinstance(progress, Task) else None

    def say(text: str) -> None:
        if task is not None:
            task.check()
            task.progress(text)
        elif progress is not None:
            progress(text)  # type: ignore[operator]

    checked = 0
    for entry in [digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)]:
        if blobs.has(entry):  # a layer's blob may have been evicted: its bodies are what counts
            say(f"blob {entry}")
            blobs.verify(entry)
            checked += 1
        elif entry in (digest, manifest.config.digest):
            raise NotFound("the blob is gone", at=entry, hint="pull the image again")
    bodies = total = 0
    for diff_id in diff_ids:
        say(f"layer {diff_id}")
        for entry_ in layers.entries(diff_id):
            if entry_.sha256 and entry_.size:
                _body(layers, entry_.data or diff_id, entry_.offset, entry_.size, entry_.sha256, entry_.path)
                bodies += 1
                total += entry_.size
                if task is not None:
                    task.check()
    return f"{checked} blobs and {bodies} files ({total} bytes) match their digests"


def _body(layers: Layers, diff_id: str, offset: int, size: int, sha256: bytes, path: bytes) -> None:
    digester, end = hashlib.sha256(), offset + size
    try:
        fd = os.open(layers.data_path(diff_id), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Damaged("the layer's data is gone", at=diff_id, hint="remove the image and pull it again") from error
    try:
        while offset < end and (piece := os.pread(fd, min(CHUNK, end - offset), offset)):
            digester.update(piece)
            offset += len(piece)
    finally:
        os.close(fd)
    if digester.digest() != sha256:
        name = path.decode(errors="replace")
        raise Damaged(f"/{name}: the content does not match its digest", at=diff_id,
                      hint="remove the image and pull it again")  # fmt: skip
