"""Mounts of this host and the namespaces they are seen in: made, copied, moved, taken down; their table. Floor 0.

Only here: what the kernel is asked for a mount or a namespace. Everything raises OSError with its errno and path, or
`Unsupported` where this host cannot do it at all. No state; all calls are thread-safe.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from engine import host, loops, userids
from engine.errors import Unsupported

# <sys/mount.h>, <linux/mount.h>, <linux/sched.h>, <linux/fcntl.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 18, 1 << 19, 1 << 20
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _OPEN_TREE_CLONE = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_IDMAP = 1, 2, 4, 1 << 20
_MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = 4, -100, 0x1000, 0x8000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_LOCKED = os.ST_NOSUID | getattr(os, "ST_NODEV", 0) | getattr(os, "ST_NOEXEC", 0)  # same as MS_*

FILE_BACKED_EROFS = (6, 12)  # first Linux that mounts EROFS from plain files


# --- mounts -----------------------------------------------------------------------------------------------------


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2). OSError names the target."""
    if not host.LINUX:
        raise Unsupported("mounts of images need a Linux host")
    host.call(
        "mount", source.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(data) or None, path=target
    )


def _fs_mount(
    kind: bytes, options: Sequence[tuple[str, bytes]], target: Path, *, read_only: bool, inert: bool = False
) -> None:
    """fsopen, fsconfig…, fsmount, move_mount: no 4096-byte limit on options as mount(2) has."""
    context = host.system_call(_SYS_FSOPEN, kind, _FSOPEN_CLOEXEC, path=target)

    def configure(command: int, key: bytes | None, value: bytes | None) -> None:
        host.system_call(_SYS_FSCONFIG, context, command, key, value, 0, path=target)

    try:
        for key, value in options:
            configure(_FSCONFIG_SET_STRING, key.encode(), value)
        if read_only:
            configure(_FSCONFIG_SET_FLAG, b"ro", None)
        try:
            configure(_FSCONFIG_CMD_CREATE, None, None)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{_fs_messages(context)}", str(target)) from error
        attributes = _MOUNT_ATTR_RDONLY if read_only else 0
        if inert:
            attributes |= _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        made = host.system_call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes, path=target)
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
    if not host.LINUX:
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
        if host.kernel_version() >= FILE_BACKED_EROFS:
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
    if not host.LINUX:
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


def bind(source: Path, target: Path) -> None:
    """Bind `source` over `target` (same kind: directory or file), private to this place."""
    mount(str(source), target, "none", MS_BIND)


def make_read_only(target: Path) -> None:
    """What is bound at `target`, in this place alone."""
    kept = os.statvfs(target).f_flag & _LOCKED  # without root the kernel refuses to drop them
    mount("none", target, "none", MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def open_tree(source: int | str) -> int:
    """A copy of the mounts at a path, or of what an fd is and is mounted below it: an fd, attached nowhere."""
    if not host.LINUX:
        raise OSError(errno.ENOSYS, "that needs a Linux host")
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    if isinstance(source, int):
        return host.system_call(_SYS_OPEN_TREE, source, b"", flags | _AT_EMPTY_PATH)
    return host.system_call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags, path=source)


def set_attributes(tree: int, *, slave: bool, owners: int | None) -> None:
    """Of all mounts in the detached copy `tree`: slaves of the originals; owners mapped as the user namespace of the fd
    `owners` has them, for which see mount_setattr(2). EINVAL: a file system cannot."""
    attributes = 0 if owners is None else _MOUNT_ATTR_IDMAP
    change = struct.pack("<QQQQ", attributes, 0, MS_SLAVE if slave else 0, owners or 0)  # struct mount_attr
    host.system_call(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, change, len(change))


def move_mount(tree: int, target: Path) -> None:
    """Attach the detached mount that the fd `tree` is at `target`."""
    path = os.fsencode(target)
    host.system_call(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH, path=target)


def unmount(target: Path) -> None:
    """Detach the topmost mount at `target` at once; users of it keep it until they close. Not mounted: no error."""
    if not host.LINUX:
        raise Unsupported("unmount by system call needs a Linux host")
    try:
        host.call("umount2", os.fsencode(target), MNT_DETACH, path=target)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def unmount_unused(target: Path) -> None:
    """Take down the topmost mount at `target` unless something in it is in use: OSError EBUSY."""
    if not host.LINUX:
        raise Unsupported("unmount by system call needs a Linux host")
    host.call("umount2", os.fsencode(target), UMOUNT_NOFOLLOW, path=target)


# --- the table --------------------------------------------------------------------------------------------------


def mounts() -> list[tuple[str, str, str]]:
    """(mount point, filesystem type, source) of every mount of this process, in mount order."""
    if host.MACOS:
        import subprocess

        told = subprocess.run(["/sbin/mount"], capture_output=True, timeout=10).stdout.decode(errors="surrogateescape")
        return mounts_told(told)
    out = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.partition(" - ")
            kind, source = right.split(" ")[:2]
            out.append((_unescape(left.split(" ")[4]), kind, _unescape(source)))
    return out


def mounts_told(text: str) -> list[tuple[str, str, str]]:
    """The same from what mount(8) of macOS prints, which asks no file system: `SOURCE on POINT (KIND, …)`."""
    found = (re.fullmatch(r"(.*?) on (/.*) \(([^,)]+).*\)", line) for line in text.splitlines())
    return [(match[2], match[3], match[1]) for match in found if match]


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly at `path`. Reads the mount table: never touches a dead mount."""
    wanted = os.path.abspath(path)
    return any(point == wanted for point, _, _ in mounts())


def mounted_at(path: Path) -> bool:
    """Whether `path` is a mount point: its device differs from its parent's. Only for our own kernel file systems."""
    try:
        return os.lstat(path).st_dev != os.lstat(path.parent).st_dev
    except FileNotFoundError:
        return False


def mount_of(path: Path) -> tuple[str, list[str]]:
    """(mount point, optional fields such as `shared:1`) of the mount that `path`, links resolved, lies on."""
    where = os.path.realpath(path)
    found: tuple[str, list[str]] = ("/", [])
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            words = line.partition(" - ")[0].split()
            point = _unescape(words[4])
            below = where == point or where.startswith(point.rstrip("/") + "/")
            if below and len(point) >= len(found[0]):  # a later one at the same place covers the earlier
                found = (point, words[6:])
    return found


# --- namespaces -------------------------------------------------------------------------------------------------


def unshare(kinds: int) -> None:
    """New namespaces (CLONE_NEW*) for this thread; a user namespace for a process of one thread."""
    try:
        host.call("unshare", kinds)
    except OSError as error:
        raise OSError(error.errno, f"unshare: {error.strerror}") from error


def enter(namespace: int, kind: int) -> None:
    """setns(2): this thread is in the namespace the fd is."""
    try:
        host.call("setns", namespace, kind)
    except OSError as error:
        raise OSError(error.errno, f"setns: {error.strerror}") from error


def keep_to_itself() -> None:
    """What this mount namespace mounts is nowhere else; what others mount later is here, too."""
    mount("none", Path("/"), "none", MS_REC | MS_SLAVE)
