"""Copying a directory tree as it is, between trees that others may be writing to. Floor 2, no state.

Only here: what a copy keeps: owners, modes, times, xattrs (ACLs and capabilities are such), hard links, holes, device
nodes, FIFOs; sockets are left out. Bodies are shared with the source where the file system can (FICLONE), else copied
extent by extent. Nothing is followed: every name is used relative to a directory that was opened without following
links, on both sides.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from engine import host
from engine.errors import Busy, NoSpace
from engine.jobs import Task
from engine.walk import FLAGS, RESOLVE, walk

FICLONE = 0x40049409  # <linux/fs.h>
PIECE = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HOST_ONLY = ("security.selinux", "security.ima", "security.evm", "security.apparmor")


def copy_tree(
    source: Path | int, target: Path, task: Task | None = None, *, skip: frozenset[bytes] = frozenset()
) -> int:
    """Fill the directory `target` with what is in `source`; returns bytes of files. Names in `skip` are left out at
    the top. NoSpace; Busy when a file changes its kind meanwhile; OSError otherwise. What was copied stays then."""
    task = task or Task()
    try:
        return _Copy(target, task, skip).run(source)
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace("no room for the copy", at=str(target), hint="see df") from error
        raise


class _Copy:
    def __init__(self, target: Path, task: Task, skip: frozenset[bytes]) -> None:
        self._out = os.open(target, FLAGS)
        self._task, self._skip = task, skip
        self._links: dict[tuple[int, int], bytes] = {}
        self._done = 0

    def run(self, source: Path | int) -> int:
        directories: list[bytes] = []
        top = os.dup(source) if isinstance(source, int) else os.open(source, FLAGS)
        try:
            for path, fd, entries in walk(top, whole=True):
                if path.partition(b"/")[0] in self._skip:
                    continue
                directories.append(path)
                here = host.open_in_root(self._out, path, FLAGS, resolve=RESOLVE)
                try:
                    for name, info in entries:
                        if not path and name in self._skip:
                            continue
                        self._task.check()
                        self._entry(path + b"/" + name if path else name, fd, here, name, info)
                finally:
                    os.close(here)
            for path in reversed(directories):  # after their content: it would change their times, and inherit ACLs
                self._directory(top, path)
        finally:
            os.close(top)
            os.close(self._out)
        return self._done

    def _directory(self, top: int, path: bytes) -> None:
        try:
            source = host.open_in_root(top, path, FLAGS, resolve=RESOLVE)
        except OSError:
            return  # went away meanwhile
        target = host.open_in_root(self._out, path, FLAGS, resolve=RESOLVE)
        try:
            copy_metadata(source, target)
        finally:
            os.close(source)
            os.close(target)

    def _entry(self, path: bytes, fd: int, here: int, name: bytes, info: os.stat_result) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=here)
            return
        if kind == stat.S_IFSOCK:
            return
        key = (info.st_dev, info.st_ino)
        if info.st_nlink > 1 and key in self._links:
            os.link(self._links[key], name, src_dir_fd=self._out, dst_dir_fd=here, follow_symlinks=False)
            return
        if kind == stat.S_IFREG:
            if not self._file(fd, here, name):
                return
        else:
            if kind == stat.S_IFLNK:
                os.symlink(os.readlink(name, dir_fd=fd), name, dir_fd=here)
            else:
                try:
                    os.mknod(name, info.st_mode, info.st_rdev, dir_fd=here)
                except PermissionError:
                    if kind == stat.S_IFIFO:
                        raise
                    return  # an ordinary user makes no device nodes, and could not use them
            os.chown(name, info.st_uid, info.st_gid, dir_fd=here, follow_symlinks=False)
            if kind != stat.S_IFLNK:
                os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=here)
            _copy_xattrs(b"/proc/self/fd/%d/" % fd + name, b"/proc/self/fd/%d/" % here + name)
            os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=here, follow_symlinks=False)
        if info.st_nlink > 1:
            self._links[key] = path

    def _file(self, fd: int, here: int, name: bytes) -> bool:
        """Whether it is still there."""
        try:
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            return False
        try:
            info = os.fstat(source)
            if not stat.S_ISREG(info.st_mode):
                raise Busy("a file was replaced while it was copied", at=os.fsdecode(name), hint="try again")
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=here)
            try:
                if not _share(source, target):
                    self._body(source, target, info.st_size)
                copy_metadata(source, target)
            finally:
                os.close(target)
            self._done += info.st_size
            self._task.advance("files", self._done, 0, "copying")
            return True
        finally:
            os.close(source)

    def _body(self, source: int, target: int, size: int) -> None:
        """The extents of a file; holes stay holes."""
        at = 0
        while at < size:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole is left
                    break
                raise
            end = min(size, os.lseek(source, at, os.SEEK_HOLE))
            while at < end:
                self._task.check()
                count = _piece(source, target, min(PIECE, end - at), at)
                if not count:
                    end = size = at  # it became shorter
                at += count
        os.ftruncate(target, size)


def _share(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
        return True
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False


def _piece(source: int, target: int, count: int, at: int) -> int:
    try:
        if hasattr(os, "copy_file_range"):
            return os.copy_file_range(source, target, count, at, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    data = memoryview(os.pread(source, count, at))
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], at + done)
    return len(data)


def copy_metadata(source: int, target: int) -> None:
    """Owner, xattrs, mode and times, from one open file or directory to another."""
    info = os.fstat(source)
    os.fchown(target, info.st_uid, info.st_gid)
    os.fchmod(target, stat.S_IMODE(info.st_mode))
    _copy_xattrs(source, target)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _copy_xattrs(source: int | bytes, target: int | bytes) -> None:
    """What the target's file system does not take is left out, as cp -a does."""
    if not hasattr(os, "listxattr"):  # of macOS Python has none
        return
    follow = isinstance(source, int)
    try:
        names = os.listxattr(source, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for name in names:
        if name.startswith("trusted.overlay.") or name in _HOST_ONLY:
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=follow), follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.ENODATA):
                raise
