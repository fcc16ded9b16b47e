"""Images from files: OCI layouts (a directory or a tar of one), `docker save` archives, root filesystem tars. Floor 2.

Only here: what layouts look like, and how what is in a file comes into the store; docker's archives are read by
dockerarchive.py. Everything in them is hostile: names are looked up in the archive and nowhere else (files.py), small
documents are bounded, layers go through the same checks as pulled ones. A tar is read in place by offset when it is
not compressed; else it is first inflated into the store's tmp/, up to a bound.

Source: image-spec image-layout.md.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import Damaged, EngineError, InvalidArgument, NotFound, TooLarge
from engine.images import dockerarchive, manifests, platforms
from engine.images.catalog import Image, Images
from engine.images.dockerarchive import MAX_IMAGES, Parts, usable_name
from engine.images.files import Files, inflated, open_files
from engine.images.manifests import Descriptor, Index, Manifest, Platform
from engine.images.reference import Reference, parse
from engine.jobs import Task
from engine.model import canonical_json, hex_of
from engine.store.inflate import detect
from engine.store.tarstart import check_start

MAX_DEPTH = 4  # indexes within one another
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"


def load(
    images: Images, path: Path | str, task: Task | None = None, platform: Platform | str | None = None
) -> list[Image]:
    """Every image in the file or directory at `path`, with the names it gives them, in its order: of an index this
    host's. With `platform` only those for that one; names as a pull of it gives them (platforms.py).

    NotFound for no such file, and no such platform in it; InvalidArgument for what is neither layout nor archive;
    Damaged, TooLarge, Unsupported.
    """
    task = task or Task()
    wanted = manifests.parse_platform(platform) if isinstance(platform, str) else platform
    with ExitStack() as stack:
        stack.enter_context(images.lease())
        files = open_files(Path(path), images.blobs.root / "tmp", stack, task)
        if files.has("manifest.json") and not _listed(files):
            return _assembled(images, files, dockerarchive.saved(files, task), task, wanted)
        if files.has("oci-layout") or files.has("index.json"):
            return _layout(images, files, task, wanted)
        if files.has("repositories"):
            return _assembled(images, files, dockerarchive.legacy(files, task), task, wanted)
    raise InvalidArgument(
        "neither an OCI layout nor a docker archive: no oci-layout, manifest.json or repositories in it",
        at=str(path),
        hint="a root filesystem is taken in by: import PATH REF",
    )


def _listed(files: Files) -> bool:
    """Whether an archive that is both (docker save since 25) has its images in the layout, with their own manifests."""
    if not files.has("oci-layout") or not files.has("index.json"):
        return False
    index = manifests.parse(files.read("index.json", manifests.MAX_MANIFEST), manifests.OCI_INDEX)
    return isinstance(index, Index) and bool(index.manifests)


# --- OCI layouts ----------------------------------------------------------------------------------------------------


def _layout(images: Images, files: Files, task: Task, wanted: Platform | None) -> list[Image]:
    if files.has("oci-layout"):
        marker = manifests.load_json(files.read("oci-layout", 1 << 12), "oci-layout", 1 << 12)
        if not isinstance(marker, dict) or marker.get("imageLayoutVersion") != "1.0.0":
            raise Damaged("oci-layout: imageLayoutVersion 1.0.0 expected", at="oci-layout")
    index = manifests.parse(files.read("index.json", manifests.MAX_MANIFEST), manifests.OCI_INDEX)
    if not isinstance(index, Index):
        raise Damaged("index.json is not an image index", at="index.json")
    if len(index.manifests) > MAX_IMAGES:
        raise TooLarge(f"index.json: more than {MAX_IMAGES} images", at="index.json")
    out: list[Image] = []
    skipped: EngineError | None = None
    for entry in index.manifests:
        task.check()
        try:
            raw, manifest, above = _descend(images, files, entry, wanted)
            config = _blob(files, manifest.config, manifests.MAX_CONFIG)
            platforms.check(manifests.parse_config(config), wanted)
        except (InvalidArgument, NotFound) as error:  # an artifact, or an image of other platforms only
            task.log(f"{entry.digest}: {error.reason}; skipped")
            skipped = error
            continue
        names = [name for name in _layout_names(entry, task) if platforms.takes_name(images, name, above, wanted)]
        sources = [f"blobs/sha256/{layer.digest[7:]}" for layer in manifest.layers]
        out.append(_store(images, files, raw, manifest, config, sources, names, task))
    if not out:
        raise skipped or InvalidArgument("the layout holds no image", at="index.json")
    return out


def _descend(images: Images, files: Files, entry: Descriptor, wanted: Platform | None) -> tuple[bytes, Manifest, str]:
    """Down through indexes to the manifest of the wanted platform (else this host's, or the only one there is a blob
    for), and the digest of the index that lists it ('')."""
    above = ""
    for _ in range(MAX_DEPTH):
        raw = _blob(files, entry, manifests.MAX_MANIFEST)
        document = manifests.parse(raw, entry.media_type)
        if isinstance(document, Manifest):
            return raw, document, above
        entry = manifests.select(document, wanted or manifests.host(), strict=wanted is not None)
        above = platforms.keep(images, raw, document)
    raise Damaged(f"more than {MAX_DEPTH} indexes within one another", at=entry.digest)


def _blob(files: Files, entry: Descriptor, limit: int) -> bytes:
    raw = files.read(f"blobs/sha256/{hex_of(entry.digest)}", limit)
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    if digest != entry.digest or len(raw) != entry.size:
        raise Damaged(f"the blob's digest is {digest} ({len(raw)} bytes), not the expected one", at=entry.digest)
    return raw


def _layout_names(entry: Descriptor, task: Task) -> list[str]:
    """Names a layout gives: a full one by containerd's annotation, else the standard one when it is more than a tag."""
    for key in (CONTAINERD_NAME, REF_NAME):
        text = entry.annotations.get(key, "")
        if key == REF_NAME and not set(text) & {"/", ":"}:
            continue  # the standard annotation is commonly a bare tag, which names nothing
        if text and (named := usable_name(text, task)) is not None:
            return [named]
    return []


