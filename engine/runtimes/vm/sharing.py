"""What of the host a machine gets to see: the sources of its container's bind mounts. Floor 2.

Only here: how they come together in the directory QEMU exports, each named by its number. On Linux they are bound there
in a mount namespace that ends with this process: the host's own table of mounts stays as it is. Where there are no
mounts (macOS) a directory is exported by itself, and of a file there is another name, or a copy.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from engine import host, hostmounts
from engine.errors import RuntimeFailure
from engine.runtimes.vm.qemu import SHARES

CONTAINERS = re.compile("/containers/[0-9a-f]{64}/")  # in a path: of a container's own mounts, in whatever store


def bind(place: Path, sources: Mapping[str, bool], store: Path) -> None:
    """`sources`, paths and whether the guest may write there, bound in the directory `place`; `store` is left out."""
    try:
        hostmounts.unshare(hostmounts.CLONE_NEWNS)
    except OSError as error:
        raise RuntimeFailure(f"a mount namespace for what is shared: {error.strerror}") from error
    hostmounts.keep_to_itself()
    for number, (source, writable) in enumerate(sources.items()):
        target = place / str(number)
        host.remove_tree(target)
        target.mkdir() if os.path.isdir(source) else target.touch()
        hostmounts.mount(source, target, "none", hostmounts.MS_BIND | hostmounts.MS_REC)
        if not writable:  # whatever the guest says
            hostmounts.make_read_only(target)
    let_go(store, place)


def let_go(store: Path, place: Path) -> None:
    """Unmount, in this mount namespace, all but what lies in `place`. Copies of the store's and people's mounts would
    keep disks and file systems alive that others take down; those of other stores, too: the disk of a machine that is
    about to start must be mounted nowhere."""
    for point, kind, _ in reversed(hostmounts.mounts()):
        within = point.startswith(f"{store}/") or kind.startswith("fuse") or CONTAINERS.search(point)
        if within and not point.startswith(f"{place}/"):
            with contextlib.suppress(PermissionError):  # somebody else's, of before this user's namespace
                hostmounts.unmount(Path(point))


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
