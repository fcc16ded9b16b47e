"""What read-only trees have in common. Floor 5. Pure.

Only here: an open file of one, what is refused in one, and how one extended attribute is found among all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from engine.errors import ReadOnly
from fdfs.entry import BLOCK, Attr

TREE = "this tree is read-only"
STATFS = {"f_bsize": 4096, "f_frsize": BLOCK, "f_namemax": 255}


class ReadHandle:
    """An open file. No state: closing does nothing."""

    def __init__(self, read: Callable[[int, int], bytes], *, generated: bool = False, refusal: str = TREE) -> None:
        """`read` takes size and offset. A `generated` file may be another the next time."""
        self.read = read
        self.direct, self.keep = generated, not generated
        self._refusal = refusal

    def write(self, data: bytes, offset: int) -> int:
        raise ReadOnly(self._refusal)

    def truncate(self, size: int) -> None:
        raise ReadOnly(self._refusal)

    def flush(self) -> None: ...

    def fsync(self) -> None: ...

    def attr(self) -> Attr | None:
        return None

    def close(self) -> None: ...


def check_flags(flags: int, refusal: str = TREE) -> None:
    """ReadOnly for an open(2) that would write."""
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
        raise ReadOnly(refusal)


def one_of(xattrs: Mapping[bytes, bytes], name: bytes) -> bytes:
    """OSError ENODATA when it is not among them."""
    found = xattrs.get(name)
    if found is None:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    return found