# --- images without manifests -----------------------------------------------------------------------------------------


def _assembled(
    images: Images, files: Files, found: Iterable[Parts], task: Task, wanted: Platform | None
) -> list[Image]:
    out: list[Image] = []
    skipped: EngineError | None = None
    for config, sources, names in found:
        try:
            platforms.check(manifests.parse_config(config), wanted)
        except NotFound as error:
            task.log(f"{' '.join(names) or 'an image'}: {error.reason}; skipped")
            skipped = error
        else:
            out.append(_assemble(images, files, config, sources, names, task))
    if skipped is not None and not out:
        raise skipped
    return out


def _assemble(images: Images, files: Files, config: bytes, sources: list[str], names: list[str], task: Task) -> Image:
    """An image whose archive has no manifest: one is made, always the same for the same content."""
    parsed = manifests.parse_config(config)
    if len(parsed.rootfs.diff_ids) != len(sources):
        raise Damaged(
            f"the archive names {len(sources)} layers, the configuration {len(parsed.rootfs.diff_ids)} diff_ids",
            at="Layers",
        )
    layers = [_described(files, source, task) for source in sources]
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    raw = manifests.document(Descriptor(manifests.OCI_CONFIG, digest, len(config)), layers)
    manifest = manifests.parse(raw)
    assert isinstance(manifest, Manifest)
    return _store(images, files, raw, manifest, config, sources, names, task)


SUFFIX = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}


def _described(files: Files, source: str, task: Task) -> Descriptor:
    """What a layer file of an archive is: its kind by its first bytes, its digest and size."""
    digester, size, kind = hashlib.sha256(), 0, "none"
    for chunk in files.chunks(source):
        task.check()
        if not size:
            kind = detect(chunk[:8])
        digester.update(chunk)
        size += len(chunk)
    if kind not in SUFFIX:
        raise InvalidArgument(f"a layer compressed by {kind}, which has no media type", at=source)
    return Descriptor(manifests.OCI_LAYER + SUFFIX[kind], f"sha256:{digester.hexdigest()}", size)


