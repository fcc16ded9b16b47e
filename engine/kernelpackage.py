"""A Debian kernel package as a guest's kernel: its image and the modules a guest needs, dependencies first. Floor 1.

Only here: how such a package is laid out, and .modinfo sections. The package is foreign: dpkg-deb unpacks it as
a stream, members are bounded, and nothing is written by name. No state.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from engine.errors import Damaged, Unsupported
from engine.kernelimage import MAX_PACKED, compression, decompress

WANTED = (  # in this order; what the kernel has built in is not there and needs not be
    "virtio_mmio", "virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "erofs", "ext4", "overlay",
    "9pnet_virtio", "9p", "virtiofs", "vmw_vsock_virtio_transport", "af_packet",
)  # fmt: skip
MAX_MODULE = 64 << 20  # bytes, unpacked
MAX_MODULES = 20_000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_BEFORE = re.compile(rb"\0softdep=pre: ([^\0]*)\0")


def read(package: Path) -> tuple[bytes, list[tuple[str, bytes]]]:
    """(the kernel file, the modules by name in the order they are loaded in). Damaged; Unsupported without dpkg-deb."""
    try:
        process = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise Unsupported("dpkg-deb is not installed", hint="apt-get install dpkg, or import a vmlinux") from error
    assert process.stdout is not None and process.stderr is not None
    kernel, packed = b"", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if not member.isreg():
                    continue
                if name.startswith("boot/vmlinuz-"):
                    if member.size > MAX_PACKED:
                        raise Damaged(f"a kernel of {member.size} bytes", at=name)
                    kernel = _content(archive, member)
                elif "/lib/modules/" in f"/{name}" and ".ko" in name:
                    module = name.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
                    if member.size > MAX_MODULE or len(packed) >= MAX_MODULES:
                        raise Damaged("too many modules, or too large a one", at=name)
                    if _NAME.match(module):
                        packed[module] = _content(archive, member)
        said = process.stderr.read(2000)
    except tarfile.TarError as error:
        raise Damaged(f"not a Debian package: {error}", at=str(package)) from error
    finally:
        process.kill()
        process.wait()
    if not kernel:
        words = " ".join(said.decode(errors="replace").split())
        raise Damaged(f"no kernel image is in this package{': ' + words if words else ''}", at=str(package))
    return kernel, resolve(packed)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def resolve(packed: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """WANTED and what they depend on, dependencies first (modprobe's depends and softdep pre:)."""
    order: list[tuple[str, bytes]] = []
    seen: set[str] = set()

    def need(name: str) -> None:
        name = name.replace("-", "_")
        if name in seen or name not in packed:
            return
        seen.add(name)
        data = packed[name]
        if (how := compression(data)) is not None:
            data = decompress(data, how, MAX_MODULE)
        before = _BEFORE.search(data)
        depends = _DEPENDS.search(data)
        others = before[1].decode().split() if before else []
        others += depends[1].decode().split(",") if depends else []
        for other in others:
            need(other)
            if other == "crc32c":  # an algorithm, not a module
                need("crc32c_generic")
        order.append((name, data))

    for name in WANTED:
        need(name)
    return order
