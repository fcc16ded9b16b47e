"""A new image from an old one and a layer: configuration, history, manifest, and `change`. Floor 2.

Only here: what of a configuration changes when a container is committed, as `docker commit` has it: what the container
was configured with becomes the image's, then the changes are applied. What the base image says besides is kept as it
stands. Pure but for `add`.

Sources: image-spec config.md; moby daemon/commit.go; Dockerfile reference.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from isal import isal_zlib

from engine.config import ContainerConfig
from engine.errors import InvalidArgument
from engine.images import manifests
from engine.images.catalog import Image, Images
from engine.images.content import manifest_of
from engine.images.manifests import Descriptor
from engine.model import canonical_json

LEVEL = 1  # of isal: about zlib's 3, several times faster
WORDS = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


@dataclass(frozen=True, slots=True)
class Note:
    """What a commit says of itself."""

    created: str
    author: str = ""
    message: str = ""
    created_by: str = ""
    changes: tuple[str, ...] = field(default=())


def gzipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same input gives the same bytes: no time and no name in the header."""
    compressor = isal_zlib.compressobj(LEVEL, wbits=31)
    for piece in pieces:
        if out := compressor.compress(piece):
            yield bytes(out)
    yield bytes(compressor.flush())


def add(images: Images, base: Image, layer: tuple[str, str, int] | None, run: ContainerConfig, note: Note,
        reference: str) -> Image:  # fmt: skip
    """Make the image visible under `reference`. `layer`: diff_id, digest and size of the gzip blob, None for none."""
    _, manifest = manifest_of(images, base.digest)
    config = json.loads(images.config_bytes(base.digest))
    step: dict[str, Any] = {"created": note.created, "created_by": note.created_by}
    if note.author:
        step["author"] = note.author
    if note.message:
        step["comment"] = note.message
    if layer is None:
        step["empty_layer"] = True
    config["created"] = note.created
    config.pop("container", None)
    config.pop("container_config", None)
    if note.author:
        config["author"] = note.author
    runtime = config["config"] = dict(config.get("config") or {})
    configured(runtime, run)
    for change in note.changes:
        apply(runtime, change)
    rootfs = config["rootfs"]
    layers = list(manifest.layers)
    if not config.get("history"):  # a history is whole or not at all: older layers get a line each
        config["history"] = [{"created": base.created or note.created} for _ in layers]
    config["history"] = [*config["history"], step]
    docker = manifest.media_type == manifests.DOCKER_MANIFEST
    if layer is not None:
        diff_id, digest, size = layer
        rootfs["diff_ids"] = [*(rootfs.get("diff_ids") or ()), diff_id]
        kind = f"{manifests.DOCKER_LAYER}.gzip" if docker else f"{manifests.OCI_LAYER}+gzip"
        layers.append(Descriptor(kind, digest, size))
    raw_config = canonical_json(config)
    kind = manifests.DOCKER_CONFIG if docker else manifests.OCI_CONFIG
    digest = images.blobs.put(raw_config, kind)
    raw = document(manifest.media_type, Descriptor(kind, digest, len(raw_config)), layers)
    return images.add(raw, manifest.media_type, reference, event="imageCommitted")


def document(media_type: str, config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """A manifest of the given kind."""
    raw = manifests.document(config, layers)
    return raw.replace(manifests.OCI_MANIFEST.encode(), media_type.encode(), 1)


def configured(runtime: dict[str, Any], run: ContainerConfig) -> None:
    """Let what the container was configured with be the image's."""
    if run.entrypoint is not None:
        runtime["Entrypoint"] = list(run.entrypoint)
        runtime.pop("Cmd", None)
    if run.command is not None:
        runtime["Cmd"] = list(run.command)
    if run.env:
        runtime["Env"] = _env(runtime.get("Env") or [], run.env.items())
    if run.workdir:
        runtime["WorkingDir"] = run.workdir
    if run.user:
        runtime["User"] = run.user
    if run.labels:
        runtime["Labels"] = {**(runtime.get("Labels") or {}), **run.labels}
    if run.stop_signal:
        runtime["StopSignal"] = run.stop_signal


def _env(before: Iterable[str], more: Iterable[tuple[str, str]]) -> list[str]:
    values = dict(text.partition("=")[::2] for text in before)
    values.update(more)
    return [f"{key}={value}" for key, value in values.items()]


# --- Dockerfile words -----------------------------------------------------------------------------------------------


def check(change: str) -> None:
    """InvalidArgument when `change` cannot be applied."""
    apply({}, change)


def apply(runtime: dict[str, Any], change: str) -> None:
    """One instruction, such as `CMD ["sh"]` or `ENV A=1`, on a `config` object. InvalidArgument names the fault."""
    word, _, rest = change.strip().partition(" ")
    word, rest = word.upper(), rest.strip()
    if word not in WORDS:
        raise InvalidArgument(f"change: {word[:40]!r} cannot be changed by a commit", at=word[:40],
                              hint=f"one of {', '.join(WORDS)}")  # fmt: skip
    if not rest:
        raise InvalidArgument(f"change: {word} needs a value", at=change[:80])
    if word in ("CMD", "ENTRYPOINT"):
        runtime["Cmd" if word == "CMD" else "Entrypoint"] = _argv(rest) or ["/bin/sh", "-c", rest]
        if word == "ENTRYPOINT":
            runtime.pop("Cmd", None)
    elif word == "ENV":
        runtime["Env"] = _env(runtime.get("Env") or [], _pairs(word, rest))
    elif word == "LABEL":
        runtime["Labels"] = {**(runtime.get("Labels") or {}), **dict(_pairs(word, rest))}
    elif word == "EXPOSE":
        ports = [port if "/" in port else f"{port}/tcp" for port in rest.split()]
        for port in ports:
            if not re.fullmatch(r"\d{1,5}(-\d{1,5})?/(tcp|udp|sctp)", port):
                raise InvalidArgument(f"change: EXPOSE: not a port: {port}", at=port)
        runtime["ExposedPorts"] = {**(runtime.get("ExposedPorts") or {}), **{port: {} for port in ports}}
    elif word == "VOLUME":
        volumes = _argv(rest) or rest.split()
        runtime["Volumes"] = {**(runtime.get("Volumes") or {}), **{volume: {} for volume in volumes}}
    elif word == "ONBUILD":
        runtime["OnBuild"] = [*(runtime.get("OnBuild") or ()), rest]
    elif word == "WORKDIR":
        before = runtime.get("WorkingDir") or "/"
        runtime["WorkingDir"] = rest if rest.startswith("/") else f"{before.rstrip('/')}/{rest}"
    else:
        runtime["User" if word == "USER" else "StopSignal"] = rest


def _argv(text: str) -> list[str] | None:
    """A JSON list of strings, else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _pairs(word: str, text: str) -> list[tuple[str, str]]:
    """`K=V K2='v w'`, or the old `K v w`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"change: {word}: {error}", at=text[:80]) from error
    if words and "=" not in words[0]:
        key, _, value = text.partition(" ")
        return [(key, value.strip())]
    pairs = [item.partition("=")[::2] for item in words]
    if not all(key and "=" in item for (key, _), item in zip(pairs, words, strict=True)):
        raise InvalidArgument(f"change: {word}: KEY=VALUE expected", at=text[:80])
    return [(key, value) for key, value in pairs]