def _store(
    images: Images,
    files: Files,
    raw: bytes,
    manifest: Manifest,
    config: bytes,
    sources: list[str],
    names: list[str],
    task: Task,
) -> Image:
    """Layers, configuration and manifest into the store, then the rows."""
    parsed = manifests.parse_config(config)
    manifests.check_pair(manifest, parsed)
    for entry, diff_id, source in zip(manifest.layers, parsed.rootfs.diff_ids, sources, strict=True):
        _ingest(images, entry, diff_id, lambda source=source: files.chunks(source), task)
    images.blobs.put(config, manifest.config.media_type)
    task.check()
    image = images.add(raw, manifest.media_type, names[0] if names else None, event="imageLoaded")
    for name in names[1:]:
        images.tag(image.digest, name)
    task.log(f"loaded {image.digest} {' '.join(names)}".rstrip())
    return image


def _ingest(images: Images, entry: Descriptor, diff_id: str, chunks: Any, task: Task) -> None:
    label = entry.digest[:19]
    if images.store_layers.has(diff_id):
        task.advance(label, entry.size, entry.size, "present")
        return

    def going() -> Iterator[bytes]:
        for chunk in chunks():
            task.check()
            yield chunk

    with images.blobs.writer(entry.media_type, entry.digest, entry.size) as keep:
        keep.restart()
        images.store_layers.ingest(
            going(),
            entry.media_type,
            diff_id=diff_id,
            digest=entry.digest,
            size=entry.size,
            keep=keep,
            progress=lambda done: task.advance(label, done, entry.size, "unpacking"),
        )
    task.advance(label, entry.size, entry.size, "done")


# --- root filesystems -----------------------------------------------------------------------------------------------


def import_rootfs(images: Images, path: Path | str, reference: str | Reference, task: Task | None = None) -> Image:
    """An image of one layer from a tar of a root filesystem (plain, gzip, zstd, bzip2, xz); its configuration is made.

    The layer is stored as it is; for bzip2 and xz, which have no layer type, uncompressed.
    """
    task = task or Task()
    named = (parse(reference) if isinstance(reference, str) else reference).normalised()
    if "@" in named:
        raise InvalidArgument("an imported image cannot be named by digest", at=named)
    path = Path(path)
    if not path.is_file():
        raise (
            NotFound("no such file", at=str(path))
            if not path.exists()
            else InvalidArgument("a tar file expected", at=str(path))
        )
    check_start(path)
    with images.lease(), ExitStack() as stack:
        with open(path, "rb") as file:
            head = file.read(8)
        kind = detect(head)
        source = _tar_source(path, kind, images.blobs.root / "tmp", stack, task)
        layer = _blob_of(source, task)
        layer = replace(layer, media_type=manifests.OCI_LAYER + SUFFIX.get(kind, ""))
        info = None
        with images.blobs.writer(layer.media_type, layer.digest, layer.size) as keep:
            keep.restart()
            info = images.store_layers.ingest(
                _pieces(source, task),
                layer.media_type,
                digest=layer.digest,
                size=layer.size,
                keep=keep,
                progress=lambda done: task.advance(layer.digest[:19], done, layer.size, "unpacking"),
            )
        if not info.entries:
            raise InvalidArgument("the tar holds nothing", at=str(path))
        now = datetime.fromtimestamp(int(time.time()), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        host = manifests.host()
        config = canonical_json(
            {
                "created": now,
                "architecture": host.architecture,
                "os": "linux",
                **({"variant": host.variant} if host.variant else {}),
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [info.diff_id]},
                "history": [{"created": now, "created_by": f"import {path.name}", "comment": "imported"}],
            }
        )
        digest = images.blobs.put(config, manifests.OCI_CONFIG)
        raw = manifests.document(Descriptor(manifests.OCI_CONFIG, digest, len(config)), [layer])
        return images.add(raw, manifests.OCI_MANIFEST, named, event="imageLoaded")


def _tar_source(path: Path, kind: str, tmp: Path, stack: ExitStack, task: Task) -> Path:
    """The tar itself, or for a compression without a layer type, an inflated copy."""
    if kind in SUFFIX:
        return path
    return inflated(path, tmp, stack, task)


def _pieces(path: Path, task: Task) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 18):
            task.check()
            yield piece


def _blob_of(path: Path, task: Task) -> Descriptor:
    digester, size = hashlib.sha256(), 0
    for piece in _pieces(path, task):
        digester.update(piece)
        size += len(piece)
    return Descriptor(manifests.OCI_LAYER, f"sha256:{digester.hexdigest()}", size)
