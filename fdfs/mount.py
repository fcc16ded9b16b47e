"""The binding: fusepy on libfuse 2. Marshalling, mount options, threads, readiness, unmounting. Floor 6.

Only here: ctypes and libfuse for the control mount. The hot operations are CFUNCTYPE callbacks registered directly,
past fusepy's decoding and wrapping; the others go through fusepy. Names cross as latin-1, which keeps every byte, so
file names need not be UTF-8. One guard (`Binding.__call__`, and `_direct` for the direct callbacks) catches
BaseException.

Threading: libfuse's loop runs in Python threads of ours, so that each keeps its thread state (and its catalog
connection) between requests; when all are busy (a `wait`, a verb) another is started, up to MAX_THREADS. The process
that serves a mount never touches it: no path below the mount point may be opened, resolved or stat'ed in it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from engine import host, hostmounts
from engine.errors import Busy, RuntimeFailure, Unsupported
from engine.runtimes.fusermount import unmount_fuse
from fdfs.libfuse import (
    DONT_MASK,
    INT,
    PATH,
    PROTOTYPES,
    RESULTS,
    WANT,
    CallerContext,
    Table,
    fill_stat,
    fuse,
    fuse_get_session,
    fuse_kern_chan_new,
    fuse_mount,
    fuse_new,
    fuse_session_exit,
    fuse_session_loop,
    fuse_unmount,
    lib,
)
from fdfs.ops import Operations
from fdfs.outside import Outside

log = logging.getLogger(__name__)

THREADS, MAX_THREADS = 6, 256
LATIN = "latin-1"
SUBTYPE = "dutchman"
KERNEL_OPTIONS = ("fsname", "subtype", "default_permissions", "allow_other")  # of the mount; the others are libfuse's


class FuseArgs(ctypes.Structure):
    """struct fuse_args: <fuse_opt.h>"""

    _fields_ = (("argc", INT), ("argv", ctypes.POINTER(PATH)), ("allocated", INT))


class Adapter(fuse.FUSE):  # type: ignore[misc]
    """fusepy's marshalling for the operations without a direct callback; mounting and the loop are ours."""

    def __init__(self, operations: Any) -> None:
        self.operations = operations
        self.raw_fi = True
        self.encoding = LATIN
        self.use_ns = True

    def table(self, direct: dict[str, Any]) -> tuple[Any, list[Any]]:
        """(struct fuse_operations, what must stay referenced). `direct` are the direct callbacks by name."""
        table = Table()
        keep: list[Any] = []
        for entry in Table._fields_:
            name, kind = entry[:2]
            if name in direct:
                value = ctypes.cast(direct[name], cast(Any, kind))
            elif hasattr(kind, "argtypes") and hasattr(self.operations, name):
                value = kind(fuse.partial(self._wrapper, getattr(self, name)))
            elif name.startswith("flag_") and hasattr(self.operations, name):
                value = getattr(self.operations, name)
            else:
                continue
            keep.append(value)
            setattr(table, name, value)
        return table, keep


def option_text(options: dict[str, str | bool]) -> str:
    return ",".join(key if value is True else f"{key}={value}" for key, value in options.items() if value is not False)


def arguments(options: dict[str, str | bool]) -> tuple[FuseArgs, Any]:
    """struct fuse_args of mount options, and what must stay referenced."""
    words = [b"dutchman", b"-o", os.fsencode(option_text(options))]
    argv = (PATH * (len(words) + 1))(*words, None)
    return FuseArgs(len(words), argv, 0), argv


