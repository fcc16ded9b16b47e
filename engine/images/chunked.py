"""Layers that can be read by ranges: eStargz and zstd:chunked. Finding and trusting their contents. Floor 2.

Only here: where the TOC of such a layer is and what vouches for it: an annotation in the manifest, which the image's
digest covers. A layer without that annotation is an ordinary one here, even when its bytes have a footer: nothing
would vouch for what it says. One thread.

Sources: stargz-snapshotter docs/estargz.md ("Footer", "TOC", annotation containerd.io/snapshot/stargz/toc.digest);
containers/storage pkg/chunked/internal/compression.go (annotations manifest-checksum and manifest-position).
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass

from engine.errors import Damaged, TooLarge, Unsupported
from engine.images.manifests import Descriptor
from engine.images.registry import Registry
from engine.images.toc import MAX_TOC
from engine.model import DIGEST
from engine.store.inflate import inflate

STARGZ = "containerd.io/snapshot/stargz/toc.digest"
CHUNKED = ("io.github.containers.zstd-chunked", "io.containers.zstd-chunked")  # the second until 2023
FOOTER = 51  # bytes of an eStargz footer: an empty gzip member whose extra field says where the TOC is
CRFS = 1  # the type of TOC that zstd:chunked has


@dataclass(frozen=True, slots=True)
class Source:
    """What vouches for a TOC. `digest`: eStargz, of its JSON; zstd:chunked, of its compressed form in [start, stop)."""

    kind: str  # "estargz" or "zstd:chunked"
    digest: str
    start: int = 0
    stop: int = 0
    size: int = 0  # of the JSON


def source(entry: Descriptor) -> Source | None:
    """How a layer can be read by ranges; None when it has to be pulled. Says nothing of the layer's bytes."""
    for prefix in CHUNKED:
        checksum = entry.annotations.get(f"{prefix}.manifest-checksum", "")
        parts = entry.annotations.get(f"{prefix}.manifest-position", "").split(":")
        if DIGEST.fullmatch(checksum) and len(parts) == 4 and all(p.isascii() and p.isdigit() for p in parts):
            start, packed, size, kind = (int(part[:20]) for part in parts)
            if kind == CRFS and 0 < packed <= MAX_TOC and 0 < size <= MAX_TOC and start + packed <= entry.size:
                return Source("zstd:chunked", checksum, start, start + packed, size)
    digest = entry.annotations.get(STARGZ, "")
    if DIGEST.fullmatch(digest) and entry.size > FOOTER and entry.media_type.endswith("gzip"):
        return Source("estargz", digest)
    return None


def fetch(registry: Registry, entry: Descriptor, how: Source) -> tuple[bytes, int]:
    """(the TOC's JSON, where the files end in the blob). Damaged when it is not what the manifest vouches for."""
    if how.kind == "estargz":
        return _stargz(registry, entry, how)
    packed = b"".join(registry.part(entry, how.start, how.stop))
    _check(packed, how.digest, entry)
    raw = bytearray()
    for block in inflate(iter((packed,))):
        raw += block
        if len(raw) > how.size:
            break
    if len(raw) != how.size:
        raise Damaged(f"the table of contents has not the {how.size} bytes announced", at=entry.digest)
    return bytes(raw), max(0, how.start - 8)  # the TOC is in a skippable frame


def _stargz(registry: Registry, entry: Descriptor, how: Source) -> tuple[bytes, int]:
    footer = b"".join(registry.part(entry, entry.size - FOOTER, entry.size))
    if footer[:4] != b"\x1f\x8b\x08\x04" or footer[12:16] != b"SG\x16\x00" or footer[32:38] != b"STARGZ":
        raise Unsupported("the layer has no eStargz footer, though its manifest says so", at=entry.digest)
    try:
        start = int(footer[16:32], 16)
    except ValueError as error:
        raise Damaged("the eStargz footer is damaged", at=entry.digest) from error
    if not 0 < start < entry.size - FOOTER:
        raise Damaged("the eStargz footer points outside the layer", at=entry.digest)
    if entry.size - start > MAX_TOC:
        raise TooLarge(f"the table of contents has more than {MAX_TOC} bytes", at=entry.digest)
    inflater, out = zlib.decompressobj(31), bytearray()
    try:
        for piece in registry.part(entry, start, entry.size - FOOTER):
            out += inflater.decompress(piece, MAX_TOC + 1024 - len(out))
            if len(out) > MAX_TOC or inflater.unconsumed_tail:
                raise TooLarge(f"the table of contents has more than {MAX_TOC} bytes", at=entry.digest)
            if inflater.eof:
                break
    except zlib.error as error:
        raise Damaged(f"the table of contents is damaged: {error}", at=entry.digest) from error
    head = bytes(out[:512])  # of a tar with one file
    try:
        size = int(head[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise Damaged("the table of contents is not in a tar", at=entry.digest) from error
    raw = bytes(out[512 : 512 + size])
    _check(raw, how.digest, entry)
    return raw, start


def _check(raw: bytes, digest: str, entry: Descriptor) -> None:
    if "sha256:" + hashlib.sha256(raw).hexdigest() != digest:
        raise Damaged("the table of contents is not the one the manifest vouches for", at=entry.digest)
