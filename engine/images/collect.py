"""What nothing refers to, and whether what is here is whole. Floor 2.

Only here: what needs what, the order in which unreferenced things go (merged trees, then layers, then blobs), and the
check of an image's bytes. The caller (catalog.py, gc.py) sees to it that no pull is under way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import Damaged, NotFound
from engine.images.manifests import Manifest
from engine.jobs import Task
from engine.store.blobs import Blobs
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees
from engine.store.usage import allocated

CHUNK = 1 << 20
BATCH = 1000  # objects deleted in one transaction


def account(meta: Meta, tx: Any, image: str, diff_ids: Sequence[str], event: str) -> None:
    """Note, before an image enters the catalog, which layers others had brought, and that it can be had again."""
    if event == "imagePulled":
        tx.execute("INSERT OR IGNORE INTO pulled VALUES (?)", (image,))
    if tx.execute("SELECT 1 FROM images WHERE digest = ?", (image,)).fetchone() is None:
        for diff_id in dict.fromkeys(diff_ids):
            there = tx.execute("SELECT 1 FROM image_layers WHERE diff_id = ?", (diff_id,)).fetchone()
            meta.count("layers_hits" if there else "layers_misses")


@dataclass(slots=True)
class Holdings:
    """What the store holds and what needs what, as of one moment; `drop` says what would be left without an image."""

    images: dict[str, tuple[str, str]]  # digest -> (config, chain id)
    layers_of: dict[str, list[tuple[str, str]]]  # image -> (diff_id, blob), lowest first
    deps: dict[str, list[str]]  # layer -> layers whose bodies it shares
    layers: list[str]  # newest first
    trees: list[str]
    blobs: list[str]  # oldest first
    indexes: dict[str, list[str]]  # image -> indexes that list it

    @classmethod
    def read(cls, meta: Meta) -> Holdings:
        images = {row[0]: (row[1], row[2]) for row in meta.query("SELECT digest, config, chain_id FROM images")}
        layers_of: dict[str, list[tuple[str, str]]] = {}
        for row in meta.query("SELECT image, diff_id, blob FROM image_layers ORDER BY image, position"):
            layers_of.setdefault(row[0], []).append((row[1], row[2]))
        deps: dict[str, list[str]] = {}
        for row in meta.query("SELECT diff_id, dep FROM layer_deps"):
            deps.setdefault(row[0], []).append(row[1])
        indexes: dict[str, list[str]] = {}
        for row in meta.query("SELECT manifest, index_digest FROM index_entries"):
            indexes.setdefault(row[0], []).append(row[1])
        return cls(
            images,
            layers_of,
            deps,
            [row[0] for row in meta.query("SELECT diff_id FROM layers ORDER BY id DESC")],
            [row[0] for row in meta.query("SELECT chain_id FROM trees ORDER BY chain_id")],
            [row[0] for row in meta.query("SELECT digest FROM blobs ORDER BY created_ns, digest")],
            indexes,
        )

    def needed(self, without: Container[str] = ()) -> tuple[set[str], set[str], set[str]]:
        """(layers, trees, blobs) that the images need, were those in `without` not there."""
        layers: set[str] = set()
        trees: set[str] = set()
        blobs: set[str] = set()
        for digest, (config, chain) in self.images.items():
            if digest in without:
                continue
            blobs |= {digest, config, *self.indexes.get(digest, ())}
            trees.add(chain)
            for diff_id, blob in self.layers_of.get(digest, ()):
                layers.add(diff_id)
                blobs.add(blob)
        todo = list(layers)
        while todo:  # a layer keeps those whose bodies it shares
            for dep in self.deps.get(todo.pop(), ()):
                if dep not in layers:
                    layers.add(dep)
                    todo.append(dep)
        return layers, trees | layers, blobs

    def unneeded(self, without: Container[str] = ()) -> tuple[list[str], list[str], list[str]]:
        """(layers, trees, blobs) in the store that nothing needs, were the images in `without` not there."""
        layers, trees, blobs = self.needed(without)
        return (
            [digest for digest in self.layers if digest not in layers],
            [digest for digest in self.trees if digest not in trees],
            [digest for digest in self.blobs if digest not in blobs],
        )


def delete(
    blobs: Blobs, layers: Layers, trees: Trees, doomed: tuple[list[str], list[str], list[str]], task: Task | None = None
) -> None:
    """Delete (layers, trees, blobs), many at a time; what has found a user meanwhile stays. Cancelled between steps."""
    done, total = 0, sum(map(len, doomed))
    steps: tuple[tuple[list[str], Callable[[list[str]], None]], ...] = (
        (doomed[1], trees.remove_many),
        (doomed[0], layers.remove_many),
        (doomed[2], blobs.remove_many),
    )
    for digests, remove in steps:
        # layers go at once: what may go depends on what else goes
        step = max(1, len(digests)) if remove == layers.remove_many else BATCH
        for start in range(0, len(digests), step):
            if task is not None:
                task.check()
                task.progress(f"{done} of {total} objects deleted")
            part = digests[start : start + step]
            remove(part)
            done += len(part)


def paths_of(blobs: Blobs, layers: Layers, trees: Trees, kind: str, digest: str) -> Path:
    """The file or directory of an object."""
    if kind == "layer":
        return layers.directory(digest)
    return trees.directory(digest) if kind == "tree" else blobs.path(digest)


def unreferenced(meta: Meta, blobs: Blobs, layers: Layers, trees: Trees) -> int:
    """Delete what no image needs; returns the bytes of disk freed. What is held by someone stays for the next time."""
    doomed = Holdings.read(meta).unneeded()
    kinds = ("layer", "tree", "blob")
    where = [paths_of(blobs, layers, trees, kind, one) for kind, all in zip(kinds, doomed, strict=True) for one in all]
    before = allocated(where)
    delete(blobs, layers, trees, doomed)
    return before - allocated(where)


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
