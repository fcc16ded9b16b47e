"""The host: system calls and what differs between Linux and macOS. Floor 0, no state.

Only here (and in runtimes/): ctypes and subprocess. Everything raises OSError with its errno and path, or
`Unsupported` where this host cannot do it at all. All calls are thread-safe.
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

from engine import loops, userids
from engine.errors import Unsupported

LINUX = sys.platform.startswith("linux")
MACOS = sys.platform == "darwin"

_libc = ctypes.CDLL(None, use_errno=True)

# mount(2), fsopen(2) and friends: <sys/mount.h>, <linux/mount.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_PRIVATE, MS_SHARED = 1 << 18, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 4, -100
# the numbers of these calls are the same on every architecture since Linux 5.2
_SYS_OPENAT2, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 437, 429, 430, 431, 432

# openat2(2) resolve flags: <linux/openat2.h>
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16

ASIDE = ".aside-"  # what write_atomic's files are called before they are whole
FILE_BACKED_EROFS = (6, 12)  # first Linux that mounts EROFS from plain files


def _check(result: int, path: object = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else str(path))
    return result


def _syscall(number: int, *args: Any) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return int(_libc.syscall(ctypes.c_long(number), *wide))


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) where the release does not start with numbers."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def move_mount(tree: int, target: Path) -> None:
    """Attach the detached mount that the fd `tree` is at `target`."""
    path = ctypes.c_char_p(os.fsencode(target))
    _check(_syscall(_SYS_MOVE_MOUNT, tree, ctypes.c_char_p(b""), _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH), target)


def is_root() -> bool:
    return os.geteuid() == 0


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


def open_in_root(root_fd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2): open `path` as if `root_fd` were `/`; symlinks and `..` cannot leave it. Returns an fd (CLOEXEC)."""
    if not LINUX:
        return _open_beneath(root_fd, path, flags, mode)
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve | RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path) or b"."
    while True:
        result = _syscall(_SYS_OPENAT2, root_fd, ctypes.c_char_p(name), ctypes.c_char_p(how), len(how))
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: a rename raced with the resolution of `..`
            raise OSError(number, os.strerror(number), os.fsdecode(name))


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


# --- mounts -----------------------------------------------------------------------------------------------------


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2). OSError names the target."""
    if not LINUX:
        raise Unsupported("mounts of images need a Linux host")
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(data) or None
    )
    _check(result, target)


def _fs_mount(
    kind: bytes, options: Sequence[tuple[str, bytes]], target: Path, *, read_only: bool, inert: bool = False
) -> None:
    """fsopen, fsconfig…, fsmount, move_mount: no 4096-byte limit on options as mount(2) has."""
    context = _check(_syscall(_SYS_FSOPEN, ctypes.c_char_p(kind), _FSOPEN_CLOEXEC), target)
    try:
        for key, value in options:
            _check(
                _syscall(
                    _SYS_FSCONFIG,
                    context,
                    _FSCONFIG_SET_STRING,
                    ctypes.c_char_p(key.encode()),
                    ctypes.c_char_p(value),
                    0,
                ),
                target,
            )
        if read_only:
            _check(_syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, ctypes.c_char_p(b"ro"), None, 0), target)
        try:
            _check(_syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), target)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{_fs_messages(context)}", str(target)) from error
        attributes = _MOUNT_ATTR_RDONLY if read_only else 0
        if inert:
            attributes |= _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        made = _check(_syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes), target)
        try:
            move_mount(made, target)
        finally:
            os.close(made)
    finally:
        os.close(context)


def _fs_messages(context: int) -> str:
    """What the kernel logged on a filesystem context (it answers ENODATA when there is no more)."""
    out = []
    for _ in range(8):
        try:
            out.append(os.read(context, 1024).decode(errors="replace").strip())
        except OSError:
            break
    return f" ({'; '.join(out)})" if out else ""


def mount_erofs(meta: Path, devices: Sequence[Path], target: Path, *, inert: bool = False, label: str = "") -> None:
    """Mount the EROFS image `meta`, read-only, over its data `devices` in device-table order.

    `inert`: setuid bits and device nodes in it do nothing (for looking at it, not for running it). `label`: the SELinux
    context of all its files.

    Straight from the files from Linux 6.12 on (an option is at most 255 bytes: longer paths by /proc/self/fd), through
    read-only autoclear loop devices before, and on a file system EROFS cannot read files of, as tmpfs (ENOTBLK).
    """
    if not LINUX:
        raise Unsupported("EROFS mounts need a Linux host")
    fds: list[int] = []

    def mount(names: Sequence[bytes]) -> None:
        options = [("source", names[0]), *(("device", name) for name in names[1:])]
        options += [("context", label.encode())] if label else []
        _fs_mount(b"erofs", options, target, read_only=True, inert=inert)

    try:
        names: list[bytes] = []
        for path in (meta, *devices):
            fds.append(fd := os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            names.append(name if len(name := os.fsencode(path)) < 256 else f"/proc/self/fd/{fd}".encode())
        if kernel_version() >= FILE_BACKED_EROFS:
            try:
                return mount(names)
            except OSError as error:
                if error.errno != errno.ENOTBLK:
                    raise
        names = []
        for path in (meta, *devices):
            fd, loop = loops.attach(path)
            fds.append(fd)
            names.append(loop.encode())
        mount(names)
    finally:
        for fd in fds:
            os.close(fd)


def mount_overlay(lower: Sequence[Path], upper: Path | None, work: Path | None, target: Path, label: str = "") -> None:
    """Mount an overlay: `lower` topmost first, writable `upper`, its `work`; without these two it is read-only.

    `label`: the SELinux context of all its files; '' for each its own."""
    if not LINUX:
        raise Unsupported("overlay mounts need a Linux host")

    def escaped(path: Path) -> str:  # the kernel splits at unescaped `:` and `,`
        return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")

    lowers = ":".join(escaped(path) for path in lower)
    data = f"lowerdir={lowers}"
    if upper is not None and work is not None:
        data += f",upperdir={escaped(upper)},workdir={escaped(work)}"
    if label:
        data += f',context="{label}"'  # quoted: a level has commas (mount(8), SELinux)
    mount("overlay", target, "overlay", 0, data + ("" if userids.rootless() is None else ",userxattr"))


def bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Bind `source` over `target` (same kind: directory or file), private to this place."""
    mount(str(source), target, "none", MS_BIND)
    if read_only:
        try:
            mount("none", target, "none", MS_BIND | MS_REMOUNT | MS_RDONLY)
        except OSError:
            unmount(target)
            raise


