"""What of the host a machine gets to see: the sources of its container's bind mounts. Floor 2.

Only here: how they come together in the directory QEMU exports, each named by its number. On Linux they are bound there
in a mount namespace that ends with this process: the host's own table of mounts stays as it is. Where there are no
mounts (macOS) a directory is exported by itself, and of a file there is another name, or a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from engine import host
from engine.errors import RuntimeFailure
from engine.runtimes.vm.qemu import SHARES

CONTAINERS = re.compile("/containers/[0-9a-f]{64}/")  # in a path: of a container's own mounts, in whatever store
LOCKED = os.ST_NOSUID | getattr(os, "ST_NODEV", 0) | getattr(os, "ST_NOEXEC", 0)  # same as MS_*
CLONE_NEWNS, MS_SLAVE = 0x20000, 1 << 19  # <linux/sched.h>, <sys/mount.h>


def bind(place: Path, sources: Mapping[str, bool], store: Path) -> None:
    """`sources`, paths and whether the guest may write there, bound in the directory `place`; `store` is left out."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) < 0:
        raise RuntimeFailure(f"a mount namespace for what is shared: {os.strerror(ctypes.get_errno())}")
    host.mount("none", Path("/"), "none", host.MS_REC | MS_SLAVE)
    for number, (source, writable) in enumerate(sources.items()):
        target = place / str(number)
        host.remove_tree(target)
        target.mkdir() if os.path.isdir(source) else target.touch()
        host.mount(source, target, "none", host.MS_BIND | host.MS_REC)
        if not writable:  # whatever the guest says
            kept = os.statvfs(target).f_flag & LOCKED  # without root the kernel refuses to drop them
            host.mount("none", target, "none", host.MS_BIND | host.MS_REMOUNT | host.MS_RDONLY | kept)
    # copies of the store's and people's mounts would keep disks and file systems alive that others take down;
    # of other stores, too: the disk of a machine that is about to start must be mounted nowhere
    for point, kind, _ in reversed(list(host.mounts())):
        within = point.startswith(f"{store}/") or kind.startswith("fuse") or CONTAINERS.search(point)
        if within and not point.startswith(f"{place}/"):
            with contextlib.suppress(PermissionError):  # somebody else's, of before this user's namespace
                host.unmount(Path(point))


def gather(place: Path, sources: Mapping[str, bool], directories: Collection[int]) -> None:
    """The same without mounts: `directories` are the numbers of those exported by themselves, the guest mounts them
    here. A file that the guest may write to has another name here, any other is copied."""
    for number, (source, writable) in enumerate(sources.items()):
        target = place / str(number)
        host.remove_tree(target)
        if number in directories:
            target.mkdir()
            continue
        if writable:
            with contextlib.suppress(OSError):  # it lies on another disk
                os.link(source, target)
                continue
        target.write_bytes(Path(source).read_bytes())


def numbers(sources: Mapping[str, bool]) -> list[int]:
    """Of those that are directories."""
    return [number for number, source in enumerate(sources) if os.path.isdir(source)]


def tag(number: int) -> str:
    """Of a directory that is exported by itself."""
    return f"{SHARES}{number}"


def exports(sources: Mapping[str, bool], directories: Collection[int]) -> list[tuple[str, str, bool]]:
    """Their tags, paths, and whether they are read-only."""
    items = list(sources.items())
    return [(tag(number), items[number][0], not items[number][1]) for number in directories]
