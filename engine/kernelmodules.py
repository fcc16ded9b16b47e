"""The modules a guest needs of a kernel, in the order they are to be loaded in. Floor 1.

Only here: what a guest needs, and how that becomes files: each module's dependencies are read from its .modinfo section
(kernel/module, `depends=` and `softdep=pre:`), so no depmod and none of its tables is needed. What is built in is told
by modules.builtin and the configuration. Pure.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine import kernelimage
from engine.errors import Damaged, InvalidArgument

MAX_MODULE = 64 << 20  # bytes of an unpacked module
SUFFIX = re.compile(r"\.ko(\.(xz|zst|gz))?\Z")

# what a guest needs: (feature, module, CONFIG_ option). Modules of the transport first: the agent speaks through it
ESSENTIAL = (
    ("virtio_mmio", "virtio_mmio", "VIRTIO_MMIO"),
    ("virtio_console", "virtio_console", "VIRTIO_CONSOLE"),
    ("virtio_blk", "virtio_blk", "VIRTIO_BLK"),
    ("erofs", "erofs", "EROFS_FS"),
    ("overlay", "overlay", "OVERLAY_FS"),
    ("ext4", "ext4", "EXT4_FS"),
)
OPTIONAL = (
    ("virtio_pci", "virtio_pci", "VIRTIO_PCI"),
    ("virtio_net", "virtio_net", "VIRTIO_NET"),
    ("9p", "9pnet_virtio", "NET_9P_VIRTIO"),
    ("9p", "9p", "9P_FS"),
    ("virtiofs", "virtiofs", "VIRTIO_FS"),
    ("vsock", "vmw_vsock_virtio_transport", "VIRTIO_VSOCKETS"),
)
AARCH64_PCI = "virtio_pci"  # machines of type virt have PCI: there it is essential instead of virtio_mmio


@dataclass(frozen=True, slots=True)
class Chosen:
    """`modules`: (name, plain ELF bytes) in load order. `features`: what guests of this kernel can do."""

    modules: tuple[tuple[str, bytes], ...]
    features: tuple[str, ...]


def name_of(path: str) -> str | None:
    """`kernel/fs/9p/9p.ko.xz` -> `9p`, with `_` for `-` as the kernel has it; None for what is no module."""
    base = path.rpartition("/")[2]
    return SUFFIX.sub("", base).replace("-", "_") if SUFFIX.search(base) else None


def choose(
    names: Iterable[str], read: Callable[[str], bytes], builtin: Iterable[str], config: str, arch: str
) -> Chosen:
    """What a guest needs. `read` gives a module's file (compressed or not) by name.

    InvalidArgument names what is essential and missing; Damaged a module that cannot be read or depends on what is not
    there.
    """
    known, inside, options = set(names), {name.replace("-", "_") for name in builtin}, settings(config)
    loaded: dict[str, bytes] = {}
    under_way: list[str] = []

    def load(name: str, needed_by: str) -> None:
        name = name.replace("-", "_")
        if name in loaded or name in inside:
            return
        if name not in known:
            raise Damaged(f"module {needed_by} depends on {name}, which is not in the package", at=name)
        if name in under_way:
            raise Damaged(f"modules depend on each other: {' '.join(under_way)} {name}", at=name)
        under_way.append(name)
        data = plain(read(name), name)
        info = modinfo(data, name, arch)
        for below in _soft(info, known, read, arch):
            load(below, name)
        for below in filter(None, info.get("depends", [""])[0].split(",")):
            load(below, name)
        under_way.pop()
        loaded[name] = data

    features: list[str] = []
    missing = []
    for essential, table in ((True, ESSENTIAL), (False, OPTIONAL)):
        for feature, module, option in table:
            if module in known:
                load(module, "a guest")
            elif module not in inside and options.get(option) != "y":
                if essential and (options or known):
                    missing.append(f"{module} (CONFIG_{option})")
                if feature in features:
                    features.remove(feature)
                continue
            if feature not in features:
                features.append(feature)
    if arch == kernelimage.AARCH64 and AARCH64_PCI in features:
        missing = [item for item in missing if not item.startswith("virtio_mmio ")]
    if missing:
        raise InvalidArgument(
            f"a guest needs what this kernel lacks: {', '.join(missing)}",
            at=missing[0].split()[0],
            hint="Debian's linux-image-amd64 has all of it; its cloud flavour lacks 9p only",
        )
    return Chosen(tuple(loaded.items()), tuple(sorted(features)))


def settings(config: str) -> Mapping[str, str]:
    """CONFIG_ options that are set, without the prefix."""
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", config, re.M))


def _soft(info: Mapping[str, list[str]], known: set[str], read: Callable[[str], bytes], arch: str) -> list[str]:
    """Modules that should be there before, as far as there are any: `softdep=pre: crc32c` may name an alias."""
    out = []
    for line in info.get("softdep", []):
        for wanted in re.sub(r"post:.*", "", line.partition("pre:")[2]).split():
            name = wanted.replace("-", "_")
            if name in known:
                out.append(name)
                continue
            for other in sorted(known):  # one of those named for it, the generic one first
                if other == f"{name}_generic" and wanted in modinfo(plain(read(other), other), other, arch)["alias"]:
                    out.append(other)
    return out


def plain(data: bytes, name: str) -> bytes:
    packed = kernelimage.compression(data)
    return data if packed is None else kernelimage.decompress(data, packed, MAX_MODULE)


def modinfo(data: bytes, name: str, arch: str) -> dict[str, list[str]]:
    """The `key=value` strings of a module's .modinfo. Damaged when it is no module for `arch`."""
    try:
        if (
            data[:6] != b"\x7fELF\x02\x01"
            or kernelimage.ELF_MACHINES.get(struct.unpack_from("<H", data, 18)[0]) != arch
        ):
            raise Damaged(f"module {name} is no ELF file for {arch}", at=name)
        table = struct.unpack_from("<Q", data, 40)[0]
        size, count, names = struct.unpack_from("<HHH", data, 58)

        def section(index: int) -> tuple[int, bytes]:
            label, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
            return label, data[offset : offset + length]

        strings = section(names)[1]
        for index in range(count):
            label, body = section(index)
            if strings[label : label + 9] == b".modinfo\0":
                out: dict[str, list[str]] = {"alias": []}
                for item in body.split(b"\0"):
                    key, equals, value = item.decode(errors="replace").partition("=")
                    if equals:
                        out.setdefault(key, []).append(value)
                return out
    except (struct.error, OverflowError) as error:  # a table beyond the end, far beyond
        raise Damaged(f"module {name} is cut short: {error}", at=name) from error
    raise Damaged(f"module {name} has no .modinfo", at=name)
