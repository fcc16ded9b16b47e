"""How many bytes the store takes on disk, per class, as `du` counts them. Floor 1.

Only here: measuring. Bytes are allocated blocks of files and directories, so holes count for nothing and small files
for a whole block. Directories are listed, not walked deeply; the result is believed for a moment. Thread-safe.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CLASSES = ("blobs", "layers", "trees")
BELIEVED = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class Size:
    """`count` objects; `bytes`: their files' sizes; `disk`: allocated, directories included (as `du -sB1`)."""

    count: int
    bytes: int
    disk: int


def allocated(paths: Iterable[Path]) -> int:
    """Bytes allocated to files, or to directories with the files in them; what is not there counts nothing."""
    total = 0
    for path in paths:
        try:
            stat = os.lstat(path)
            total += stat.st_blocks * 512
            if path.is_dir() and not path.is_symlink():
                with os.scandir(path) as entries:
                    total += sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
        except FileNotFoundError:
            continue
    return total


def _measure(top: Path) -> Size:
    count = size = disk = 0
    try:
        disk += top.stat().st_blocks * 512
        folder = top / "sha256"
        disk += folder.stat().st_blocks * 512
        with os.scandir(folder) as objects:
            for item in objects:
                count += 1
                try:
                    stat = item.stat(follow_symlinks=False)
                    disk += stat.st_blocks * 512
                    if not item.is_dir(follow_symlinks=False):
                        size += stat.st_size
                        continue
                    with os.scandir(item.path) as files:
                        for file in files:
                            stat = file.stat(follow_symlinks=False)
                            size, disk = size + stat.st_size, disk + stat.st_blocks * 512
                except FileNotFoundError:
                    continue  # removed meanwhile
    except FileNotFoundError:
        pass
    return Size(count, size, disk)


class Usage:
    """Of the store at `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known: tuple[float, dict[str, Size]] = (0.0, {})

    def measure(self, *, fresh: bool = False) -> dict[str, Size]:
        """By class. `fresh` does not believe an earlier answer."""
        with self._lock:
            then, known = self._known
            if fresh or not known or time.monotonic() - then > BELIEVED:
                known = {name: _measure(self._root / name) for name in CLASSES}
                self._known = (time.monotonic(), known)
            return known

    def total(self) -> int:
        """Bytes on disk that the policy's max_size bounds."""
        return sum(size.disk for size in self.measure(fresh=True).values())
