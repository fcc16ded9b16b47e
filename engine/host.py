"""The host: what differs between Linux and macOS, places, files, and how its C library is called. Floor 0, no state.

Only here (and in runtimes/): ctypes. Mounts are in hostmounts.py, more of files in hostfiles.py. Everything raises
OSError with its errno and path. All calls are thread-safe.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import userids

LINUX = sys.platform.startswith("linux")
MACOS = sys.platform == "darwin"

_libc = ctypes.CDLL(None, use_errno=True)

# openat2(2): <linux/openat2.h>
_SYS_OPENAT2 = 437
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16

ASIDE = ".aside-"  # what write_atomic's files are called before they are whole


def call(function: str, *args: int | bytes | None, path: object = None) -> int:
    """A function of the C library. OSError with its errno, and `path`, when it answers less than 0."""
    return _answer(getattr(_libc, function)(*_wide(args)), path)


def system_call(number: int, *args: int | bytes | None, path: object = None) -> int:
    """The same for what the C library may have no function of. Numbers above 423 are those of every architecture."""
    return _answer(int(_libc.syscall(*_wide((number, *args)))), path)


def _wide(args: Sequence[int | bytes | None]) -> list[Any]:
    return [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]


def _answer(result: int, path: object) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else str(path))
    return result


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) where the release does not start with numbers."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def is_root() -> bool:
    return os.geteuid() == 0


def die_with_parent(number: int = 15, parent: int = 0) -> None:
    """Ask for a signal when the parent goes (Linux prctl PR_SET_PDEATHSIG); elsewhere the caller watches a pipe.
    End now when `parent`, the pid of who forked this process, went before it could be asked for."""
    if LINUX:
        call("prctl", 1, number, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(1)


# --- places -----------------------------------------------------------------------------------------------------


def default_mount() -> Path:
    """$DUTCHMAN_MOUNT, else ~/FlyingDutchman."""
    return Path(os.environ.get("DUTCHMAN_MOUNT") or Path.home() / "FlyingDutchman")


def default_store() -> Path:
    """$DUTCHMAN_STORE, else where this platform keeps application data."""
    if named := os.environ.get("DUTCHMAN_STORE"):
        return Path(named)
    if MACOS:
        return Path.home() / "Library" / "Application Support" / "FlyingDutchman"
    if is_root():
        return Path("/var/lib/dutchman")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dutchman"


def runtime_dir() -> Path:
    """Where sockets and mount points of this boot live. An engine without root has its user's, inside and outside."""
    if is_root() and LINUX and userids.rootless() is None:
        return Path("/run/dutchman")
    if MACOS and "XDG_RUNTIME_DIR" not in os.environ:  # temporary files are swept there when nobody touched them lately
        return Path.home() / ".dutchman"
    import tempfile  # brings random, shutil and more, and processes that own a container want to start fast

    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"dutchman-{userids.owner()[0]}"


# --- files ------------------------------------------------------------------------------------------------------


def fsync_dir(path: Path) -> None:
    """Make a rename or unlink in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """What was written to `fd` is durable: fsync(2) of macOS leaves it in the disk's cache (fcntl(2), F_FULLFSYNC)."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError:
            pass  # a file system that knows no such thing
    os.fsync(fd)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` with `data`: aside, fsync, rename, fsync the directory. Nothing changes when it fails."""
    import tempfile

    fd, aside = tempfile.mkstemp(dir=path.parent, prefix=ASIDE)
    try:
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            sync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except BaseException:
        if os.path.exists(aside):
            os.unlink(aside)
        raise
    fsync_dir(path.parent)


def sync_file_system(fd: int) -> None:
    """syncfs(2): everything written to the file system `fd` lies on is durable."""
    if not LINUX:
        os.sync()
        return
    call("syncfs", fd)


def open_in_root(root_fd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2): open `path` as if `root_fd` were `/`; symlinks and `..` cannot leave it. Returns an fd (CLOEXEC)."""
    if not LINUX:
        return _open_beneath(root_fd, path, flags, mode)
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve | RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path) or b"."
    while True:
        try:
            return system_call(_SYS_OPENAT2, root_fd, name, how, len(how), path=os.fsdecode(name))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: a rename raced with the resolution of `..`
                raise


def _open_beneath(root_fd: int, path: str | bytes, flags: int, mode: int) -> int:
    """Where there is no openat2: walk component by component, refusing symlinks and `..` (ELOOP)."""
    parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise OSError(errno.ELOOP, "'..' in a path below a root", os.fsdecode(path))
    here = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        last = parts[-1] if parts else b"."
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=here)
    finally:
        os.close(here)


@contextmanager
def directory_fd(path: Path) -> Any:
    """An O_PATH-like fd of a directory, closed on leaving."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Delete a directory tree with directory fds, never following a symlink or crossing into a mount.

    Does nothing when `path` is gone. EXDEV when a file system is mounted below it: nothing of that is touched.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(path)
        return
    try:
        _empty(top, os.fstat(top).st_dev, str(path))
    finally:
        os.close(top)
    os.rmdir(path)


MAX_DEPTH = 64  # directories held open at a time while a tree is deleted


def _empty(top: int, device: int, path: str) -> None:
    """Depth first. What lies deeper than MAX_DEPTH is moved up first, so that no tree needs more open files."""
    moved = seen = 0
    stack = [(top, iter(os.listdir(top)), "")]
    opened: list[int] = []
    try:
        while stack:
            here, names, _ = stack[-1]
            for name in names:
                info = os.stat(name, dir_fd=here, follow_symlinks=False)
                if info.st_dev != device:
                    raise OSError(errno.EXDEV, "another file system is mounted below", path)
                if not stat.S_ISDIR(info.st_mode):
                    os.unlink(name, dir_fd=here)
                    continue
                if len(stack) >= MAX_DEPTH:
                    moved += 1
                    os.rename(
                        name, f".deep-{os.getpid()}-{moved}-{os.urandom(6).hex()}", src_dir_fd=here, dst_dir_fd=top
                    )
                    continue
                below = open_in_root(  # EXDEV also where a directory of the same file system is bound
                    here, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=RESOLVE_NO_XDEV | RESOLVE_BENEATH
                )
                opened.append(below)
                stack.append((below, iter(os.listdir(below)), name))
                break
            else:
                if len(stack) == 1 and moved != seen:
                    seen = moved
                    stack[0] = (top, iter(os.listdir(top)), "")  # what was moved up
                    continue
                _, _, name = stack.pop()
                if stack:
                    os.close(opened.pop())
                    os.rmdir(name, dir_fd=stack[-1][0])
    finally:
        for fd in opened:
            os.close(fd)
