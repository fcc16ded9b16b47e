"""Filling a volume from elsewhere so that it has all or nothing. Floor 2, no state.

Only here: the two places a filling passes through. What is made for a volume is made in `filling`, becomes durable,
becomes `filled` by one rename, and its entries then move up into `data/`. Whoever finds `filling` (a crash) clears it;
whoever finds `filled` goes on moving. Both lie beside `data/`, or in it when something is mounted there: a rename
cannot leave a file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from engine import host, hostmounts
from engine.errors import Busy
from engine.treecopy import copy_metadata

FILLING, FILLED = ".dutchman-filling", ".dutchman-filled"
OURS = frozenset({FILLING.encode(), FILLED.encode(), b"lost+found"})


def covered(data: Path) -> bool:
    """Whether something is mounted over it. By the mount table: a bound directory may be of the same device, and a
    server that is gone must not be asked."""
    return host.LINUX and hostmounts.is_mounted(Path(os.path.realpath(data.parent)) / data.name)


def empty(data: Path) -> bool:
    """Whether a volume holds nothing."""
    with os.scandir(data) as entries:
        return all(os.fsencode(entry.name) in OURS for entry in entries)


def fill(data: Path, produce: Callable[[Path], None]) -> None:
    """Have `produce` make the content of the empty volume at `data` in a directory it is given, metadata of that
    directory included. Busy when the volume is not empty; nothing is left when it fails."""
    recover(data)
    if not empty(data):
        raise Busy("the volume is not empty", hint="use a new volume, or remove what is in it")
    filling, filled = _places(data)
    filling.mkdir(mode=0o700)
    try:
        with host.directory_fd(filling) as fd:
            with host.directory_fd(data) as before:
                copy_metadata(before, fd)
            produce(filling)
            host.sync_file_system(fd)
    except BaseException:
        host.remove_tree(filling)
        raise
    os.rename(filling, filled)
    host.fsync_dir(filled.parent)
    recover(data)


def recover(data: Path) -> None:
    """Finish or clear what a crash left. What has been put there since stays."""
    filling, filled = _places(data)
    if os.path.lexists(filling):
        host.remove_tree(filling)
    if not os.path.lexists(filled):
        return
    for name in sorted(os.listdir(filled)):
        if not os.path.lexists(data / name):
            os.rename(filled / name, data / name)
    with host.directory_fd(filled) as source, host.directory_fd(data) as target:
        copy_metadata(source, target)
    host.fsync_dir(data)
    host.remove_tree(filled)


def _places(data: Path) -> tuple[Path, Path]:
    base = data if covered(data) else data.parent
    return base / FILLING, base / FILLED


def unmount_litter(store: Path) -> None:
    """Take down what a killed daemon mounted for a volume in the making; before tmp/ is emptied."""
    prefix = f"{os.path.abspath(store / 'tmp')}/volume-new-"
    for point, _, _ in hostmounts.mounts() if host.LINUX else ():
        if point.startswith(prefix):
            hostmounts.unmount(Path(point))
