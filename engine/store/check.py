"""Does the store hold what its rows say? `check` after store tests, `empty_tmp` and `remove_strays` at every start.

Only here: the whole-store view. What a crash can leave, and what repairs it:

    crash at                                  on disk                          repaired by
    writing in tmp/                           tmp litter                       empty_tmp (partial-* stays for resuming)
    between rename and row                    blob, layer, tree without a row  remove_strays
    between row deletion and file removal     the same                         remove_strays
    lost or damaged files                     row without (right) files        reported; pulling again restores it

What repairs only lists directories; `check` reads every index, with `deep` every byte. Neither is safe against writers:
run them at start-up, before anything is stored, or with writers quiet.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import host
from engine.errors import EngineError
from engine.store.index import read_index
from engine.store.meta import Meta
from engine.store.tree import Handle, Tree

log = logging.getLogger(__name__)

PART_AGE = 7 * 86400  # seconds an abandoned part file of a download is kept


Progress = Callable[[str, int], None]  # what is being read, bytes read since the last call; may raise


def check(root: Path, meta: Meta, *, deep: bool = False, progress: Progress | None = None) -> list[str]:
    """Problems found, one line each; [] when all is well. `deep` also reads indexes, trees and bodies through."""
    say = progress or (lambda what, size: None)
    return [
        *_blobs(root, meta, deep, say),
        *_layers(root, meta),
        *_trees(root, meta, deep),
        *(_bodies(root, meta, say) if deep else ()),
    ]


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _blobs(root: Path, meta: Meta, deep: bool, say: Progress) -> Iterator[str]:
    folder = root / "blobs" / "sha256"
    rows = {_hex(row["digest"]): row["size"] for row in meta.query("SELECT digest, size FROM blobs")}
    for name, size in rows.items():
        path = folder / name
        if not path.is_file():
            yield f"blob {name}: its file is missing"
        elif path.stat().st_size != size:
            yield f"blob {name}: {path.stat().st_size} bytes where {size} were stored"
        elif deep:
            say("blobs", size)
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != name:
                    yield f"blob {name}: the content does not match the digest"
    for path in _listed(folder):
        if path.name not in rows:
            yield f"blob {path.name}: a file without a row"


def _layers(root: Path, meta: Meta) -> Iterator[str]:
    folder = root / "layers" / "sha256"
    rows = {row["diff_id"]: row for row in meta.query("SELECT * FROM layers")}
    deps: dict[str, set[str]] = {diff_id: set() for diff_id in rows}
    for row in meta.query("SELECT diff_id, dep FROM layer_deps"):
        if row["diff_id"] not in rows or row["dep"] not in rows:
            yield f"layer_deps {row['diff_id']} -> {row['dep']}: no such layer"
        else:
            deps[row["diff_id"]].add(row["dep"])
    for diff_id, row in rows.items():
        data = folder / _hex(diff_id) / "data"
        if not data.is_file():
            yield f"layer {diff_id}: data is missing"
        elif data.stat().st_size != row["data_size"]:
            yield f"layer {diff_id}: data has {data.stat().st_size} bytes, not {row['data_size']}"
        entries = size = 0
        try:
            for entry in read_index(folder / _hex(diff_id) / "index", diff_id):
                entries += 1
                size += entry.size
                if not entry.sha256:
                    continue
                if entry.data != diff_id and entry.data not in deps[diff_id]:
                    yield f"layer {diff_id}: refers to {entry.data} without depending on it"
                owner = rows.get(entry.data)
                if owner is None or entry.offset % 4096 or entry.offset + entry.size > owner["data_size"]:
                    yield f"layer {diff_id}: {entry.path[:200]!r} lies outside the data of {entry.data}"
        except EngineError as error:
            yield f"layer {diff_id}: {error.reason}"
            continue
        if (entries, size) != (row["entries"], row["size"]):
            yield f"layer {diff_id}: {entries} entries of {size} bytes, not {row['entries']} of {row['size']}"
    for row in meta.query(
        "SELECT b.layer, b.offset, b.size, l.data_size FROM bodies b LEFT JOIN layers l ON l.id = b.layer"
        " WHERE l.id IS NULL OR b.offset + b.size > l.data_size"
    ):
        yield f"bodies: {row['layer']} at {row['offset']}: outside a stored layer"
    for row in meta.query("SELECT image, diff_id FROM image_layers WHERE diff_id NOT IN (SELECT diff_id FROM layers)"):
        yield f"image {row['image']}: its layer {row['diff_id']} is missing"
    for path in _listed(folder):
        if f"sha256:{path.name}" not in rows:
            yield f"layer {path.name}: files without a row"


def _trees(root: Path, meta: Meta, deep: bool) -> Iterator[str]:
    folder = root / "trees" / "sha256"
    known = {row["diff_id"] for row in meta.query("SELECT diff_id FROM layers")}
    rows = {_hex(row["chain_id"]): row for row in meta.query("SELECT chain_id, layers, size FROM trees")}

    def open_data(diff_id: str) -> Handle:
        return Handle(root / "layers" / "sha256" / _hex(diff_id) / "data")

    for name, row in rows.items():
        for diff_id in json.loads(row["layers"]):
            if diff_id not in known:
                yield f"tree {name}: its layer {diff_id} is missing"
        try:
            tree = Tree(folder / name, open_data)
            for diff_id in tree.devices:
                if diff_id not in known:
                    yield f"tree {name}: it needs the data of {diff_id}, which is missing"
            for _, nid in tree.walk() if deep else ():
                tree.stat(nid), tree.xattrs(nid), tree.provenance(nid)
        except (EngineError, OSError, KeyError) as error:
            yield f"tree {name}: {error}"
    for row in meta.query("SELECT digest, chain_id FROM images WHERE chain_id NOT IN (SELECT chain_id FROM trees)"):
        yield f"image {row['digest']}: its tree {row['chain_id']} is missing"
    for path in _listed(folder):
        if path.name not in rows:
            yield f"tree {path.name}: files without a row"


def _bodies(root: Path, meta: Meta, say: Progress) -> Iterator[str]:
    """Every stored body hashes to its row; layer by layer, so that memory is bounded."""
    for layer in meta.query("SELECT id, diff_id FROM layers ORDER BY id"):
        data = root / "layers" / "sha256" / _hex(layer["diff_id"]) / "data"
        rows = meta.query("SELECT sha256, offset, size FROM bodies WHERE layer = ? ORDER BY offset", (layer["id"],))
        try:
            with open(data, "rb") as file:
                for row in rows:
                    digester, left = hashlib.sha256(), row["size"]
                    file.seek(row["offset"])
                    while left and (piece := file.read(min(left, 1 << 20))):
                        digester.update(piece)
                        left -= len(piece)
                    say("files", row["size"])
                    if digester.digest() != row["sha256"]:
                        yield f"layer {layer['diff_id']}: the body at {row['offset']} does not match its digest"
        except OSError as error:
            if rows:
                yield f"layer {layer['diff_id']}: {error.strerror}"


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def remove_strays(root: Path, meta: Meta) -> list[str]:
    """Remove files without a row: a crash between the two. Returns what was removed."""
    removed = []
    for kind, column, table in (
        ("blobs", "digest", "blobs"),
        ("layers", "diff_id", "layers"),
        ("trees", "chain_id", "trees"),
    ):
        rows = {_hex(row[0]) for row in meta.query(f"SELECT {column} FROM {table}")}
        for path in _listed(root / kind / "sha256"):
            if path.name not in rows:
                removed += _removed(path, f"{kind}/{path.name}")
    return removed


def empty_tmp(root: Path) -> list[str]:
    """Drop what was in the making when the last daemon ended. Parts of downloads can be resumed: those stay for
    PART_AGE. Returns what was removed."""
    removed = []
    for path in _listed(root / "tmp"):
        if path.name.startswith("partial-") and time.time() - path.lstat().st_mtime < PART_AGE:
            continue
        removed += _removed(path, f"tmp/{path.name}")
    return removed


def _removed(path: Path, name: str) -> list[str]:
    try:
        host.remove_tree(path)
    except OSError:
        log.warning("%s cannot be removed", name, exc_info=True)
        return []
    return [name]
