"""Images for other processors than this host's: which machine runs one, and whether this host's processes can.

Floor 2, no state. An image names its platform (image-spec config.md, as Go does); a machine has uname's name. A virtual
machine is of the image's architecture, emulated where it is not the host's. A process needs an interpreter then, of
the kernel's binfmt_misc: one that was opened when it was registered (flag F), for a container has none.
Source: Documentation/admin-guide/binfmt-misc.rst; elf.h for the numbers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from engine.errors import InvalidArgument, Unsupported
from engine.images import manifests
from engine.images.manifests import Platform
from engine.kernels import platform_arch
from engine.model import ImageConfig

MACHINES = {"amd64": "x86_64", "386": "x86_64", "arm64": "aarch64", "arm": "aarch64"}  # what a kernel of it runs
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ELF = {"amd64": b"\x3e\0", "386": b"\x03\0", "arm64": b"\xb7\0", "arm": b"\x28\0"}  # e_machine
ELF |= {"riscv64": b"\xf3\0", "ppc64le": b"\x15\0", "s390x": b"\0\x16", "loong64": b"\x02\x01"}


def platform_of(image: ImageConfig) -> Platform:
    """An image that does not say is for this host."""
    here = manifests.host()
    if image.architecture in ("", "unknown"):
        return here
    return manifests.normalise(Platform(image.os or "linux", image.architecture, image.variant))


def machine_of(image: ImageConfig) -> str:
    """The machine its programs run on; the platform's own word where none is known here."""
    architecture = platform_of(image).architecture
    if architecture == manifests.host().architecture:
        return platform_arch()
    return MACHINES.get(architecture, architecture)


def is_native(image: ImageConfig) -> bool:
    """Whether processors of this host's kind run it."""
    architecture, here = platform_of(image).architecture, manifests.host().architecture
    return MACHINES.get(architecture, architecture) == MACHINES.get(here, here)


def check(image: ImageConfig, rules: Path = BINFMT) -> None:
    """Unsupported when a process of this host cannot run its programs."""
    wanted = platform_of(image)
    if is_native(image) or interpreted(wanted.architecture, rules):
        return
    emulated = "virtual machines emulate it: echo vm > config/runtime, or run --runtime vm"
    other = "register qemu-user-static for it, or pull the image for this host"
    raise Unsupported(
        f"the image is for {wanted}, and this host is {manifests.host()}",
        at=str(wanted),
        hint=emulated if wanted.architecture in MACHINES else other,
    )


def interpreted(architecture: str, rules: Path = BINFMT) -> bool:
    """Whether the kernel has an interpreter for ELF files of that architecture, which containers can use."""
    number = ELF.get(architecture)
    if number is None or not rules.is_dir():
        return False
    for path in rules.iterdir():
        if path.name in ("register", "status"):
            continue
        with contextlib.suppress(OSError, ValueError):  # it was just removed
            lines = [line.partition(" ") for line in path.read_text().splitlines()]
            known = {key.rstrip(":"): value for key, _, value in lines}
            magic, usable = bytes.fromhex(known.get("magic", "")), "enabled" in known and "F" in known.get("flags", "")
            if usable and known.get("offset") == "0" and (magic[:4], magic[18:20]) == (b"\x7fELF", number):
                return True
    return False


def check_init(machine: str) -> None:
    """The program of `init` is the host's own: InvalidArgument for a guest of another architecture."""
    if machine != platform_arch():
        raise InvalidArgument(
            f"init: this host's init program is for {platform_arch()}, the image for {machine}",
            at="init",
            hint="an init in the image, as its entrypoint, does the same",
        )
