"""The data plane: a second process with a second mount, serving immutable trees only, at the kernel's cache speed.

Floor 6. `python -m fdfs.data STORE MOUNTPOINT`. Only here: the FUSE server of <store>/run/data/<hex of chain id>/… and
the orders on stdin. Everything it serves is named by digest and never changes, so attributes and names are cached for
hours, `open` is answered ENOSYS (the kernel then sends neither OPEN nor RELEASE and keeps pages), and what is not
implemented is never asked again. One thread, in libfuse's C loop; callbacks take raw bytes paths, copy prebuilt
`struct stat`s and pread straight into libfuse's buffer.

Orders are JSON lines on stdin, answered by one JSON line each on stdout:

    {"bind": TARGET, "chain": HEX, "origins": {diff_id: {...}}}    a tree, read-only, over TARGET
    {"bind": TARGET, "directory": SOURCE}                          a directory, as it is, over TARGET
    {"unbind": TARGET}      {"drop": HEX}                          forget a tree that was removed

Orders run in a thread of their own: mount(2) on TARGET makes the kernel ask the daemon, and on a tree it asks the loop
of this process, which goes on meanwhile. A mounted target is kept as an O_PATH descriptor, so it can be unmounted by
/proc/self/fd without asking anyone. At end of stdin (the daemon is gone) everything made here is unmounted.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import logging
import os
import platform
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import fuse

from engine import host
from engine.store.tree import Handle, Tree
from fdfs import mount as binding
from fdfs.entry import Attr
from fdfs.rootfs import attr_of, salt, xattrs

log = logging.getLogger(__name__)

HOURS = 12 * 3600
MAX_STATS = 1 << 16  # prebuilt stats kept between a readdir and the lookups that follow it
MAX_TREES = 128
MS_NOSUID_NODEV = host.MS_NOSUID | host.MS_NODEV

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


class Forest:
    """The trees of the store by hex chain id, opened when first asked for. Used by the loop's thread and by orders."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._trees: dict[bytes, tuple[Tree, int]] = {}
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        self.origins: dict[bytes, dict[str, dict[str, str]]] = {}

    def _data(self, diff_id: str) -> Handle:
        handle = self._handles.get(diff_id)
        if handle is None:
            handle = Handle(self._store / "layers" / "sha256" / diff_id.removeprefix("sha256:") / "data")
            self._handles[diff_id] = handle
        return handle

    def get(self, name: bytes) -> tuple[Tree, int]:
        """(tree, what is mixed into its inode numbers). KeyError when there is none of that name."""
        known = self._trees.get(name)
        if known is not None:
            return known
        if not re.fullmatch(rb"[0-9a-f]{64}", name):
            raise KeyError(name)
        try:
            tree = Tree(self._store / "trees" / "sha256" / name.decode(), self._data)
        except FileNotFoundError:
            raise KeyError(name) from None
        if len(self._trees) >= MAX_TREES:
            self._trees.pop(next(iter(self._trees)), None)
        entry = self._trees[name] = (tree, salt("sha256:" + name.decode()))
        return entry

    def drop(self, name: bytes) -> None:
        self._trees.pop(name, None)
        self.origins.pop(name, None)


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


class Binds:
    """What this process has bound over the control mount."""

    def __init__(self, forest: Forest, data: Path) -> None:
        self._forest, self._data = forest, data
        self._bound: dict[str, int] = {}  # target -> O_PATH descriptor of what is mounted there
        self._lock = threading.Lock()

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; the answer names what failed."""
        try:
            with self._lock:
                if "bind" in order:
                    return {"ok": True, "bound": self._bind(order)}
                if "unbind" in order:
                    self._unbind(order["unbind"])
                elif "drop" in order:
                    self._forest.drop(order["drop"].encode())
            return {"ok": True}
        except (OSError, KeyError, ValueError) as error:
            return {"ok": False, "reason": str(error)}

    def _bind(self, order: dict[str, Any]) -> bool:
        """Whether anything had to be done."""
        target, chain = order["bind"], order.get("chain")
        if chain:
            self._forest.origins[chain.encode()] = order.get("origins", {})
            if target in self._bound:
                return False
            source = self._data / chain
        else:
            source = Path(order["directory"])
            known = self._bound.get(target)
            if known is not None:
                here, there = os.fstat(known), os.stat(source)
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return False
                self._unbind(target)
        host.bind(source, Path(target))
        try:
            flags = host.MS_BIND | host.MS_REMOUNT | MS_NOSUID_NODEV | (host.MS_RDONLY if chain else 0)
            host.mount("none", Path(target), "none", flags)
            self._bound[target] = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            host.unmount(Path(target))
            raise
        return True

    def _unbind(self, target: str) -> None:
        fd = self._bound.pop(target, None)
        if fd is None:
            return
        try:
            host.unmount(Path(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            for target in reversed(list(self._bound)):
                try:
                    self._unbind(target)
                except OSError as error:
                    log.warning("unbinding %s: %s", target, error)


def serve(store: Path, mountpoint: Path) -> None:
    """Mount, answer `ready` on stdout, obey until stdin ends, unmount. Runs in the main thread."""
    host.die_with_parent()
    if host.is_mounted(mountpoint):
        host.unmount(mountpoint)  # left by a killed one
    mountpoint.mkdir(parents=True, exist_ok=True)
    forest = Forest(store)
    server = Server(forest)
    table = fuse.fuse_operations()
    keep = []
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
    keep.append(argv)
    channel = binding.fuse_mount(os.fsencode(mountpoint), ctypes.byref(options))
    if not channel:
        raise SystemExit(f"cannot mount at {mountpoint}")
    os.chmod(mountpoint.parent, 0o700)
    handle = binding.fuse_new(channel, ctypes.byref(options), ctypes.byref(table), ctypes.sizeof(table), None)
    if not handle:
        binding.fuse_unmount(os.fsencode(mountpoint), channel)
        raise SystemExit("libfuse refused the options")
    binds = Binds(forest, mountpoint)

    def orders() -> None:
        try:
            print('{"ok": true, "ready": true}', flush=True)
            for line in sys.stdin:
                print(json.dumps(binds.obey(json.loads(line))), flush=True)
        except (OSError, ValueError) as error:
            log.warning("orders end: %s", error)
        finally:
            binds.close()
            host.unmount(mountpoint)  # ends the loop below

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    # SIGTERM (the daemon was killed): the loop sits in C, so a thread waits for the signal instead of a handler
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def terminated() -> None:
        signal.sigwait({signal.SIGTERM})
        binds.close()
        host.unmount(mountpoint)

    threading.Thread(target=orders, name="orders", daemon=True).start()
    threading.Thread(target=terminated, name="signals", daemon=True).start()
    gc.collect()
    gc.freeze()
    binding.fuse_session_loop(binding.fuse_get_session(handle))
    binds.close()
    os._exit(0)  # threads may sit in read(2) of stdin; there is nothing left to save


def spawn(store: Path, mountpoint: Path, log_to: Any = None) -> subprocess.Popen[bytes]:
    """Start the process. Call from a thread that lives as long as the daemon: the child dies with that thread."""
    command = [sys.executable, "-m", "fdfs.data", str(store), str(mountpoint)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log_to,
        cwd="/",
        env=os.environ | {"PYTHONPATH": _root()},
    )


def _root() -> str:
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s data %(message)s")
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
