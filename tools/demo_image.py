"""Write the demo images, demo:1 and demo:2, as one docker-archive, from a statically linked busybox. No network.

    python tools/demo_image.py OUTPUT [BUSYBOX]

Both share a base layer (busybox, its applets as symlinks, a minimal /etc); each has its own top layer, so there is
something to compare. The same busybox gives the same bytes. Standard library only. Format: Docker image spec v1.2
("Combined Image JSON + Filesystem Changeset Format"), as `docker load` takes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

CREATED = "2024-01-01T00:00:00Z"
MTIME = 1704067200
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "ppc64le": "ppc64le"}

TICK = """#!/bin/sh
# print a line each second; end at once when asked to
trap 'echo "demo: asked to stop, bye"; exit 0' TERM INT
n=0
echo "demo: hello from $(hostname)"
while :; do
    n=$((n + 1))
    echo "tick $n"
    sleep 1 & wait $!
done
"""


class Layer:
    """A layer tar in the making: names in the order given, owner root, one fixed time."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._bytes, mode="w", format=tarfile.USTAR_FORMAT)

    def _add(self, name: str, kind: bytes, mode: int, body: bytes = b"", link: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname, info.mtime = kind, mode, len(body), link, MTIME
        info.uname = info.gname = "root"
        self._tar.addfile(info, io.BytesIO(body))

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._add(name, tarfile.DIRTYPE, mode)

    def file(self, name: str, body: bytes | str, mode: int = 0o644) -> None:
        self._add(name, tarfile.REGTYPE, mode, body if isinstance(body, bytes) else body.encode())

    def symlink(self, name: str, target: str) -> None:
        self._add(name, tarfile.SYMTYPE, 0o777, link=target)

    def whiteout(self, name: str) -> None:
        directory, _, base = name.rpartition("/")
        self.file(f"{directory}/.wh.{base}", b"")

    def done(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()


def base_layer(busybox: bytes, applets: list[str]) -> bytes:
    layer = Layer()
    for name in ("bin", "dev", "etc", "proc", "root", "run", "srv", "sys", "tmp", "usr", "usr/bin", "usr/sbin", "var"):
        layer.directory(name, 0o1777 if name == "tmp" else 0o700 if name == "root" else 0o755)
    layer.symlink("sbin", "bin")
    layer.file("bin/busybox", busybox, 0o755)
    for applet in sorted(set(applets) - {"busybox"}):
        layer.symlink(f"bin/{applet}", "busybox")
    layer.symlink("usr/bin/env", "../../bin/busybox")
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    layer.file("etc/group", "root:x:0:\nnogroup:x:65534:\n")
    layer.file("etc/issue", "base system\n")
    return layer.done()


def top_layer(version: int) -> bytes:
    layer = Layer()
    layer.directory("bin")
    layer.file("bin/demo", TICK, 0o755)
    layer.directory("etc")
    layer.whiteout("etc/issue")
    layer.directory("srv")
    layer.file("srv/hello.txt", f"Hello from version {version}.\n")
    if version > 1:
        layer.file("srv/new.txt", "This file is new.\n")
    return layer.done()


def is_static(binary: bytes) -> bool:
    """Whether a 64-bit little-endian ELF names no interpreter (PT_INTERP); other kinds are taken as they are."""
    if binary[:6] != b"\x7fELF\x02\x01":
        return True
    offset = struct.unpack_from("<Q", binary, 32)[0]
    size, count = struct.unpack_from("<HH", binary, 54)
    return all(struct.unpack_from("<I", binary, offset + i * size)[0] != 3 for i in range(count))


def image(version: int, layers: list[bytes]) -> bytes:
    digests = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    steps = ["busybox and a minimal /etc", f"demo {version}: a program and two files in /srv"]
    document = {
        "architecture": MACHINES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "created": CREATED,
        "config": {
            "Cmd": ["/bin/demo"],
            "Env": ["PATH=/usr/bin:/bin"],
            "WorkingDir": "/",
            "Labels": {"org.opencontainers.image.version": str(version)},
        },
        "rootfs": {"type": "layers", "diff_ids": digests},
        "history": [{"created": CREATED, "created_by": step} for step in steps],
    }
    return json.dumps(document, sort_keys=True).encode()


def write_archive(output: Path, busybox: Path) -> None:
    binary = busybox.read_bytes()
    if not is_static(binary):
        raise SystemExit(f"demo_image: {busybox} is linked dynamically; install busybox-static")
    listing = subprocess.run([str(busybox), "--list"], check=True, capture_output=True, text=True, timeout=30)
    base = base_layer(binary, listing.stdout.split())
    manifest = []
    files: dict[str, bytes] = {}
    for version in (1, 2):
        layers = [base, top_layer(version)]
        config = image(version, layers)
        names = []
        for layer in layers:
            names.append(f"{hashlib.sha256(layer).hexdigest()}.tar")
            files[names[-1]] = layer
        files[f"{hashlib.sha256(config).hexdigest()}.json"] = config
        tags = [f"demo:{version}"]
        manifest.append({"Config": f"{hashlib.sha256(config).hexdigest()}.json", "RepoTags": tags, "Layers": names})
    files["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(body), MTIME, stat.S_IMODE(0o644)
            archive.addfile(info, io.BytesIO(body))


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python tools/demo_image.py OUTPUT [BUSYBOX]")
    found = sys.argv[2] if len(sys.argv) == 3 else shutil.which("busybox")
    if not found:
        raise SystemExit("demo_image: there is no busybox here; install busybox-static")
    write_archive(Path(sys.argv[1]), Path(found))


if __name__ == "__main__":
    main()
