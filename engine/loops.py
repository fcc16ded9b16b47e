"""Loop devices: files as block devices. Floor 0, no state.

Only here: their ioctls. Source: <linux/loop.h>.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_GET_STATUS64 = 0x4C82, 0x4C0A, 0x4C05
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4


def attach(
    path: Path, flags: int = LO_FLAGS_READ_ONLY, block: int = 4096, *, file: int | None = None
) -> tuple[int, str]:
    """A loop device over `path`, `block` bytes a sector, that goes away with its last user: (open fd, device path).

    `file`: the path, opened. The device keeps that very opening, so an flock(2) on it lasts as long as the device.
    """
    access = os.O_RDONLY if flags & LO_FLAGS_READ_ONLY else os.O_RDWR
    for _ in range(16):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
        name = f"/dev/loop{number}"
        device = os.open(name, access | os.O_CLOEXEC)
        backing = os.open(path, access | os.O_CLOEXEC) if file is None else os.dup(file)
        try:
            # struct loop_config { __u32 fd, block_size; struct loop_info64 info (232 bytes, lo_flags at 52); __u64[8] }
            config = bytearray(8 + 232 + 64)
            struct.pack_into("<II", config, 0, backing, block)
            struct.pack_into("<I", config, 8 + 52, flags | LO_FLAGS_AUTOCLEAR)
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
            return device, name
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # another process took it between the two calls
                raise
        finally:
            os.close(backing)
    raise OSError(errno.EBUSY, "no free loop device", str(path))


def of(path: Path) -> tuple[int, str] | None:
    """The writable loop device that `path` is attached to already: (open fd, device path)."""
    info = os.stat(path)
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        name = f"/dev/{entry.parts[3]}"
        try:
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            status = bytearray(232)  # struct loop_info64: lo_device, lo_inode, lo_rdevice …
            fcntl.ioctl(device, LOOP_GET_STATUS64, status)
            if struct.unpack_from("<QQ", status) == (info.st_dev, info.st_ino):
                return device, name
        except OSError:
            pass  # let go of meanwhile
        os.close(device)
    return None
