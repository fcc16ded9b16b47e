"""Room set aside in the store, given up so that on a full disk things can still be stopped and removed.

Floor 1. Only here: the file `reserve` of the store. SQLite needs some pages to record even a removal; without a reserve
a full disk could only be emptied by hand. Thread-safe: each call is one system call that may be repeated.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

SIZE = 1 << 20  # bytes: many small transactions in the write-ahead log
FREEING = frozenset(("stop", "kill", "remove", "rmdir", "prune", "gc", "untag", "cancel", "down"))


class Reserve:
    """The reserve of the store at `root`."""

    def __init__(self, root: Path) -> None:
        self._path = root / "reserve"

    def keep(self) -> bool:
        """Set the room aside again; False where there is not enough (twice the reserve must be free)."""
        try:
            if self._path.stat().st_size >= SIZE:
                return True
        except FileNotFoundError:
            pass
        space = os.statvfs(self._path.parent)
        if space.f_bavail * space.f_frsize < 2 * SIZE:
            return False
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, SIZE)
            else:
                os.pwrite(fd, bytes(SIZE), 0)
        except OSError as error:
            os.ftruncate(fd, 0)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        finally:
            os.close(fd)
        return True

    def give_up(self) -> bool:
        """Free the room; False when it had been given up already."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return False
        return True
