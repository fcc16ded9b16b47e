"""store/: what lies on disk. Floor 5."""

from __future__ import annotations

import os
from typing import Any

from engine.errors import InvalidArgument, NotFound
from fdfs.entry import Dir, File, Row
from fdfs.tree.text import flat


def stats(engine: Any) -> str:
    def one(sql: str) -> int:
        row = engine.meta.row(sql)
        return int(row[0] or 0) if row else 0

    disk = os.statvfs(engine.store)
    return flat(
        {
            "images": one("SELECT count(*) FROM images"),
            "tags": one("SELECT count(*) FROM tags"),
            "layers": one("SELECT count(*) FROM layers"),
            "trees": one("SELECT count(*) FROM trees"),
            "blobs": one("SELECT count(*) FROM blobs"),
            "blob_bytes": one("SELECT sum(size) FROM blobs"),
            "layer_data_bytes": one("SELECT sum(data_size) FROM layers"),
            "layer_files_bytes": one("SELECT sum(size) FROM layers"),
            "tree_bytes": one("SELECT sum(size) FROM trees"),
            "bodies": one("SELECT count(*) FROM bodies"),
            "containers": one("SELECT count(*) FROM containers"),
            "volumes": one("SELECT count(*) FROM volumes"),
            "events": one("SELECT max(seq) FROM events"),
            "disk_bytes": disk.f_blocks * disk.f_frsize,
            "free_bytes": disk.f_bavail * disk.f_frsize,
        }
    )


def _names(engine: Any) -> list[str]:
    return [row["digest"] for row in engine.meta.query("SELECT digest FROM blobs")]


def _find(engine: Any, digest: str) -> Row | None:
    try:
        return BLOB if engine.blobs.has(digest) else None
    except (NotFound, InvalidArgument):
        return None


def blob_size(engine: Any, digest: str) -> int:
    return int(engine.blobs.size(digest))


def blob(engine: Any, digest: str, offset: int, size: int) -> bytes:
    fd = os.open(engine.blobs.path(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


BLOB = File(name="sha256:<digest>", doc="one blob, byte for byte as pulled", read=blob, size=blob_size)

STORE = Dir(
    name="store",
    doc="what lies on disk",
    rows=(
        File(name="stats", doc="counts and bytes, flat-keyed", show=stats),
        Dir(
            name="objects",
            doc="content-addressed objects",
            rows=(Dir(name="by-digest", doc="blobs by digest", names=_names, find=_find, kinds=(BLOB,)),),
        ),
    ),
)
