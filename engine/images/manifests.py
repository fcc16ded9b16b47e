"""Manifests and indexes: OCI and Docker v2s2, checked, and the choice of a platform. Pure functions. Floor 2.

Only here: what a manifest may look like. Everything in one is hostile until it has passed here: digests are
well-formed, sizes and counts are bounded. A fault in the document is Damaged naming the field; a
document that is fine but not a container image is InvalidArgument; one this engine cannot use is Unsupported.

Sources: image-spec manifest.md, image-index.md, descriptor.md; Docker "Image Manifest Version 2, Schema 2";
platform matching as containerd/platforms (platformVector, normalizeArch).
"""

from __future__ import annotations

import json
import platform as host_platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from engine.errors import Damaged, InvalidArgument, NotFound, TooLarge, Unsupported
from engine.model import DIGEST, ImageConfig, one_line

MAX_MANIFEST = 4 << 20  # bytes; the distribution-spec asks registries for at least this much
MAX_CONFIG = 8 << 20
MAX_LAYERS = 512
MAX_MANIFESTS = 1024  # in one index
MAX_BLOB = 1 << 40  # bytes of one layer as compressed

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
ACCEPT = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))
V1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)

OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream"})  # the last: docker before 1.11

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
LAYERS = frozenset({f"{OCI_LAYER}{suffix}" for suffix in ("", "+gzip", "+zstd")}) | frozenset(
    {DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", f"{DOCKER_LAYER}.zstd"}
)
ATTESTATION = "vnd.docker.reference.type"  # annotation of build attestations, which are not images


@dataclass(frozen=True, slots=True)
class Platform:
    """os/architecture[/variant], in Go's words."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


@dataclass(frozen=True, slots=True)
class Descriptor:
    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image. `layers[0]` is the lowest."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Several images, or indexes of them, by platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Damaged(f"{where}: a string expected", at=where)
    return value


def descriptor(data: Any, where: str, limit: int = MAX_BLOB) -> Descriptor:
    """A checked descriptor; `where` names it in errors, `limit` bounds its size."""
    if not isinstance(data, dict):
        raise Damaged(f"{where}: a descriptor (an object) expected", at=where)
    media_type = _string(data.get("mediaType"), f"{where}.mediaType")
    digest = _string(data.get("digest"), f"{where}.digest")
    if not DIGEST.fullmatch(digest):
        raise Damaged(f"{where}.digest: not a sha256 digest: {digest[:100]!r}", at=f"{where}.digest")
    size = data.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise Damaged(f"{where}.size: a number of bytes expected", at=f"{where}.size")
    if size > limit:
        raise TooLarge(f"{where}.size: {size} bytes where at most {limit} are taken", at=f"{where}.size")
    annotations = data.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise Damaged(f"{where}.annotations: an object expected", at=f"{where}.annotations")
    texts = {str(key): value for key, value in annotations.items() if isinstance(value, str)}
    return Descriptor(media_type, digest, size, _platform(data.get("platform"), f"{where}.platform"), texts)


def _platform(data: Any, where: str) -> Platform | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise Damaged(f"{where}: an object expected", at=where)
    parts = [_string(data.get(key, ""), f"{where}.{key}")[:64] for key in ("os", "architecture", "variant")]
    return normalise(Platform(*parts)) if parts[0] or parts[1] else None


def load_json(raw: bytes, what: str, limit: int = MAX_MANIFEST) -> Any:
    """Bounded, strict JSON. TooLarge, Damaged."""
    if len(raw) > limit:
        raise TooLarge(f"{what} of {len(raw)} bytes where at most {limit} are read")
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is not JSON: {error}"[:300]) from error


def parse(raw: bytes, media_type: str = "") -> Manifest | Index:
    """A manifest or an index. `media_type` is what the transport called it; the document's own word wins."""
    data = load_json(raw, "the manifest")
    if not isinstance(data, dict):
        raise Damaged("the manifest is not a JSON object")
    media_type = media_type.partition(";")[0].strip().lower()
    named = data.get("mediaType", "")
    named = _string(named, "mediaType") if named is not None else ""
    if data.get("schemaVersion") == 1 or named in V1 or "fsLayers" in data or (media_type in V1 and not named):
        raise Unsupported(
            "a Docker schema 1 manifest: a format without content digests of its own, retired in 2019",
            hint="push the image again with a current tool",
        )
    if data.get("schemaVersion") != 2:
        raise Damaged("schemaVersion: 2 expected", at="schemaVersion")
    known = MANIFESTS | INDEXES
    if named and media_type in known and media_type != named:
        raise Damaged(f"mediaType: served as {media_type} but calls itself {named[:100]}", at="mediaType")
    if ("config" in data or "layers" in data) and "manifests" in data:
        # a document that is both would be read as one by us and as the other by others
        raise Damaged("both a manifest and an index: layers and manifests in one document", at="manifests")
    kind = named or (media_type if media_type in known else (OCI_INDEX if "manifests" in data else OCI_MANIFEST))
    if kind in INDEXES:
        return _index(data, kind)
    if kind in MANIFESTS:
        return _manifest(data, kind)
    raise InvalidArgument(f"not a container image: its manifest is {kind[:100]}", at="mediaType")


def _list(data: dict[str, Any], key: str, limit: int) -> list[Any]:
    value = data.get(key)
    if value is None:
        value = []
    if not isinstance(value, list):
        raise Damaged(f"{key}: a list expected", at=key)
    if len(value) > limit:
        raise TooLarge(f"{key}: {len(value)} entries where at most {limit} are taken", at=key)
    return value


def _index(data: dict[str, Any], kind: str) -> Index:
    entries = _list(data, "manifests", MAX_MANIFESTS)
    return Index(kind, tuple(descriptor(entry, f"manifests[{n}]") for n, entry in enumerate(entries)))


def _manifest(data: dict[str, Any], kind: str) -> Manifest:
    config = data.get("config")
    if not isinstance(config, dict):
        raise Damaged("config: a descriptor (an object) expected", at="config")
    config_type = _string(config.get("mediaType"), "config.mediaType")
    if config_type not in CONFIGS or (data.get("artifactType") and config_type != OCI_CONFIG):
        raise InvalidArgument(
            f"not a container image but an artifact: its config is {config_type[:100]}", at="config.mediaType"
        )
    layers = []
    for number, entry in enumerate(_list(data, "layers", MAX_LAYERS)):
        layer = descriptor(entry, f"layers[{number}]")
        _check_layer(layer.media_type, f"layers[{number}].mediaType")
        layers.append(layer)
    return Manifest(kind, descriptor(config, "config", MAX_CONFIG), tuple(layers))


def _check_layer(media_type: str, where: str) -> None:
    if media_type in LAYERS:
        return
    name = media_type[:100]
    if media_type.endswith("+encrypted"):
        raise Unsupported(f"{where}: an encrypted layer ({name})", at=where)
    if ".foreign." in media_type or ".nondistributable." in media_type:
        raise Unsupported(f"{where}: a layer that is not distributed with the image ({name})", at=where)
    raise InvalidArgument(f"{where}: not a kind of layer: {name}", at=where)


def parse_config(raw: bytes) -> ImageConfig:
    """The image configuration, checked. Damaged naming the field."""
    data = load_json(raw, "the image configuration", MAX_CONFIG)
    try:
        config = ImageConfig.model_validate(data)
    except ValidationError as error:
        reason = one_line(error, "image configuration")
        raise Damaged(reason.reason, at=reason.at) from error
    if config.rootfs.type != "layers":
        raise Damaged(f"image configuration: rootfs.type: 'layers' expected, not {config.rootfs.type[:40]!r}",
                      at="rootfs.type")  # fmt: skip
    for number, diff_id in enumerate(config.rootfs.diff_ids):
        if not DIGEST.fullmatch(diff_id):
            raise Damaged(f"image configuration: rootfs.diff_ids[{number}]: not a sha256 digest",
                          at=f"rootfs.diff_ids[{number}]")  # fmt: skip
    return config


def check_pair(manifest: Manifest, config: ImageConfig) -> None:
    """Manifest and configuration speak of the same number of layers. Damaged."""
    if len(manifest.layers) != len(config.rootfs.diff_ids):
        raise Damaged(
            f"the manifest has {len(manifest.layers)} layers, the configuration {len(config.rootfs.diff_ids)} diff_ids",
            at="rootfs.diff_ids",
        )


# --- platforms ------------------------------------------------------------------------------------------------------

_ARCH = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i486": "386", "i586": "386",
         "i686": "386", "armhf": "arm", "armel": "arm", "armv7l": "arm", "armv6l": "arm"}  # fmt: skip
