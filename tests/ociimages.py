"""Images made on the spot for tests: OCI layouts, multi-platform indexes, docker-archives. No network, no engine code.

A layer is given as tar bytes, or as a mapping `path -> content` where content is bytes (a file, 0644), str (a symlink's
target), None (a directory) or a (mode, bytes) pair.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

Layer = bytes | Mapping[str, Any]

BUSYBOX = Path("/bin/busybox")
APPLETS = "sh ls cat echo sleep true false env id pwd mkdir rm ps kill test date head tail seq yes hostname mount sync"
SUFFIX = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def make_tar(files: Mapping[str, Any]) -> bytes:
    """A deterministic tar of `files` (see the module docstring)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.lstrip("/"))
            info.mtime = 1_700_000_000
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, content, 0o777
                tar.addfile(info)
            else:
                info.mode, body = content if isinstance(content, tuple) else (0o644, content)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def busybox_rootfs_tar(busybox: Path = BUSYBOX) -> bytes:
    """A root filesystem of Debian's busybox-static: /bin/busybox, its applets as symlinks, /etc/passwd, /tmp …"""
    files: dict[str, Any] = {name: None for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var")}
    files["bin/busybox"] = (0o755, busybox.read_bytes())
    for applet in APPLETS.split():
        files[f"bin/{applet}"] = "busybox"
    files["etc/passwd"] = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
    files["etc/group"] = b"root:x:0:\nnogroup:x:65534:\n"
    return make_tar(files)


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=3).compress(data)
    assert compression == "none"
    return data


def _put(layout: Path, data: bytes) -> str:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    digest = digest_of(data)
    (blobs / digest[7:]).write_bytes(data)
    return digest


def _index(layout: Path, descriptor: dict[str, Any], reference: str | None) -> None:
    path = layout / "index.json"
    index = json.loads(path.read_text()) if path.exists() else {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    if reference is not None:
        descriptor = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": reference}}
    index["manifests"].append(descriptor)
    path.write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def make_layout(
    directory: Path,
    layers: Sequence[Layer],
    *,
    config: Mapping[str, Any] | None = None,
    compression: str = "gzip",
    platform: str = "linux/amd64",
    created: str = "2024-01-02T03:04:05Z",
    reference: str | None = "latest",
    listed: bool = True,
) -> str:
    """Add an image to the OCI layout at `directory`; returns its manifest's digest.

    `config` is the `config` object (Env, Cmd, …). `listed=False` leaves it out of index.json (for make_index).
    """
    tars = [layer if isinstance(layer, bytes) else make_tar(layer) for layer in layers]
    descriptors = []
    for tar in tars:
        blob = compress(tar, compression)
        media_type = "application/vnd.oci.image.layer.v1.tar" + SUFFIX[compression]
        descriptors.append({"mediaType": media_type, "digest": _put(directory, blob), "size": len(blob)})
    system, architecture, *variant = platform.split("/")
    document: dict[str, Any] = {
        "created": created,
        "architecture": architecture,
        "os": system,
        "config": dict(config or {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}),
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        "history": [{"created": created, "created_by": f"COPY layer{n} /"} for n in range(len(tars))],
    }
    if variant:
        document["variant"] = variant[0]
    raw = json.dumps(document).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": _put(directory, raw),
                "size": len(raw),
            },
            "layers": descriptors,
        }
    ).encode()
    digest = _put(directory, manifest)
    if listed:
        _index(directory, {"mediaType": MANIFEST, "digest": digest, "size": len(manifest)}, reference)
    return digest


def make_index(directory: Path, manifests: Mapping[str, str], *, reference: str | None = "latest") -> str:
    """Add an image index over `platform -> manifest digest` of the same layout; returns the index's digest."""
    descriptors = []
    for platform, digest in manifests.items():
        system, architecture, *variant = platform.split("/")
        entry: dict[str, Any] = {"architecture": architecture, "os": system}
        if variant:
            entry["variant"] = variant[0]
        size = (directory / "blobs" / "sha256" / digest[7:]).stat().st_size
        descriptors.append({"mediaType": MANIFEST, "digest": digest, "size": size, "platform": entry})
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": descriptors}).encode()
    digest = _put(directory, raw)
    _index(directory, {"mediaType": INDEX, "digest": digest, "size": len(raw)}, reference)
    return digest


def make_docker_archive(path: Path, layers: Sequence[Layer], *, tags: Sequence[str] = ("demo:1",)) -> str:
    """A `docker save` archive at `path`; returns the config's digest (the image ID)."""
    tars = [layer if isinstance(layer, bytes) else make_tar(layer) for layer in layers]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        }
    ).encode()
    names = [f"{digest_of(tar)[7:]}/layer.tar" for tar in tars]
    document = [{"Config": f"{digest_of(config)[7:]}.json", "RepoTags": list(tags), "Layers": names}]
    files: dict[str, Any] = {document[0]["Config"]: config, **dict(zip(names, tars, strict=True))}  # type: ignore[dict-item]
    files["manifest.json"] = json.dumps(document).encode()
    path.write_bytes(make_tar(files))
    return digest_of(config)
