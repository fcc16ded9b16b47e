"""Immutable trees through fusepy on libfuse 2: the data plane's transport where /dev/fuse cannot be mounted directly.

Floor 6. Only here: the callbacks of that mount. Everything served is named by digest and never changes: attributes and
names are cached for hours, `open` is answered ENOSYS (the kernel then sends neither OPEN nor RELEASE and keeps pages),
and what is not implemented is never asked again. One thread, in libfuse's C loop; callbacks take raw bytes paths, copy
prebuilt `struct stat`s and pread straight into libfuse's buffer.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuse

from engine.store.tree import Tree
from fdfs import mount as binding
from fdfs.entry import Attr
from fdfs.rootfs import attr_of, xattrs

if TYPE_CHECKING:
    from fdfs.data import Forest

log = logging.getLogger(__name__)

HOURS = 12 * 3600
MAX_STATS = 1 << 16  # prebuilt stats kept between a readdir and the lookups that follow it

# struct stat as bytes, where its layout is known; elsewhere field by field
_LAYOUTS = {
    # dev ino nlink mode uid gid pad rdev size blksize blocks atime mtime ctime
    "x86_64": struct.Struct("<QQQIIIiQqqqqqqqqq24x"),
}


def packer() -> Callable[[Attr], bytes]:
    """A function that makes the platform's struct stat."""
    layout = _LAYOUTS.get(platform.machine()) if sys.platform.startswith("linux") else None
    if layout is None or layout.size < ctypes.sizeof(fuse.c_stat):

        def slow(attr: Attr) -> bytes:
            st = fuse.c_stat()
            binding.fill_stat(ctypes.addressof(st), attr)
            return bytes(st)

        return slow

    pack = layout.pack
    size = ctypes.sizeof(fuse.c_stat)

    def fast(a: Attr) -> bytes:
        seconds, nanos = divmod(a.mtime_ns, 1_000_000_000)
        times = (seconds, nanos, seconds, nanos, seconds, nanos)
        return pack(0, a.ino, a.nlink, a.mode, a.uid, a.gid, 0, a.rdev, a.size, a.blksize, a.blocks, *times)[:size]

    return fast


