"""The platforms of a multi-platform image: indexes as pulled, and which of their images are here. Floor 2.

Only here: the table `index_entries`. An index is kept as a blob as long as one of its images is in the catalog.

Names: a pull of a chosen platform takes the name only when it is free, or stands for something that is not of the same
index. So `app:1` stays what this host runs, and its other platforms are found beside it; a plain pull gives the name to
this host's platform again. Thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import NotFound
from engine.images import manifests
from engine.images.catalog import Image, Images
from engine.images.manifests import Index, Platform
from engine.images.reference import parse
from engine.model import ImageConfig


@dataclass(frozen=True, slots=True)
class Entry:
    """One platform an index lists. `size`: bytes of its manifest, all that the index says of it."""

    name: str  # os-arch[-variant]
    digest: str
    size: int
    present: bool


def named(images: Images, text: str, platform: str) -> Image:
    """The image people mean by `text`; where that is for another platform than `platform`, what came with it out of the
    same index. NotFound says how to get it."""
    image = images.resolve(text)
    if not platform:
        return image
    wanted = manifests.parse_platform(platform)
    others = {entry.name: entry.digest for entry in listed(images, image.digest) if entry.present}
    for one in manifests.acceptable(wanted):
        if image.platform == str(one):
            return image
        if (digest := others.get(str(one).replace("/", "-"))) is not None:
            return images.get(digest)
    names = images.references(image.digest)
    hint = f"pull it: echo 'pull {parse(names[0]).familiar()} platform={wanted}' > images/ctl" if names else None
    raise NotFound(f"no such image for {wanted}: that is for {image.platform}", at=str(wanted), hint=hint)


def check(config: ImageConfig, wanted: Platform | None) -> None:
    """NotFound for an image of another platform. One that was not asked for by platform, or says none, is taken for
    what it is."""
    if wanted is None or not config.architecture:
        return
    there = manifests.normalise(Platform(config.os or "linux", config.architecture, config.variant))
    if there not in [entry for entry in manifests.acceptable(wanted) if entry.architecture == wanted.architecture]:
        raise NotFound(f"no image for {wanted}; there is only {there}", at=str(wanted))


def keep(images: Images, raw: bytes, index: Index) -> str:
    """Store an index and what it lists; returns its digest. To be called under a lease, before `Images.add`."""
    digest = images.blobs.put(raw, index.media_type)
    rows: dict[str, tuple[str, str, str, int]] = {}
    for entry in index.manifests:
        if entry.platform is not None and entry.media_type in manifests.MANIFESTS and entry.platform.os != "unknown":
            rows.setdefault(str(entry.platform), (digest, str(entry.platform), entry.digest, entry.size))
    with images.meta.tx() as tx:
        tx.execute("DELETE FROM index_entries WHERE index_digest NOT IN (SELECT digest FROM blobs)")
        tx.executemany("INSERT OR IGNORE INTO index_entries VALUES (?, ?, ?, ?)", list(rows.values()))
    return digest


def takes_name(images: Images, name: str, index: str, wanted: Platform | None) -> bool:
    """Whether a pull of `wanted` out of `index` ('' for none) moves the name."""
    if wanted is None or not index or wanted == manifests.host():
        return True
    digest = images.tags().get(name)
    return digest is None or not images.meta.query(
        "SELECT 1 FROM index_entries WHERE index_digest = ? AND manifest = ?", (index, digest)
    )


def listed(images: Images, digest: str) -> list[Entry]:
    """The platforms of the newest index that lists the image, sorted by name; none when it came without an index."""
    row = images.meta.row(
        "SELECT b.digest FROM index_entries e JOIN blobs b ON b.digest = e.index_digest WHERE e.manifest = ?"
        " ORDER BY b.created_ns DESC, b.digest LIMIT 1",
        (digest,),
    )
    if row is None:
        return []
    rows = images.meta.query(
        "SELECT e.platform, e.manifest, e.size, i.digest AS here FROM index_entries e"
        " LEFT JOIN images i ON i.digest = e.manifest WHERE e.index_digest = ? ORDER BY e.platform",
        (row["digest"],),
    )
    return [Entry(one["platform"].replace("/", "-"), one["manifest"], one["size"], bool(one["here"])) for one in rows]
