"""Engines for tests: a store below tmp_path, and small images put in without a registry."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from ociimages import busybox_rootfs_tar, digest_of, make_tar

from engine.engine import Engine
from engine.lifecycle import State
from engine.records import Container

LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"

SMALL = {"etc": None, "etc/motd": b"ahoy\n", "bin": None, "bin/tool": (0o755, b"x"), "etc/link": "motd"}


def add_image(engine: Engine, reference: str, files: Mapping[str, Any] | bytes = SMALL, **config: Any) -> str:
    """An image of one layer; returns its manifest digest. `config` are fields of the image's `config` object."""
    tar = files if isinstance(files, bytes) else make_tar(files)
    with engine.blobs.writer(LAYER) as writer:
        info = engine.layers.ingest([tar], LAYER, keep=writer)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": config or {"Cmd": ["sleep", "inf"]},
        "rootfs": {"type": "layers", "diff_ids": [info.diff_id]},
    }
    raw = json.dumps(document).encode()
    engine.blobs.put(raw, CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": "sha256:" + hashlib.sha256(raw).hexdigest(), "size": len(raw)},
        "layers": [{"mediaType": LAYER, "digest": digest_of(tar), "size": len(tar)}],
    }
    return str(engine.images.add(json.dumps(manifest).encode(), MANIFEST, reference).digest)


def add_busybox(engine: Engine, reference: str = "docker.io/library/busybox:latest", **config: Any) -> str:
    return add_image(engine, reference, busybox_rootfs_tar(), **(config or {"Cmd": ["sh"]}))


def reach(engine: Engine, name: str, *states: State, seconds: float = 40.0) -> Container:
    """Wait until a container is in one of `states`."""
    found = engine.containers.wait_for(name, lambda now: now.state in states, seconds)
    assert found is not None, f"{name} is {engine.containers.get(name).state}, not {states}"
    return found


def eventually(check: Callable[[], Any], seconds: float = 40.0) -> Any:
    """What `check` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def events(engine: Engine, name_or_object: str | None = None) -> list[dict[str, Any]]:
    """All events (of one object), as the file has them."""
    size = engine.journal.size(name_or_object)
    return [json.loads(line) for line in engine.journal.read(0, size, name_or_object).splitlines()]