class Server:
    """The callbacks. Paths are b"/<hex>/…" ; the root lists nothing, since what is wanted is known by name."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._pack = packer()
        self._stats: dict[bytes, bytes] = {}
        now = Attr(mode=stat.S_IFDIR | 0o555, nlink=2, ino=1)
        self._stats_root = self._pack(now)
        self._size = len(self._stats_root)
        self._last: tuple[bytes, tuple[int, int, int], Tree] | None = None
        libc = ctypes.CDLL(None, use_errno=True)
        self._pread = libc.pread
        self._pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong]
        self._pread.restype = ctypes.c_ssize_t

    def _split(self, path: bytes) -> tuple[Tree, int, int]:
        """(tree, nid, mix) of a path below the root."""
        tree, mix = self._forest.get(path[1:65])
        if len(path) > 65 and path[65:66] != b"/":
            raise KeyError(path)
        return tree, tree.lookup(path[66:]), mix

    def getattr(self, path: bytes, buffer: int) -> int:
        packed = self._stats.get(path)
        if packed is None:
            if path == b"/":
                packed = self._stats_root
            else:
                tree, nid, mix = self._split(path)
                packed = self._pack(attr_of(tree, nid, mix))
        ctypes.memmove(buffer, packed, self._size)
        return 0

    def readdir(self, path: bytes, buffer: int, fill: Any, offset: int, info: int) -> int:
        fill(buffer, b".", None, 0)
        fill(buffer, b"..", None, 0)
        if path == b"/":
            return 0
        tree, nid, mix = self._split(path)
        stats = self._stats
        if len(stats) > MAX_STATS:
            stats.clear()
        pack, prefix = self._pack, path + b"/"
        for name, child, _ in tree.readdir(nid):
            packed = stats[prefix + name] = pack(attr_of(tree, child, mix))
            if fill(buffer, name, packed, 0):
                break
        return 0

    def readlink(self, path: bytes, buffer: int, size: int) -> int:
        tree, nid, _ = self._split(path)
        target = tree.readlink(nid)[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))
        return 0

    def open(self, path: bytes, info: int) -> int:
        return -errno.ENOSYS  # the kernel stops asking

    def read(self, path: bytes, buffer: int, size: int, offset: int, info: int) -> int:
        last = self._last
        if last is None or last[0] != path:
            tree, nid, _ = self._split(path)
            last = self._last = (path, tree.extent(nid), tree)
        fd, base, length = last[1]
        size = min(size, length - offset)
        if size <= 0:
            return 0
        count = int(self._pread(fd, buffer, size, base + offset))
        return count if count >= 0 else -ctypes.get_errno()

    def _xattrs(self, path: bytes) -> dict[bytes, bytes]:
        if path == b"/":
            return {}
        tree, nid, _ = self._split(path)
        return xattrs(tree, nid, self._forest.origins.get(path[1:65], {}))

    def listxattr(self, path: bytes, buffer: int, size: int) -> int:
        return _answer(b"".join(name + b"\0" for name in self._xattrs(path)), buffer, size)

    def getxattr(self, path: bytes, name: bytes, buffer: int, size: int) -> int:
        value = self._xattrs(path).get(name)
        return -errno.ENODATA if value is None else _answer(value, buffer, size)

    def statfs(self, path: bytes, buffer: int) -> int:
        st = fuse.c_statvfs.from_address(buffer)
        st.f_bsize = st.f_frsize = 4096
        st.f_namemax = 255
        return 0


def _answer(value: bytes, buffer: int, size: int) -> int:
    """An xattr answer: its size when asked for that, ERANGE when it does not fit."""
    if size == 0:
        return len(value)
    if len(value) > size:
        return -errno.ERANGE
    ctypes.memmove(buffer, value, len(value))
    return len(value)


_pointer, _int, _path, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t
# the filler takes the stat as bytes here: no address to compute per entry
_Filler = ctypes.CFUNCTYPE(_int, _pointer, _path, _path, ctypes.c_longlong)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "getattr": (_path, _pointer),
    "readdir": (_path, _pointer, _Filler, ctypes.c_longlong, _pointer),
    "readlink": (_path, _pointer, _size),
    "open": (_path, _pointer),
    "read": (_path, _pointer, _size, ctypes.c_longlong, _pointer),
    "listxattr": (_path, _pointer, _size),
    "getxattr": (_path, _path, _pointer, _size),
    "statfs": (_path, _pointer),
}


def _guarded(name: str, call: Callable[..., int]) -> Callable[..., int]:
    """The one guard: KeyError is ENOENT, an errno is itself, anything else EIO and a traceback."""

    def callback(*values: Any) -> int:
        try:
            return call(*values)
        except KeyError:
            return -errno.ENOENT
        except BaseException as error:
            number = getattr(error, "errno", None)
            log.error("%s failed", name, exc_info=error)
            return -number if isinstance(number, int) and number > 0 else -errno.EIO

    return callback


def mounted(forest: Forest, mountpoint: Path) -> Callable[[], None]:
    """Mount; the returned function serves until it is unmounted. OSError when libfuse refuses."""
    server = Server(forest)
    table = fuse.fuse_operations()
    keep: list[Any] = []
    kinds = {entry[0]: entry[1] for entry in fuse.fuse_operations._fields_}
    for name, args in _PROTOTYPES.items():
        callback = ctypes.CFUNCTYPE(_int, *args)(_guarded(name, getattr(server, name)))
        keep.append(callback)
        setattr(table, name, ctypes.cast(callback, kinds[name]))
    options, argv = binding.arguments(
        {
            "fsname": "dutchman-data",
            "subtype": binding.SUBTYPE,
            "ro": True,
            "default_permissions": True,
            "allow_other": True,  # the control mount above it decides who gets in; here the files' own modes do
            "use_ino": True,
            "attr_timeout": str(HOURS),
            "entry_timeout": str(HOURS),
            "negative_timeout": "0",
        }
    )
    keep += [argv, options, table]
    channel = binding.fuse_mount(os.fsencode(mountpoint), ctypes.byref(options))
    if not channel:
        raise OSError(errno.EIO, "libfuse cannot mount", str(mountpoint))
    handle = binding.fuse_new(channel, ctypes.byref(options), ctypes.byref(table), ctypes.sizeof(table), None)
    if not handle:
        binding.fuse_unmount(os.fsencode(mountpoint), channel)
        raise OSError(errno.EINVAL, "libfuse refused the options", str(mountpoint))
    session = binding.fuse_get_session(handle)

    def serve() -> None:
        binding.fuse_session_loop(session)
        keep.clear()

    return serve
