"""libfuse 2 as ctypes sees it: its functions, its structs, the C types of the operations. Floor 6."""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any

from engine import host
from fdfs.entry import Attr

# macFUSE, then FUSE-T, which fusepy does not know
LIBRARIES = tuple(f"/usr/local/lib/{name}.dylib" for name in ("libfuse.2", "libfuse", "libosxfuse.2", "libfuse-t"))


def _fusepy() -> Any:
    """It looks for its library when it is imported."""
    if host.MACOS and (found := [path for path in LIBRARIES if os.path.exists(path)]):
        os.environ.setdefault("FUSE_LIBRARY_PATH", found[0])
    return importlib.import_module("fuse")


fuse: Any = _fusepy()
lib = fuse._libfuse


def _function(name: str, version: str, result: Any, *args: Any) -> Any:
    """A libfuse function of the 2.6 API. By symbol version where there are any: plain lookup finds a 2.2 relic."""
    kind = ctypes.CFUNCTYPE(result, *args)
    try:
        dlvsym = ctypes.CDLL(None).dlvsym
    except AttributeError:
        return kind((name, lib))
    dlvsym.restype = ctypes.c_void_p
    dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    address = dlvsym(lib._handle, name.encode(), version.encode())
    return kind(address) if address else kind((name, lib))


fuse_mount = _function("fuse_mount", "FUSE_2.6", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
fuse_new = _function(
    "fuse_new",
    "FUSE_2.6",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
fuse_kern_chan_new: Any = None  # for mounts made outside of a user namespace
if host.LINUX:
    fuse_kern_chan_new = _function("fuse_kern_chan_new", "FUSE_2.4", ctypes.c_void_p, ctypes.c_int)
fuse_get_session = _function("fuse_get_session", "FUSE_2.6", ctypes.c_void_p, ctypes.c_void_p)
fuse_session_loop = _function("fuse_session_loop", "FUSE_2.4", ctypes.c_int, ctypes.c_void_p)
fuse_session_exit = _function("fuse_session_exit", "FUSE_2.4", None, ctypes.c_void_p)
fuse_unmount = _function("fuse_unmount", "FUSE_2.6", None, ctypes.c_char_p, ctypes.c_void_p)

POINTER = ctypes.c_void_p
INT = ctypes.c_int
PATH = ctypes.c_char_p
SIZE = ctypes.c_size_t
OFFSET = ctypes.c_longlong
Filler = ctypes.CFUNCTYPE(INT, POINTER, PATH, POINTER, OFFSET)

# the direct callbacks: name -> C arguments after the result
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "getattr": (PATH, POINTER),
    "fgetattr": (PATH, POINTER, POINTER),
    "readdir": (PATH, POINTER, Filler, OFFSET, POINTER),
    "open": (PATH, POINTER),
    "create": (PATH, ctypes.c_uint, POINTER),
    "read": (PATH, POINTER, SIZE, OFFSET, POINTER),
    "write": (PATH, POINTER, SIZE, OFFSET, POINTER),
    "flush": (PATH, POINTER),
    "release": (PATH, POINTER),
    "fsync": (PATH, INT, POINTER),
    "ftruncate": (PATH, OFFSET, POINTER),
    "utimens": (PATH, POINTER),
    "fallocate": (PATH, INT, OFFSET, OFFSET, POINTER),
    "init": (POINTER,),
}
RESULTS = {"init": POINTER}  # of those that return something else than an errno
DONT_MASK = 1 << 6  # FUSE_CAP_DONT_MASK: modes come as they were given, and the umask beside them
WANT = 6 * ctypes.sizeof(ctypes.c_uint)  # offset of `want` in struct fuse_conn_info: <fuse_common.h>


class Table(ctypes.Structure):
    """struct fuse_operations of libfuse 2.9.1: fusepy's, which ends with 2.8's ioctl, and what came after."""

    _fields_ = (
        *fuse.fuse_operations._fields_,
        ("poll", POINTER),
        ("write_buf", POINTER),
        ("read_buf", POINTER),
        ("flock", POINTER),
        ("fallocate", ctypes.CFUNCTYPE(INT, *PROTOTYPES["fallocate"])),
    )


class CallerContext(ctypes.Structure):
    """struct fuse_context: <fuse.h>"""

    _fields_ = (*fuse.fuse_context._fields_, ("umask", fuse.c_mode_t))


def fill_stat(address: int, attr: Attr) -> None:
    """Write `attr` as the platform's struct stat."""
    ctypes.memset(address, 0, ctypes.sizeof(fuse.c_stat))
    st = fuse.c_stat.from_address(address)
    st.st_mode, st.st_size, st.st_ino, st.st_nlink = attr.mode, attr.size, attr.ino, attr.nlink
    st.st_uid, st.st_gid, st.st_rdev = attr.uid, attr.gid, attr.rdev
    st.st_blocks, st.st_blksize = attr.blocks, attr.blksize
    for spec, value in (
        (st.st_mtimespec, attr.mtime_ns),
        (st.st_ctimespec, attr.ctime_ns),
        (st.st_atimespec, attr.atime_ns),
    ):
        spec.tv_sec, spec.tv_nsec = divmod(value, 1_000_000_000)