class Binding:
    """What libfuse calls. `__call__` is the guard of the operations that come through fusepy."""

    flag_nullpath_ok = 1
    flag_utime_omit_ok = 1

    def __init__(self, operations: Operations, busy: Callable[[int], None]) -> None:
        self._ops = operations
        self._busy = busy
        self.direct = {name: self._callback(name, args) for name, args in PROTOTYPES.items()}

    def __call__(self, operation: str, *args: Any) -> Any:
        self._busy(1)
        try:
            return self._ops.guard(operation, getattr(self, operation), *args)
        finally:
            self._busy(-1)

    def _callback(self, name: str, args: tuple[Any, ...]) -> Any:
        call = getattr(self, "_" + name)
        failure = self._ops.failure

        def guarded(*values: Any) -> int:
            self._busy(1)
            try:
                return call(*values) or 0
            except BaseException as error:
                return -failure(name, error)
            finally:
                self._busy(-1)

        return ctypes.CFUNCTYPE(RESULTS.get(name, INT), *args)(guarded)

    def _init(self, connection: int) -> None:
        if host.LINUX:  # of macFUSE the structure is another
            ctypes.c_uint.from_address(connection + WANT).value |= DONT_MASK

    # --- direct callbacks: bytes paths, raw addresses ---------------------------------------------------------------

    def _getattr(self, path: bytes, buffer: int) -> None:
        fill_stat(buffer, self._ops.getattr(path))

    def _fgetattr(self, path: bytes | None, buffer: int, info: int) -> None:
        number = fuse.fuse_file_info.from_address(info).fh if info else 0
        fill_stat(buffer, self._ops.getattr(path or b"", number))

    def _readdir(self, path: bytes | None, buffer: int, fill: Any, offset: int, info: int) -> None:
        if path is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        st = fuse.c_stat()
        address = ctypes.addressof(st)
        paged = self._ops.readdir_from(path, offset)
        if paged is not None:  # entries with offsets: the kernel asks again for what did not fit
            for name, number, mode, following in paged:
                st.st_ino, st.st_mode = number, mode
                if fill(buffer, name, address, following):
                    return
            return
        for name, number, mode in list(self._ops.readdir(path)):
            st.st_ino, st.st_mode = number, mode
            if fill(buffer, name, address, 0):
                break

    def _opened(self, info: int, number: int, handle: Any) -> None:
        fi = fuse.fuse_file_info.from_address(info)
        fi.fh, fi.direct_io, fi.keep_cache = number, handle.direct, handle.keep

    def _open(self, path: bytes, info: int) -> None:
        self._opened(info, *self._ops.open(path, fuse.fuse_file_info.from_address(info).flags))

    def _create(self, path: bytes, mode: int, info: int) -> None:
        self._opened(info, *self._ops.create(path, mode, fuse.fuse_file_info.from_address(info).flags, umask()))

    def _read(self, path: bytes | None, buffer: int, size: int, offset: int, info: int) -> int:
        data = self._ops.read(fuse.fuse_file_info.from_address(info).fh, size, offset)
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def _write(self, path: bytes | None, buffer: int, size: int, offset: int, info: int) -> int:
        number = fuse.fuse_file_info.from_address(info).fh
        return self._ops.write(number, ctypes.string_at(buffer, size), offset)

    def _flush(self, path: bytes | None, info: int) -> None:
        self._ops.flush(fuse.fuse_file_info.from_address(info).fh)

    def _release(self, path: bytes | None, info: int) -> None:
        self._ops.release(fuse.fuse_file_info.from_address(info).fh)

    def _fsync(self, path: bytes | None, datasync: int, info: int) -> None:
        self._ops.fsync(fuse.fuse_file_info.from_address(info).fh)

    def _ftruncate(self, path: bytes | None, size: int, info: int) -> None:
        self._ops.ftruncate(fuse.fuse_file_info.from_address(info).fh, size)

    def _fallocate(self, path: bytes | None, mode: int, offset: int, length: int, info: int) -> None:
        self._ops.fallocate(fuse.fuse_file_info.from_address(info).fh, mode, offset, length)

    def _utimens(self, path: bytes, times: int) -> None:
        values = struct.unpack("llll", ctypes.string_at(times, struct.calcsize("llll")))
        self._ops.change("utimens", path, values[:2], values[2:])

    # --- through fusepy: latin-1 texts ------------------------------------------------------------------------------

    def readlink(self, path: str) -> str:
        return self._ops.readlink(path.encode(LATIN)).decode(LATIN)

    def mknod(self, path: str, mode: int, device: int) -> None:
        self._ops.change("mknod", path.encode(LATIN), mode, device, umask())

    def mkdir(self, path: str, mode: int) -> None:
        self._ops.change("mkdir", path.encode(LATIN), mode, umask())

    def unlink(self, path: str) -> None:
        self._ops.change("unlink", path.encode(LATIN))

    def rmdir(self, path: str) -> None:
        self._ops.change("rmdir", path.encode(LATIN))

    def symlink(self, path: str, target: str) -> None:
        self._ops.change("symlink", path.encode(LATIN), target.encode(LATIN))

    def rename(self, old: str, new: str) -> None:
        self._ops.change("rename", old.encode(LATIN), new.encode(LATIN))

    def link(self, new: str, old: str) -> None:
        self._ops.change("link", old.encode(LATIN), new.encode(LATIN))

    def chmod(self, path: str, mode: int) -> None:
        self._ops.change("chmod", path.encode(LATIN), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._ops.change("chown", path.encode(LATIN), uid, gid)

    def truncate(self, path: str, size: int, info: Any = None) -> None:
        self._ops.change("truncate", path.encode(LATIN), size)

    def access(self, path: str, wanted: int) -> None:
        self._ops.access(path.encode(LATIN), wanted)

    def fsyncdir(self, path: str | None, datasync: int, number: int) -> None:
        if path is not None:  # None: removed meanwhile, nothing to keep
            self._ops.fsyncdir(path.encode(LATIN))

    def statfs(self, path: str) -> Any:
        return self._ops.statfs(path.encode(LATIN))

    def setxattr(self, path: str, name: str, value: bytes, flags: int, position: int = 0) -> None:
        self._ops.change("setxattr", path.encode(LATIN), name.encode(LATIN), value, flags)

    def removexattr(self, path: str, name: str) -> None:
        self._ops.change("removexattr", path.encode(LATIN), name.encode(LATIN))

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        return self._ops.getxattr(path.encode(LATIN), name.encode(LATIN))

    def listxattr(self, path: str) -> list[str]:
        return [name.decode(LATIN) for name in self._ops.listxattr(path.encode(LATIN))]


def context() -> tuple[int, int, int]:
    """(uid, gid, pid) of the caller of the operation this thread is carrying out."""
    uid, gid, pid = fuse.fuse_get_context()
    return int(uid), int(gid), int(pid)


def umask() -> int:
    """The caller's."""
    address = ctypes.addressof(lib.fuse_get_context().contents)
    return int(CallerContext.from_address(address).umask)


def clear_stale(mount: Path) -> bool:
    """Detach what a killed daemon left at `mount`; whether there was something. Busy when it is in use and alive."""
    found = False
    while hostmounts.is_mounted(mount):
        try:
            os.stat(mount)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENXIO):  # the last: macFUSE
                raise
        else:
            raise Busy(f"{mount} is already a mount point", hint="another daemon serves it, or choose another --mount")
        detach(mount)
        found = True
    return found


