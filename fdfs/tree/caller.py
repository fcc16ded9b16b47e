"""Who asks: the caller of the operation a thread of the mount is carrying out. Floor 5.

The binding sets `source` when it mounts; without a mount (tests of the tree) the caller is this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

source: Callable[[], tuple[int, int, int]] | None = None  # -> uid, gid, pid


def caller() -> tuple[int, int, int]:
    """(uid, gid, pid)."""
    return source() if source is not None else (os.geteuid(), os.getegid(), os.getpid())
