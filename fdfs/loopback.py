"""Real directories shown through the mount: a container's root (its overlay) and a volume's data, writable; `diff`.

Floor 5. Only here: every POSIX operation on a host directory by paths that cannot leave it. A path is resolved with
openat2 below a descriptor of the root, never through a symlink (the kernel above us follows those inside the mount),
and the last component is then used relative to its parent's descriptor. New files belong to the caller, not to the
daemon; permission checks on what exists are the kernel's (`default_permissions`). Stateless but for open files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import host, userids
from engine.errors import Busy, ReadOnly
from fdfs import unlinked
from fdfs.entry import Attr
from fdfs.hostfile import HostFile, to_attr

O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
BENEATH = host.RESOLVE_BENEATH | host.RESOLVE_NO_SYMLINKS
OVERLAY = (
    ("trusted.overlay.",) if userids.rootless() is None else ("trusted.overlay.", "user.overlay.")
)  # its own marks
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # <linux/stat.h>; what libfuse hands through

Hidden = Callable[[bytes, bytes, os.stat_result, int], bool]  # path, name, its stat, an fd of its directory
Caller = Callable[[], tuple[int, int, int]]  # -> uid, gid, umask


class Loopback:
    """The host directory `root`. With `overlay_upper` whiteouts are not shown, nor what `hidden` says so of. With
    `mounted` it is what is mounted there: once that has gone, Busy, for what is made below would not be seen again."""

    def __init__(
        self,
        root: Path,
        *,
        writable: Callable[[], bool],
        caller: Caller | None = None,
        overlay_upper: bool = False,
        hidden: Hidden | None = None,
        mounted: bool = False,
    ) -> None:
        self._root = root
        self._writable = writable
        self._caller = caller
        self._upper = overlay_upper
        self._hidden = hidden
        self._mounted = mounted
        self._mix = int.from_bytes(hashlib.blake2b(os.fsencode(root), digest_size=3).digest(), "little") << 39

    # --- resolution -------------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self, path: bytes, flags: int, mode: int = 0) -> Iterator[int]:
        fd = self._open_fd(path, flags, mode)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_fd(self, path: bytes, flags: int, mode: int = 0) -> int:
        with unlinked.held(path) as kept:
            if kept is not None:
                return os.open(f"/proc/self/fd/{kept}", flags | os.O_CLOEXEC)
        if not path:
            return self._root_fd(flags, mode)
        root = self._root_fd(O_PATH | os.O_DIRECTORY)
        try:
            return host.open_in_root(root, path, flags | os.O_NOFOLLOW, mode, BENEATH)
        finally:
            os.close(root)

    def _root_fd(self, flags: int, mode: int = 0) -> int:
        root = os.open(self._root, flags | os.O_CLOEXEC, mode)
        if self.gone(root):
            os.close(root)
            raise Busy("its files are being handed over", hint="it is starting or being removed: read state")
        return root

    def gone(self, root: int = -1) -> bool:
        """Whether nothing is mounted there any more (`root`: it, opened)."""
        return self._mounted and os.stat(self._root if root < 0 else root).st_dev == os.stat(self._root.parent).st_dev

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """(descriptor of the parent directory, last component)."""
        directory, _, name = path.rpartition(b"/")
        if name in (b"", b".", b".."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fsdecode(path))
        with self._open(directory, O_PATH | os.O_DIRECTORY) as fd:
            yield fd, name

    def _shown(self, path: bytes, st: os.stat_result, name: bytes, parent: int) -> bool:
        """Whether a file of an overlay's upper directory is one: a 0/0 character device is a whiteout."""
        if not self._upper:
            return True
        if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
            return False
        return self._hidden is None or not self._hidden(path, name, st, parent)

    def _lstat(self, path: bytes) -> os.stat_result:
        if not path:
            return os.stat(self._root)
        with unlinked.held(path) as kept:
            if kept is not None:
                return os.fstat(kept)
        with self._parent(path) as (fd, name):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            shown = self._shown(path, st, name, fd)
        if not shown:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        return st

    # --- reading ----------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes) -> Attr:
        attr = to_attr(self._lstat(path), self._mix)
        if unlinked.name_in(path):
            return attr._replace(nlink=attr.nlink + 1)  # libfuse takes the name it made up off again
        return attr

    def readdir(self, path: bytes) -> list[tuple[bytes, int, int]]:
        out = []
        with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if self._upper:
                    st = entry.stat(follow_symlinks=False)
                    if not self._shown(path + b"/" + name if path else name, st, name, fd):
                        continue
                    mode = st.st_mode
                else:
                    kind = _kind(entry)
                    if kind is None:
                        continue
                    mode = kind
                out.append((name, self._mix + entry.inode(), mode))
        return out

    def readlink(self, path: bytes) -> bytes:
        with self._parent(path) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    def open(self, path: bytes, flags: int) -> HostFile:
        if not self._writable() and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise ReadOnly("this view is read-only")
        wanted = flags & (os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | getattr(os, "O_NOATIME", 0)) | os.O_NONBLOCK
        fd = self._open_file(path, wanted)
        try:
            if flags & os.O_TRUNC:
                self._drop_set_id(fd)
            return HostFile(fd, self._mix, append=bool(flags & os.O_APPEND))
        except BaseException:
            os.close(fd)
            raise

    def _open_file(self, path: bytes, flags: int) -> int:
        """A descriptor of a regular file."""
        if not host.LINUX:
            return self._open_fd(path, flags)
        with self._open(path, O_PATH) as place:
            return _reopened(place, flags)

    def _drop_set_id(self, fd: int) -> None:
        """Truncated by others than root, a file loses its set-id bits; the kernel above leaves that to us (O_TRUNC)."""
        if self._caller is None or self._caller()[0] == 0:
            return
        mode = os.fstat(fd).st_mode
        bits = mode & stat.S_ISUID | (mode & stat.S_ISGID if mode & stat.S_IXGRP else 0)
        if bits:
            os.fchmod(fd, stat.S_IMODE(mode) & ~bits)

    def sync(self, path: bytes) -> None:
        """fsync(2) of a directory."""
        with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def access(self, path: bytes, wanted: int) -> bool:
        """Whether the daemon's own user may: what access(2) tells where the kernel above checks nothing itself."""
        with self._by_proc(path) as target:
            return os.access(target, wanted)

    @contextmanager
    def _by_proc(self, path: bytes) -> Iterator[str]:
        """A path for calls that take no descriptor: it names what was resolved, even if that is swapped meanwhile."""
        with unlinked.held(path) as kept:
            if kept is not None:
                yield f"/proc/self/fd/{kept}"
                return
        with self._open(path, O_PATH) as fd:
            if not host.LINUX:
                yield os.fsdecode(os.path.join(os.fsencode(self._root), path))
                return
            yield f"/proc/self/fd/{fd}"

    @contextmanager
    def _for_xattrs(self, path: bytes, name: bytes = b"") -> Iterator[str]:
        """A path whose last component may be a symlink, which then is what the attributes are of."""
        if os.fsdecode(name).startswith(OVERLAY) or not hasattr(os, "listxattr"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if not path or unlinked.name_in(path):
            with self._by_proc(path) as target:
                yield f"{target}/." if not path else target
            return
        with self._parent(path) as (fd, last):
            yield f"/proc/self/fd/{fd}/{os.fsdecode(last)}"

    def listxattr(self, path: bytes) -> list[bytes]:
        if not hasattr(os, "listxattr"):
            return []
        hidden: tuple[str, ...] = OVERLAY
        if self._caller is not None and self._caller()[0] != 0:
            hidden = (
                "trusted.",
                *OVERLAY,
            )  # only root sees these (xattr(7)); the kernel leaves that to the file system
        with self._for_xattrs(path) as target:
            names = os.listxattr(target, follow_symlinks=unlinked.name_in(path) is not None)
        return [os.fsencode(name) for name in names if not name.startswith(hidden)]

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        with self._for_xattrs(path, name) as target:
            return os.getxattr(target, name, follow_symlinks=unlinked.name_in(path) is not None)

    def statfs(self) -> Mapping[str, int]:
        st = os.statvfs(self._root)
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
        return {key: getattr(st, key) for key in keys}

    # --- changing ---------------------------------------------------------------------------------------------------

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        """Every modifying operation by its FUSE name. EROFS on a read-only view."""
        if not self._writable():
            raise ReadOnly("this view is read-only")
        return _CHANGES[operation](self, path, *arguments)

    def _own(self, fd: int, name: bytes) -> None:
        """Give what was just made to the caller; in a set-group-id directory the group stays the directory's."""
        if self._caller is None or os.geteuid() != 0:
            return
        uid, gid, _ = self._caller()
        if userids.rootless() is not None:
            uid, gid = _inside(uid, gid)
        if (uid, gid) == (0, 0):
            return
        if os.fstat(fd).st_mode & stat.S_ISGID:
            gid = -1
        os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)

    @staticmethod
    def _inherits(parent: int) -> bool:
        """Whether a directory has a default ACL, which decides in place of the umask (acl(5))."""
        if not hasattr(os, "getxattr"):
            return False
        try:
            return bool(os.getxattr(f"/proc/self/fd/{parent}", "system.posix_acl_default"))
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            return False

    def _create(self, path: bytes, mode: int, flags: int, umask: int = 0) -> HostFile:
        append = bool(flags & os.O_APPEND)
        with self._parent(path) as (parent, name):
            inherits = self._inherits(parent)
            wanted = flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC) | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                made = stat.S_IMODE(mode) if inherits else 0o600
                fd = os.open(name, wanted | os.O_CREAT | os.O_EXCL, made, dir_fd=parent)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                # a container was faster: the file is not ours to give away
                there = self._open_file(path, wanted & ~os.O_NOFOLLOW | os.O_NONBLOCK)
                return HostFile(there, self._mix, append=append)
            try:
                self._own(parent, name)
                if not inherits:
                    os.fchmod(fd, stat.S_IMODE(mode) & ~umask)  # chown clears set-id bits
                return HostFile(fd, self._mix, append=append)
            except BaseException:
                os.close(fd)
                raise

    def _mknod(self, path: bytes, mode: int, device: int, umask: int = 0) -> None:
        with self._parent(path) as (parent, name):
            os.mknod(name, mode, device, dir_fd=parent)
            self._own(parent, name)
            if not self._inherits(parent):
                os.chmod(name, stat.S_IMODE(mode) & ~umask, dir_fd=parent)

    def _mkdir(self, path: bytes, mode: int, umask: int = 0) -> None:
        with self._parent(path) as (parent, name):
            inherits = self._inherits(parent)
            os.mkdir(name, stat.S_IMODE(mode) if inherits else 0o700, dir_fd=parent)
            self._own(parent, name)
            if not inherits:
                group = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode & stat.S_ISGID
                os.chmod(name, stat.S_IMODE(mode) & ~umask | group, dir_fd=parent)

    def _unlink(self, path: bytes) -> None:
        name_of_open = unlinked.name_in(path)
        if name_of_open is not None and unlinked.drop(name_of_open):
            return
        with self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def _rmdir(self, path: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def _symlink(self, path: bytes, target: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.symlink(target, name, dir_fd=parent)
            self._own(parent, name)

    def _rename(self, path: bytes, to: bytes) -> None:
        name_of_open = unlinked.name_in(to)
        if name_of_open is not None:
            with self._open(path, O_PATH) as fd:
                if unlinked.keep(name_of_open, fd):
                    try:
                        self._unlink(path)
                    except BaseException:
                        unlinked.drop(name_of_open)
                        raise
                    return
        with self._parent(path) as (here, name), self._parent(to) as (there, new):
            os.rename(name, new, src_dir_fd=here, dst_dir_fd=there)

    def _link(self, path: bytes, to: bytes) -> None:
        with self._parent(path) as (here, name), self._parent(to) as (there, new):
            os.link(name, new, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)

    def _chmod(self, path: bytes, mode: int) -> None:
        with self._by_proc(path) as target:
            os.chmod(target, stat.S_IMODE(mode))

    def _chown(self, path: bytes, uid: int, gid: int) -> None:
        uid, gid = userids.given(uid, gid)
        if not path:
            with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                os.chown(fd, uid, gid)
            return
        with unlinked.held(path) as kept:
            if kept is not None:
                os.chown(f"/proc/self/fd/{kept}", uid, gid)
                return
        with self._parent(path) as (parent, name):
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    def _truncate(self, path: bytes, size: int) -> None:
        fd = self._open_file(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _utimens(self, path: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """Seconds and nanoseconds each; UTIME_NOW and UTIME_OMIT as in utimensat(2)."""
        now = self._lstat(path)
        times = (_time(atime, now.st_atime_ns), _time(mtime, now.st_mtime_ns))
        if not path:
            with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                os.utime(fd, ns=times)
            return
        with unlinked.held(path) as kept:
            if kept is not None:
                os.utime(f"/proc/self/fd/{kept}", ns=times)
                return
        with self._parent(path) as (parent, name):
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        self._settable(name)
        with self._for_xattrs(path, name) as target:
            os.setxattr(target, name, value, flags, follow_symlinks=unlinked.name_in(path) is not None)

    def _removexattr(self, path: bytes, name: bytes) -> None:
        self._settable(name)
        with self._for_xattrs(path, name) as target:
            os.removexattr(target, name, follow_symlinks=unlinked.name_in(path) is not None)

    @staticmethod
    def _settable(name: bytes) -> None:
        if os.fsdecode(name).startswith(OVERLAY) or not hasattr(os, "setxattr"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))


_CHANGES: Mapping[str, Callable[..., Any]] = {
    "create": Loopback._create,
    "mknod": Loopback._mknod,
    "mkdir": Loopback._mkdir,
    "unlink": Loopback._unlink,
    "rmdir": Loopback._rmdir,
    "symlink": Loopback._symlink,
    "rename": Loopback._rename,
    "link": Loopback._link,
    "chmod": Loopback._chmod,
    "chown": Loopback._chown,
    "truncate": Loopback._truncate,
    "utimens": Loopback._utimens,
    "setxattr": Loopback._setxattr,
    "removexattr": Loopback._removexattr,
}


def _reopened(place: int, flags: int) -> int:
    """Open what the O_PATH descriptor `place` is of. ESTALE for what is no regular file: the kernel above opens devices
    and FIFOs itself, so a container has put one in a file's place since it looked; and the daemon, which no device
    cgroup holds back, would open a device of the host."""
    if not stat.S_ISREG(os.fstat(place).st_mode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return os.open(f"/proc/self/fd/{place}", flags | os.O_CLOEXEC)


def _inside(uid: int, gid: int) -> tuple[int, int]:
    """A caller outside the engine's namespace, in it. Whose group has no place there creates with the engine's."""
    try:
        return userids.given(uid, gid)
    except PermissionError:
        return userids.given(uid, -1)[0], 0


def _kind(entry: os.DirEntry[str]) -> int | None:
    """The file type bits of a directory entry, without a stat where the file system says; None when it is not there:
    gone meanwhile, or a whiteout of an overlay on a file system that does not say (fuse2fs)."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _time(value: tuple[int, int], before: int) -> int:
    seconds, nanos = value
    if nanos == UTIME_OMIT:
        return before
    if nanos == UTIME_NOW:
        return time.time_ns()
    return seconds * 1_000_000_000 + nanos