def unmount(target: Path) -> None:
    """Detach the topmost mount at `target` at once; users of it keep it until they close. Not mounted: no error."""
    if not LINUX:
        raise Unsupported("unmount by system call needs a Linux host")
    result = _libc.umount2(os.fsencode(target), MNT_DETACH)
    if result < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _check(result, target)


def unmount_unused(target: Path) -> None:
    """Take down the topmost mount at `target` unless something in it is in use: OSError EBUSY."""
    if not LINUX:
        raise Unsupported("unmount by system call needs a Linux host")
    _check(_libc.umount2(os.fsencode(target), UMOUNT_NOFOLLOW), target)


def sync_file_system(fd: int) -> None:
    """syncfs(2): everything written to the file system `fd` lies on is durable."""
    if not LINUX:
        os.sync()
        return
    _check(_libc.syncfs(fd))


def mounts() -> list[tuple[str, str, str]]:
    """(mount point, filesystem type, source) of every mount of this process, in mount order."""
    if MACOS:
        import subprocess

        told = subprocess.run(["/sbin/mount"], capture_output=True, timeout=10).stdout.decode(errors="surrogateescape")
        return mounts_told(told)
    out = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.partition(" - ")
            kind, source = right.split(" ")[:2]
            out.append((unescape(left.split(" ")[4]), kind, unescape(source)))
    return out


def mounts_told(text: str) -> list[tuple[str, str, str]]:
    """The same from what mount(8) of macOS prints, which asks no file system: `SOURCE on POINT (KIND, …)`."""
    found = (re.fullmatch(r"(.*?) on (/.*) \(([^,)]+).*\)", line) for line in text.splitlines())
    return [(match[2], match[3], match[1]) for match in found if match]


def unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly at `path`. Reads the mount table: never touches a dead mount."""
    wanted = os.path.abspath(path)
    return any(point == wanted for point, _, _ in mounts())


# --- processes --------------------------------------------------------------------------------------------------


def die_with_parent(number: int = 15, parent: int = 0) -> None:
    """Ask for a signal when the parent goes (Linux prctl PR_SET_PDEATHSIG); elsewhere the caller watches a pipe.
    End now when `parent`, the pid of who forked this process, went before it could be asked for."""
    if LINUX:
        _check(_libc.prctl(1, ctypes.c_ulong(number), 0, 0, 0))
    if parent and os.getppid() != parent:
        os._exit(1)


def process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


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
