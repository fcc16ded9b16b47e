"""`dutchman cp`: files between containers and the host, through `containers/<name>/rootfs`.

Floor 7. Only here: what a path in a container leads to. It is resolved with the container's root as `/` (openat2
RESOLVE_IN_ROOT), so its symlinks lead nowhere on the host; below that, everything is opened by name in its directory
and no symlink is followed, so that a container that swaps names meanwhile gains nothing. One thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import click

from engine import host
from fdfs.cli_machine import Machine
from fdfs.cli_mount import Failure, Mount
from fdfs.cli_options import mount_option

CHUNK = 1 << 20
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
MAX_DEPTH = 512


@dataclass(frozen=True, slots=True)
class Place:
    """A path as given: on the host, or in a container."""

    text: str
    path: str
    root: int | None  # the container's root directory
    name: str = ""  # of the container

    def open(self, path: str, flags: int) -> int:
        if self.root is None:
            return os.open(path or ".", flags | os.O_CLOEXEC)
        return host.open_in_root(self.root, path or "/", flags)

    def machine(self, mount: Mount) -> Machine | None:
        """The virtual machine that has its files, when it runs in one."""
        if self.root is None or mount.field("containers", self.name, "runtime") != "vm":
            return None
        if mount.field("containers", self.name, "state") not in ("running", "paused"):
            return None
        return Machine(mount, self.name, self.root)


@contextmanager
def _place(mount: Mount, text: str) -> Iterator[Place]:
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name in ("", ".", ".."):
        yield Place(text, text, None)
        return
    rootfs = mount.path("containers", mount.container(name), "rootfs")
    with ExitStack() as stack:
        try:
            root = os.open(rootfs, DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(f"cp: {name} has no files yet: {error.strerror}", "hint: echo IMAGE > config/image") from None
        stack.callback(os.close, root)
        yield Place(text, "/" + path.lstrip("/"), root, name)


def _split(path: str) -> tuple[str, str]:
    """(directory, name) of what `path` names; the name is empty for a root, `.` and `..`."""
    directory, name = os.path.split(path.rstrip("/"))
    return (path, "") if name in ("", ".", "..") else (directory, name)


@click.command("cp", context_settings={"ignore_unknown_options": False})
@mount_option
@click.option("-a", "--archive", is_flag=True, help="Keep owners too.")
@click.argument("source")
@click.argument("target")
def cp_command(mount: str | None, archive: bool, source: str, target: str) -> None:
    """Copy SOURCE to TARGET; either is NAME:PATH, in the container NAME, running or not.

    A directory is copied with all it holds: into TARGET when that is a directory, else as TARGET. SOURCE ending in `/.`
    means what is in it. Modes, times, symlinks and devices stay as they are. The same as `cp` on `rootfs/`, but a
    container's own symlinks are followed only inside it.

    `-` in place of one of them is a tar: NAME:PATH - writes one to standard output, - NAME:DIRECTORY makes what the one
    on standard input holds (owners too, for root). It is refused where it leads through a symlink.
    """
    where = Mount.find(mount)
    if "-" in (source, target):
        _stream(where, source, target)
        return
    with _place(where, source) as origin, _place(where, target) as goal:
        try:
            _copy_to(where, origin, goal, archive)
        except OSError as error:
            name = f"{error.filename}: " if isinstance(error.filename, str) else ""
            raise Failure(f"cp {source} {target}: {name}{error.strerror}") from None


def _stream(where: Mount, source: str, target: str) -> None:
    from fdfs import cli_tar

    what = f"cp {source} {target}"
    with _place(where, target if source == "-" else source) as place, ExitStack() as stack:
        if place.root is None:
            raise Failure(f"{what}: a tar is of a path in a container", "hint: NAME:PATH - or - NAME:DIRECTORY")

        def opened(path: str) -> int:
            fd = place.open(path, DIRECTORY)
            stack.callback(os.close, fd)
            return fd

        try:
            if source == "-":
                cli_tar.read(opened(place.path), what, place.machine(where))
                return
            directory, name = _split(place.path)
            if name and not place.path.endswith("/"):
                cli_tar.write(opened(directory), name, name, what, place.machine(where))
            else:  # of a link that ends in `/`: what it leads to
                cli_tar.write(opened(place.path), ".", name or ".", what, place.machine(where))
        except BrokenPipeError:
            raise
        except OSError as error:
            path = f"{error.filename}: " if isinstance(error.filename, str) else ""
            raise Failure(f"{what}: {path}{error.strerror}") from None


def _copy_to(mount: Mount, origin: Place, goal: Place, owners: bool) -> None:
    with ExitStack() as stack:

        def opened(place: Place, path: str) -> int:
            fd = place.open(path, DIRECTORY)
            stack.callback(os.close, fd)
            return fd

        content = origin.path.endswith("/.") or origin.path == "."
        directory, name = _split(origin.path)
        if not name:
            here, name, content = opened(origin, origin.path), ".", True
        else:
            here = opened(origin, directory)
        info = os.stat(name, dir_fd=here, follow_symlinks=False)
        if origin.path.endswith("/") and not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), origin.text)
        try:
            there, new = opened(goal, goal.path), "." if content else name
        except (FileNotFoundError, NotADirectoryError):
            if goal.path.endswith("/"):
                raise
            above, new = _split(goal.path)
            there = opened(goal, above)
            if new and stat.S_ISREG(info.st_mode) and _overwritten(here, name, goal):
                return
        if stat.S_ISDIR(info.st_mode) and os.fstat(here).st_dev != os.fstat(there).st_dev:
            what = f"cp {origin.text} {goal.text}"
            if (machine := goal.machine(mount)) and machine.fill(there, here, name, new, owners, what):
                return
            if (machine := origin.machine(mount)) and machine.fetch(here, name, there, new, owners, what):
                return
        _copy(here, name, there, new, owners, 0)


def _overwritten(here: int, name: str, goal: Place) -> bool:
    """Copy into a regular file that is there: symlinks followed where they lead inside, owner and mode kept, as cp
    does. False when there is none."""
    with ExitStack() as stack:
        try:
            found = goal.open(goal.path, getattr(os, "O_PATH", os.O_RDWR | os.O_NONBLOCK))
        except (FileNotFoundError, IsADirectoryError):
            return False
        stack.callback(os.close, found)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            return False
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        stack.callback(os.close, source)
        if os.path.samestat(os.fstat(source), os.fstat(found)):
            raise OSError(errno.EINVAL, "a file cannot be copied onto itself", goal.text)
        target = found
        if hasattr(os, "O_PATH"):
            target = os.open(f"/proc/self/fd/{found}", os.O_WRONLY | os.O_CLOEXEC)  # exactly what was seen
            stack.callback(os.close, target)
        os.ftruncate(target, 0)
        _bytes(source, target)
    return True


def _bytes(source: int, target: int) -> None:
    while data := os.read(source, CHUNK):
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]


def _copy(here: int, name: str, there: int, new: str, owners: bool, depth: int) -> None:
    """One entry and what is below it; a file in the way is replaced, a directory merged into."""
    if depth > MAX_DEPTH:
        raise OSError(errno.ELOOP, "nested too deeply", name)
    info = os.stat(name, dir_fd=here, follow_symlinks=False)
    kind = stat.S_IFMT(info.st_mode)
    if kind == stat.S_IFDIR:
        _directory(here, name, there, new, owners, depth, info)
        return
    if kind == stat.S_IFSOCK:
        return  # it means something to its process only
    try:
        os.unlink(new, dir_fd=there)
    except FileNotFoundError:
        pass
    if kind == stat.S_IFREG:
        _regular(here, name, there, new, owners)
        return
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=here), new, dir_fd=there)
    else:
        before = os.umask(0)
        try:
            os.mknod(new, info.st_mode, info.st_rdev, dir_fd=there)
        finally:
            os.umask(before)
    if owners:
        os.chown(new, info.st_uid, info.st_gid, dir_fd=there, follow_symlinks=False)
    os.utime(new, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=there, follow_symlinks=False)


def _regular(here: int, name: str, there: int, new: str, owners: bool) -> None:
    with ExitStack() as stack:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        stack.callback(os.close, source)
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise OSError(errno.ESTALE, "changed while it was copied", name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(new, flags, 0o600, dir_fd=there)
        stack.callback(os.close, target)
        _bytes(source, target)
        _attributes(target, os.fstat(source), owners)


def _directory(here: int, name: str, there: int, new: str, owners: bool, depth: int, info: os.stat_result) -> None:
    with ExitStack() as stack:
        source = os.open(name, DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        stack.callback(os.close, source)
        made = False
        if new != ".":
            try:
                os.mkdir(new, 0o700, dir_fd=there)
                made = True
            except FileExistsError:
                pass
        target = os.open(new, DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=there)
        stack.callback(os.close, target)
        own = os.fstat(target)
        for entry in sorted(os.listdir(source)):
            below = os.stat(entry, dir_fd=source, follow_symlinks=False)
            if (below.st_dev, below.st_ino) == (own.st_dev, own.st_ino):
                raise OSError(errno.EINVAL, "a directory cannot be copied into itself", name)
            _copy(source, entry, target, entry, owners, depth + 1)
        if made:
            _attributes(target, info, owners)


def _attributes(target: int, info: os.stat_result, owners: bool) -> None:
    """By descriptor: a name could be another's by now, and chmod follows symlinks."""
    if owners:
        os.chown(target, info.st_uid, info.st_gid)
    os.fchmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
