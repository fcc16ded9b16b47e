"""The files of an archive by name: of a directory, or of a tar (compressed or not). Floor 2.

Only here: how a name in an archive becomes bytes. A directory is opened with openat2 below its root, a tar by an index
of its members' offsets; in both, nothing outside can be reached by `..`, an absolute name or a link.

Threading: one user at a time.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Protocol, cast

from engine import host
from engine.errors import Damaged, InvalidArgument, NotFound, TooLarge
from engine.jobs import Task
from engine.store.blobs import write_all
from engine.store.inflate import NONE, detect, inflate

CHUNK = 1 << 18
MAX_MEMBERS = 20_000  # of an archive of images; its layers may hold far more
MAX_HEADER = 4 << 20  # bytes of one extended header
MAX_LINKS = 8  # followed one after another
MAX_INFLATED = 64 << 30  # bytes of a compressed archive, inflated


class Files(Protocol):
    def has(self, name: str) -> bool: ...
    def read(self, name: str, limit: int) -> bytes:
        """A whole file. NotFound; TooLarge."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file in pieces. NotFound."""
        ...


def open_files(path: Path, tmp: Path, stack: ExitStack, task: Task) -> Files:
    """The files at `path`; `stack` closes them. NotFound, InvalidArgument for what is neither directory nor tar."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("no such file or directory", at=str(path)) from error
    if stat.S_ISDIR(mode):
        return DirFiles(path, stack)
    if not stat.S_ISREG(mode):
        raise InvalidArgument("a directory or a tar file expected", at=str(path))
    with open(path, "rb") as file:
        head = file.read(8)
    if detect(head) != NONE:
        path = inflated(path, tmp, stack, task)
    return TarFiles(path, stack, task)


def inflated(path: Path, tmp: Path, stack: ExitStack, task: Task) -> Path:
    """A compressed file's content as a file in `tmp` that goes with `stack`. TooLarge, Damaged, NoSpace."""
    fd, name = tempfile.mkstemp(dir=tmp, prefix="inflated-")
    stack.callback(os.unlink, name)
    total = 0

    def pieces() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while piece := file.read(CHUNK):
                task.check()
                yield piece

    try:
        for block in inflate(pieces()):
            total += len(block)
            if total > MAX_INFLATED:
                raise TooLarge(f"the archive inflates to more than {MAX_INFLATED} bytes", at=str(path))
            write_all(fd, block)
    finally:
        os.close(fd)
    return Path(name)


class DirFiles:
    """Files below a directory."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, self._root)

    def _open(self, name: str) -> int:
        try:
            fd = host.open_in_root(self._root, name, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFound("the layout lacks a file", at=name[:200]) from error
        except (OSError, ValueError) as error:
            raise Damaged(f"the layout's file cannot be opened: {error}", at=name[:200]) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Damaged("the layout has something that is no file", at=name[:200])
        return fd

    def has(self, name: str) -> bool:
        try:
            os.close(self._open(name))
        except (NotFound, Damaged):
            return False
        return True

    def read(self, name: str, limit: int) -> bytes:
        fd = self._open(name)
        with open(fd, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise TooLarge(f"{name[:200]} is larger than {limit} bytes", at=name[:200])
        return raw

    def chunks(self, name: str) -> Iterator[bytes]:
        with open(self._open(name), "rb") as file:
            while piece := file.read(CHUNK):
                yield piece


class _Headers:
    """A file of which only headers are read: one that wants more memory (pax, long names) is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self.seek = file.tell, file.seek
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise TooLarge(f"a header of more than {MAX_HEADER} bytes in the archive")
        return self._read(size)


class TarFiles:
    """Files of an uncompressed tar, by an index of where they are."""

    def __init__(self, path: Path, stack: ExitStack, task: Task) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (the stack closes it)
        stack.callback(self._file.close)
        self._members: dict[str, tuple[int, int, str]] = {}  # offset, size, link target
        try:
            with tarfile.open(fileobj=cast(IO[bytes], _Headers(self._file)), mode="r:", errorlevel=1) as tar:
                for count, member in enumerate(tar):
                    if count >= MAX_MEMBERS:
                        raise TooLarge(f"the archive has more than {MAX_MEMBERS} members", at=str(path))
                    task.check()
                    self._take(member)
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise InvalidArgument(f"not a tar archive: {error}", at=str(path)) from error
        self._size = os.fstat(self._file.fileno()).st_size

    def _take(self, member: tarfile.TarInfo) -> None:
        name = _clean(member.name)
        if member.issym():
            self._members[name] = (0, 0, _clean(posixpath.join(posixpath.dirname(name), member.linkname)))
        elif member.islnk():
            self._members[name] = (0, 0, _clean(member.linkname))
        elif member.isreg() and not member.issparse():
            self._members[name] = (member.offset_data, member.size, "")

    def _find(self, name: str) -> tuple[int, int]:
        here = _clean(name)
        for _ in range(MAX_LINKS):
            found = self._members.get(here)
            if found is None:
                raise NotFound("the archive lacks a file", at=name[:200])
            offset, size, link = found
            if not link:
                if offset + size > self._size:
                    raise Damaged("the archive ends within a file", at=name[:200])
                return offset, size
            here = link
        raise Damaged(f"more than {MAX_LINKS} links one after another", at=name[:200])

    def has(self, name: str) -> bool:
        return _clean(name) in self._members

    def read(self, name: str, limit: int) -> bytes:
        offset, size = self._find(name)
        if size > limit:
            raise TooLarge(f"{name[:200]} is larger than {limit} bytes", at=name[:200])
        return os.pread(self._file.fileno(), size, offset)

    def chunks(self, name: str) -> Iterator[bytes]:
        offset, size = self._find(name)
        while size:
            piece = os.pread(self._file.fileno(), min(CHUNK, size), offset)
            if not piece:
                raise Damaged("the archive ends within a file", at=name[:200])
            offset += len(piece)
            size -= len(piece)
            yield piece


def _clean(name: str) -> str:
    """A member's name below the archive's root; `..` and a leading / lead nowhere else."""
    return posixpath.normpath("/" + name).lstrip("/")
