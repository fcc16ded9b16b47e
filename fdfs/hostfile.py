"""Open files of host directories shown through the mount, and their stat. Floor 5."""

from __future__ import annotations

import os

from engine import hostfiles, userids
from fdfs import unlinked
from fdfs.entry import Attr


def to_attr(st: os.stat_result, mix: int = 0) -> Attr:
    uid, gid = userids.shown(st.st_uid, st.st_gid)
    return Attr(
        mode=st.st_mode,
        size=st.st_size,
        ino=mix + st.st_ino,
        nlink=st.st_nlink,
        uid=uid,
        gid=gid,
        mtime_ns=st.st_mtime_ns,
        ctime_ns=st.st_ctime_ns,
        atime_ns=st.st_atime_ns,
        rdev=st.st_rdev,
        blocks=st.st_blocks,
        blksize=st.st_blksize,
    )


class HostFile:
    """An open host file."""

    direct = False
    keep = False

    def __init__(self, fd: int, mix: int, *, append: bool = False) -> None:
        self._fd = fd
        self._mix = mix
        self._append = append
        self._identity = unlinked.opened(fd)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def write(self, data: bytes, offset: int) -> int:
        if self._append:  # the offset the kernel computed may be stale: a container appends behind our back
            return os.write(self._fd, data)
        return os.pwrite(self._fd, data, offset)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def flush(self) -> None:
        os.close(os.dup(self._fd))  # where close reports what write could not (NFS, quota)

    def fsync(self) -> None:
        os.fsync(self._fd)

    def attr(self) -> Attr | None:
        return to_attr(os.fstat(self._fd), self._mix)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        hostfiles.fallocate(self._fd, mode, offset, length)

    def close(self) -> None:
        try:
            os.close(self._fd)
        finally:
            unlinked.closed(self._identity)