def detach(mount: Path) -> None:
    """Take a FUSE mount away at once, with everything bound below it."""
    try:
        hostmounts.unmount(mount)
    except Unsupported:
        unmount_fuse(mount)
    except PermissionError:
        fuse_unmount(os.fsencode(mount), None)  # not root: libfuse asks fusermount


class Mount:
    """A control mount of `operations` at `mount`. `start` returns when requests are being served."""

    def __init__(
        self, operations: Operations, mount: Path, *, allow_other: bool = False, outside: Outside | None = None
    ) -> None:
        self._mount = mount
        self._outside = outside
        self._options: dict[str, str | bool] = {
            "fsname": "dutchman",
            "subtype": SUBTYPE,
            # alone, the owner may do what the daemon may: no attributes to fetch for every directory on a path
            "default_permissions": allow_other,
            "allow_other": allow_other,
            "use_ino": True,
            # a name may be believed a little: attributes, links and opens are asked for every time
            "entry_timeout": "1",
            "attr_timeout": "0",
            "ac_attr_timeout": "0",
            "negative_timeout": "0",
            "atomic_o_trunc": True,
            "big_writes": True,
        }
        if host.MACOS:  # macFUSE knows some of these by other names, or does them anyway
            for name in ("subtype", "ac_attr_timeout", "atomic_o_trunc", "big_writes"):
                del self._options[name]
            self._options |= {"volname": "FlyingDutchman", "noappledouble": True}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._occupied = 0
        self._binding = Binding(operations, self._busy)
        self._adapter = Adapter(self._binding)
        self._channel: int | None = None
        self._session: int | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Mount. RuntimeFailure when libfuse refuses; Busy when something alive is mounted there."""
        self._table, self._keep = self._adapter.table(self._binding.direct)
        name = os.fsencode(self._mount)
        if self._outside is not None:
            self._channel = self._from_outside(self._outside)
        else:
            clear_stale(self._mount)
            self._mount.mkdir(parents=True, exist_ok=True)
            self._args, self._argv = arguments(self._options)
            self._channel = fuse_mount(name, ctypes.byref(self._args))
        if not self._channel:
            raise RuntimeFailure(
                f"cannot mount at {self._mount}",
                hint="is it an empty directory, and has macFUSE been allowed (System Settings, Privacy & Security)?"
                if host.MACOS
                else "is it an empty directory, and is /dev/fuse there?",
            )
        handle = fuse_new(
            self._channel, ctypes.byref(self._args), ctypes.byref(self._table), ctypes.sizeof(self._table), None
        )
        if not handle:
            if self._outside is not None:
                self._outside.unmount(self._mount)
            else:
                fuse_unmount(name, self._channel)
            raise RuntimeFailure(f"libfuse refused the options of {self._mount}")
        self._session = fuse_get_session(handle)
        for _ in range(THREADS):
            self._spawn()

    def _from_outside(self, outside: Outside) -> int | None:
        """A channel over a mount that is made outside this process's namespace. What the kernel is told goes there."""
        told = {key: value for key, value in self._options.items() if key in KERNEL_OPTIONS}
        self._args, self._argv = arguments({k: v for k, v in self._options.items() if k not in told})
        descriptor = outside.mount(self._mount, option_text(told))
        channel: int | None = fuse_kern_chan_new(descriptor)
        return channel

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._loop, name=f"fuse-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _loop(self) -> None:
        fuse_session_loop(self._session)
        self._ended.set()

    def _busy(self, change: int) -> None:
        with self._lock:
            self._occupied += change
            if change > 0 and self._occupied >= len(self._threads) < MAX_THREADS:
                self._spawn()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the mount has ended (someone unmounted it) within `timeout` seconds."""
        return self._ended.wait(timeout)

    def stop(self) -> None:
        """Unmount. Requests in flight end; open files of others get ENOTCONN. Idempotent."""
        if self._session is None:
            return
        fuse_session_exit(self._session)
        if self._outside is not None:
            self._outside.unmount(self._mount)
        elif hostmounts.is_mounted(self._mount):
            detach(self._mount)
        for thread in self._threads:
            thread.join(0.2)
        self._session = None