_OS = {"macos": "darwin"}


def normalise(platform: Platform) -> Platform:
    """One name for each: x86_64 is amd64, arm64/v8 is arm64, arm is arm/v7."""
    given = platform.architecture.lower()
    architecture, variant = _ARCH.get(given, given), platform.variant.lower()
    if given in ("armhf", "armv7l", "armel", "armv6l"):
        variant = "v6" if given in ("armel", "armv6l") else "v7"
    elif variant and variant.isdigit():
        variant = f"v{variant}"
    if (architecture, variant) in (("amd64", "v1"), ("arm64", "v8")):
        variant = ""
    elif architecture == "arm" and not variant:
        variant = "v7"
    system = platform.os.lower()
    return Platform(_OS.get(system, system), architecture, variant)


def parse_platform(text: str) -> Platform:
    """os/arch[/variant], or an architecture alone (of linux). InvalidArgument."""
    parts = text.split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if not 2 <= len(parts) <= 3 or not all(part and part.replace("-", "").replace("_", "").isalnum() for part in parts):
        raise InvalidArgument("a platform is os/architecture[/variant], such as linux/arm64", at=text[:100])
    return normalise(Platform(*parts))


def host() -> Platform:
    """What containers run on here: linux, whatever the host's own system is."""
    return normalise(Platform("linux", host_platform.machine() or sys.platform))


