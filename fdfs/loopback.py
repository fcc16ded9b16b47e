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
from engine.errors import ReadOnly
from fdfs.entry import HIDDEN, Attr

O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
BENEATH = host.RESOLVE_BENEATH | host.RESOLVE_NO_SYMLINKS
OVERLAY = (
    ("trusted.overlay.",) if userids.rootless() is None else ("trusted.overlay.", "user.overlay.")
)  # its own marks
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # <linux/stat.h>; what libfuse hands through

Caller = Callable[[], tuple[int, int, int]]  # -> uid, gid, umask


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

    def close(self) -> None:
        os.close(self._fd)


class Loopback:
    """The host directory `root`. With `overlay_upper` whiteouts are not shown."""

    def __init__(
        self, root: Path, *, writable: bool, caller: Caller | None = None, overlay_upper: bool = False
    ) -> None:
        self._root = root
        self._writable = writable
        self._caller = caller
        self._upper = overlay_upper
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
        root = os.open(self._root, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if not path:
            if not flags & O_PATH:
                os.close(root)
                return os.open(self._root, flags | os.O_CLOEXEC, mode)
            return root
        try:
            return host.open_in_root(root, path, flags | os.O_NOFOLLOW, mode, BENEATH)
        finally:
            os.close(root)

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """(descriptor of the parent directory, last component)."""
        directory, _, name = path.rpartition(b"/")
        if name in (b"", b".", b".."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fsdecode(path))
        with self._open(directory, O_PATH | os.O_DIRECTORY) as fd:
            yield fd, name

    def _shown(self, st: os.stat_result) -> bool:
        """Whether a file of an overlay's upper directory is one: a 0/0 character device is a whiteout."""
        return not (self._upper and stat.S_ISCHR(st.st_mode) and st.st_rdev == 0)

    def _lstat(self, path: bytes) -> os.stat_result:
        if not path:
            return os.stat(self._root)
        with self._parent(path) as (fd, name):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if not self._shown(st):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        return st

    # --- reading ----------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes) -> Attr:
        return to_attr(self._lstat(path), self._mix)

    def readdir(self, path: bytes) -> list[tuple[bytes, int, int]]:
        out = []
        with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if name.startswith(HIDDEN):
                    continue
                if self._upper:
                    st = entry.stat(follow_symlinks=False)
                    if not self._shown(st):
                        continue
                    mode = st.st_mode
                else:
                    mode = _kind(entry)
                out.append((name, self._mix + entry.inode(), mode))
        return out

    def readlink(self, path: bytes) -> bytes:
        with self._parent(path) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    def open(self, path: bytes, flags: int) -> HostFile:
        if not self._writable and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise ReadOnly("this view is read-only")
        self._lstat(path)
        wanted = flags & (os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | getattr(os, "O_NOATIME", 0)) | os.O_NONBLOCK
        return HostFile(self._open_fd(path, wanted), self._mix, append=bool(flags & os.O_APPEND))

    @contextmanager
    def _by_proc(self, path: bytes) -> Iterator[str]:
        """A path for calls that take no descriptor: it names what was resolved, even if that is swapped meanwhile."""
        with self._open(path, O_PATH) as fd:
            if not host.LINUX:
                yield os.fsdecode(os.path.join(os.fsencode(self._root), path))
                return
            yield f"/proc/self/fd/{fd}"

    def listxattr(self, path: bytes) -> list[bytes]:
        if not hasattr(os, "listxattr"):
            return []
        if path and stat.S_ISLNK(self._lstat(path).st_mode):
            return []
        with self._by_proc(path) as name:
            return [os.fsencode(key) for key in os.listxattr(name) if not key.startswith(OVERLAY)]

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        if os.fsdecode(name).startswith(OVERLAY) or not hasattr(os, "getxattr"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if path and stat.S_ISLNK(self._lstat(path).st_mode):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        with self._by_proc(path) as target:
            return os.getxattr(target, name)

    def statfs(self) -> Mapping[str, int]:
        st = os.statvfs(self._root)
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
        return {key: getattr(st, key) for key in keys}

    # --- changing ---------------------------------------------------------------------------------------------------

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        """Every modifying operation by its FUSE name. EROFS on a read-only view."""
        if not self._writable:
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

    def _create(self, path: bytes, mode: int, flags: int) -> HostFile:
        with self._parent(path) as (parent, name):
            wanted = flags & (os.O_ACCMODE | os.O_APPEND | os.O_EXCL | os.O_TRUNC) | os.O_CREAT | os.O_NOFOLLOW
            fd = os.open(name, wanted | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                self._own(parent, name)
                os.fchmod(fd, stat.S_IMODE(mode))  # the umask was applied by the kernel; chown clears set-id bits
            except BaseException:
                os.close(fd)
                raise
        return HostFile(fd, self._mix, append=bool(flags & os.O_APPEND))

    def _mknod(self, path: bytes, mode: int, device: int) -> None:
        with self._parent(path) as (parent, name):
            os.mknod(name, mode, device, dir_fd=parent)
            self._own(parent, name)
            os.chmod(name, stat.S_IMODE(mode), dir_fd=parent)

    def _mkdir(self, path: bytes, mode: int) -> None:
        with self._parent(path) as (parent, name):
            os.mkdir(name, 0o700, dir_fd=parent)
            self._own(parent, name)
            inherited = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode & stat.S_ISGID
            os.chmod(name, stat.S_IMODE(mode) | inherited, dir_fd=parent)

    def _unlink(self, path: bytes) -> None:
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
            os.chown(self._root, uid, gid)
            return
        with self._parent(path) as (parent, name):
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    def _truncate(self, path: bytes, size: int) -> None:
        with self._open(path, os.O_WRONLY | os.O_NONBLOCK) as fd:
            os.ftruncate(fd, size)

    def _utimens(self, path: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """Seconds and nanoseconds each; UTIME_NOW and UTIME_OMIT as in utimensat(2)."""
        now = self._lstat(path)
        times = (_time(atime, now.st_atime_ns), _time(mtime, now.st_mtime_ns))
        if not path:
            os.utime(self._root, ns=times)
            return
        with self._parent(path) as (parent, name):
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        self._plain(path, name)
        with self._by_proc(path) as target:
            os.setxattr(target, name, value, flags)

    def _removexattr(self, path: bytes, name: bytes) -> None:
        self._plain(path, name)
        with self._by_proc(path) as target:
            os.removexattr(target, name)

    def _plain(self, path: bytes, name: bytes) -> None:
        if os.fsdecode(name).startswith(OVERLAY) or not hasattr(os, "setxattr"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if path and stat.S_ISLNK(self._lstat(path).st_mode):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


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


def _inside(uid: int, gid: int) -> tuple[int, int]:
    """A caller outside the engine's namespace, in it. Whose group has no place there creates with the engine's."""
    try:
        return userids.given(uid, gid)
    except PermissionError:
        return userids.given(uid, -1)[0], 0


def _kind(entry: os.DirEntry[str]) -> int:
    """The file type bits of a directory entry, without a stat where the file system says."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)


def _time(value: tuple[int, int], before: int) -> int:
    seconds, nanos = value
    if nanos == UTIME_OMIT:
        return before
    if nanos == UTIME_NOW:
        return time.time_ns()
    return seconds * 1_000_000_000 + nanos
