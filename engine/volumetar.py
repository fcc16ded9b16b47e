"""Volumes as tar archives: out to a file of the host, and in from one that may be hostile. Floor 2, no state.

Only here: what of a volume an archive holds, and how members become files. Owners, modes, times, xattrs, hard links and
device nodes go both ways; sockets are left out; holes are found again when zeros are written. Names are plain names (a
`.wh.` means nothing here). A member is made relative to a directory opened below the volume without following any link:
`..`, a path through a link, and a link to what lies outside are refused, and with them the whole archive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from engine import host
from engine.errors import Damaged, InvalidArgument, NotFound
from engine.images import tarout
from engine.images.files import inflated
from engine.images.save import new_file
from engine.images.upperlayer import entry
from engine.jobs import Task
from engine.store import tar
from engine.store.blobs import no_space
from engine.store.inflate import NONE, detect, inflate
from engine.store.tarstart import check_start
from engine.volumefill import OURS
from engine.walk import FLAGS, RESOLVE, walk

PIECE = 1 << 20
XATTRS = (b"user.", b"security.capability", b"system.posix_acl_")  # what an archive may set


# --- out --------------------------------------------------------------------------------------------------------------


def export(data: Path, path: Path, task: Task) -> int:
    """Write the directory `data` to the new file `path`; returns its bytes. AlreadyExists, NotFound, NoSpace; Busy
    when a file becomes shorter meanwhile."""
    done = 0
    with new_file(path) as write:
        for piece in tarout.archive(_members(data, task)):
            task.check()
            write(piece)
            done += len(piece)
            task.advance("tar", done, 0, "writing")
    return done


def _members(data: Path, task: Task) -> Iterator[tuple[tarout.Member, Iterable[bytes]]]:
    links: dict[tuple[int, int], bytes] = {}
    waiting: dict[bytes, tuple[tarout.Member, Iterable[bytes]]] = {}
    with host.directory_fd(data) as top:
        info = os.fstat(top)
        yield tarout.Member(b"./", tarout.DIRECTORY, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, 0,
                            info.st_mtime_ns), ()  # fmt: skip
        for path, _, entries in walk(data, whole=True):
            task.check()
            if path.partition(b"/")[0] in OURS:
                continue
            if path in waiting:
                yield waiting.pop(path)
            for name, info in entries:
                below = path + b"/" + name if path else name
                if stat.S_ISSOCK(info.st_mode) or (not path and name in OURS):
                    continue
                made = entry(top, below, info, links)
                if stat.S_ISDIR(info.st_mode):
                    waiting[below] = made  # right before what is in it, which the walk brings later
                else:
                    yield made


# --- in ---------------------------------------------------------------------------------------------------------------


def unpack(path: Path, target: Path, tmp: Path, task: Task) -> int:
    """Make what the archive `path` (plain, gzip, zstd, bzip2, xz) holds in the empty directory `target`; returns the
    number of members. NotFound, InvalidArgument, Damaged, TooLarge, NoSpace."""
    if not path.is_file():
        kind = InvalidArgument if path.exists() else NotFound
        raise kind("a tar file expected" if path.exists() else "no such file", at=str(path))
    check_start(path)
    with ExitStack() as stack, open(path, "rb") as file:
        plain = path
        if detect(file.read(8)) != NONE:
            plain = inflated(path, tmp, stack, task)
        try:
            with open(plain, "rb") as archive, host.directory_fd(target) as top:
                return _Unpacked(top, owners=True).run(iter(lambda: archive.read(PIECE), b""), task)
        except OSError as error:
            if full := no_space(error):
                raise full from error
            raise


def unpack_stream(blocks: Iterator[bytes], top: int, *, owners: bool, merge: bool = False) -> int:
    """The same from a stream, into the open directory `top`, which may hold something: a file in the way is replaced,
    a directory merged into. Without `owners`, what only root may set is left out. With `merge` a directory
    that is there keeps its mode, owner and time. Damaged leaves what came before."""
    return _Unpacked(top, owners, merge).run(inflate(blocks), Task())


class _Unpacked:
    def __init__(self, top: int, owners: bool, merge: bool = False) -> None:
        self._top, self._owners, self._merge = top, owners, merge
        self._times: list[tuple[bytes, tar.Member]] = []  # of directories, set when all is in them

    def run(self, blocks: Iterator[bytes], task: Task) -> int:
        count = 0
        reader = tar.TarReader(blocks)
        for member in reader:
            task.check()
            self._member(self._top, member, reader, task)
            count += 1
            task.advance("tar", reader.offset, 0, "reading")
        for name, member in reversed(self._times):
            fd = host.open_in_root(self._top, name or b".", FLAGS, resolve=RESOLVE)
            try:
                self._dress(fd, member)
            finally:
                os.close(fd)
        return count

    def _member(self, top: int, member: tar.Member, reader: tar.TarReader, task: Task) -> None:
        parts = parts_of(member.name)
        if not parts:
            if member.type == tar.DIRECTORY and not self._merge:
                self._times.append((b"", member))
            return
        parent, name = self._parent(top, parts), parts[-1]
        try:
            if member.type == tar.DIRECTORY:
                try:
                    os.mkdir(name, 0o700, dir_fd=parent)
                except FileExistsError:
                    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                        raise Damaged("a directory where a file was before", at=shown(member.name)) from None
                    if self._merge:
                        return
                self._times.append((b"/".join(parts), member))
                return
            try:
                os.unlink(name, dir_fd=parent)  # a later member replaces an earlier one
            except FileNotFoundError:
                pass
            except (IsADirectoryError, PermissionError):
                raise Damaged("a file where a directory was before", at=shown(member.name)) from None
            self._make(top, parent, name, member, reader, task)
        finally:
            os.close(parent)

    def _parent(self, top: int, parts: list[bytes]) -> int:
        """An fd of the directory a member lies in; made where the archive does not name it."""
        here = os.dup(top)
        for part in parts[:-1]:
            try:
                try:
                    below = os.open(part, FLAGS, dir_fd=here)
                except FileNotFoundError:
                    os.mkdir(part, 0o755, dir_fd=here)
                    below = os.open(part, FLAGS, dir_fd=here)
            except OSError as error:
                raise Damaged("its path leads through what is no directory", at=shown(b"/".join(parts))) from error
            finally:
                os.close(here)
            here = below
        return here

    def _make(self, top: int, parent: int, name: bytes, member: tar.Member, reader: tar.TarReader, task: Task) -> None:
        if member.type == tar.HARDLINK:
            source = parts_of(member.linkname)
            if not source:
                raise Damaged("a hard link to nothing", at=shown(member.name))
            there = self._parent(top, source)
            try:
                os.link(source[-1], name, src_dir_fd=there, dst_dir_fd=parent, follow_symlinks=False)
            except OSError as error:
                raise Damaged(f"a hard link to {shown(member.linkname)}: {error.strerror}", at=shown(member.name)) \
                    from error  # fmt: skip
            finally:
                os.close(there)
            return
        if member.type == tar.REGULAR:
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
            )
            try:
                _body(fd, member, reader, task)
                self._dress(fd, member)
            finally:
                os.close(fd)
            return
        if member.type == tar.SYMLINK:
            if not member.linkname:
                raise Damaged("a symbolic link to nothing", at=shown(member.name))
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.type == tar.FIFO:
            os.mkfifo(name, 0o600, dir_fd=parent)
        else:
            kind = stat.S_IFCHR if member.type == tar.CHAR else stat.S_IFBLK
            os.mknod(name, 0o600 | kind, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
        if self._owners:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if member.type != tar.SYMLINK:
            os.chmod(name, member.mode, dir_fd=parent)
        os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _dress(self, fd: int, member: tar.Member) -> None:
        if self._owners:
            os.fchown(fd, member.uid, member.gid)
        for key, value in settable(member, self._owners):
            os.setxattr(fd, key, value)
        os.fchmod(fd, member.mode)
        os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))


def parts_of(name: bytes) -> list[bytes]:
    """The components of a member's name. InvalidArgument for `..`."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidArgument("the archive names a path with '..'", at=shown(name))
    if parts[:1] and parts[0].startswith(b".dutchman-"):
        raise InvalidArgument("the archive has a name the engine keeps for itself", at=shown(name))
    return parts


def settable(member: tar.Member, owners: bool) -> list[tuple[bytes, bytes]]:
    """Those of a member's xattrs that an archive may set; without `owners`, none that only root may."""
    return [
        (key, value)
        for key, value in member.xattrs.items()
        if key.startswith(XATTRS) and (owners or not key.startswith(b"security."))
    ]


def shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")[:200]


def _body(fd: int, member: tar.Member, reader: tar.TarReader, task: Task) -> None:
    """Its bytes where they belong; blocks of zeros become holes."""
    extents = iter(member.sparse if member.sparse is not None else [(0, member.size)])
    at = left = 0
    for piece in reader.pieces():
        task.check()
        while piece:
            while not left:
                at, left = next(extents)
            step = piece[: min(left, len(piece))]
            if step.nbytes < 4096 or any(step):
                done = 0
                while done < len(step):
                    done += os.pwrite(fd, step[done:], at + done)
            at, left, piece = at + len(step), left - len(step), piece[len(step) :]
    os.ftruncate(fd, member.size)