def acceptable(platform: Platform) -> list[Platform]:
    """What runs on `platform`, best first: itself, lower variants, then the architectures it runs besides."""
    system, architecture, variant = platform.os, platform.architecture, platform.variant
    out = [platform]
    number = int(variant[1:]) if variant[:1] == "v" and variant[1:].isdigit() and len(variant) < 5 else 0
    if architecture == "amd64":
        out += [normalise(Platform(system, "amd64", f"v{lower}")) for lower in range(number - 1, 0, -1)]
        out.append(Platform(system, "386"))
    elif architecture == "arm64":
        out += [normalise(Platform(system, "arm64", f"v{lower}")) for lower in range(number - 1, 7, -1)]
        out += [Platform(system, "arm", f"v{lower}") for lower in range(8, 4, -1)]
    elif architecture == "arm":
        out += [Platform(system, "arm", f"v{lower}") for lower in range(number - 1, 4, -1)]
    return out


def select(index: Index, platform: Platform, *, strict: bool = False) -> Descriptor:
    """The entry of `index` for `platform`: exact, else the best that runs there (`strict`: of that architecture).

    The first of equals wins, as in containerd. NotFound lists what there is.
    """
    candidates = [
        entry
        for entry in index.manifests
        if entry.media_type in MANIFESTS | INDEXES and ATTESTATION not in entry.annotations
    ]
    for wanted in acceptable(platform):
        if strict and wanted.architecture != platform.architecture:
            continue
        for entry in candidates:
            if entry.platform == wanted:
                return entry
    unnamed = [entry for entry in candidates if entry.platform is None]
    if len(unnamed) == 1:  # it says nothing about its platform: the image's configuration will
        return unnamed[0]
    there = sorted({str(entry.platform) for entry in candidates if entry.platform})
    raise NotFound(
        f"no image for {platform}; there is {', '.join(there)[:500] or 'none at all'}",
        at=str(platform),
        hint="give platform=… to take another one" if there else None,
    )


def document(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """An OCI manifest of our own making: the same input gives the same bytes."""

    def plain(entry: Descriptor) -> dict[str, Any]:
        return {"mediaType": entry.media_type, "digest": entry.digest, "size": entry.size}

    data = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": plain(config),
        "layers": [plain(layer) for layer in layers],
    }
    return json.dumps(data, separators=(",", ":")).encode()
