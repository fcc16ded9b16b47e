"""Files of a running guest as a tar, and a tar made files in one: what many small files cost is asked for together.

Floor 2. Only here: which requests of an archive are under way at once (pipeline.py), and the order they must keep. Out:
a directory's entries are listed, and the contents of the small files, links and xattrs asked for ahead; big files are
read as everywhere (openfile.py). In: one request makes a small file whole (verb MAKE); a directory is there before what
is in it, and nothing of one name overtakes the other. The guest is hostile: entries are counted, paths bounded, names
and sizes checked; what it names is never resolved on the host. One thread per archive.

Errors: as guestfiles.py, OSError with the path in the archive; Damaged, TooLarge for an archive that cannot be made.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from engine import userids
from engine.errors import Damaged, TooLarge
from engine.images import tarout
from engine.images.upperlayer import HOST_ONLY, OVERLAY
from engine.runtimes.vm import protocol
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.guestupper import MAX_PATH, GuestUpper
from engine.runtimes.vm.openfile import GuestFile
from engine.runtimes.vm.pipeline import MOST, Asked, Pipeline, pipeline
from engine.runtimes.vm.protocol import Attr, ProtocolError, Value, Values, Words
from engine.store import tar
from engine.volumetar import parts_of, settable, shown
from engine.walk import GONE, MAX_ENTRIES

ROOT = "container"
AHEAD = 2 << 20  # bytes that are asked for, or sent, before the first of them is answered
MAX_XATTRS = 56 << 10  # bytes of one file's that go with it, their frames included
FRAME = 16  # bytes of each, at most
PLACES = frozenset({b"proc", b"sys", b"dev"})  # of the container's root: not gone into where another file system is

Body = Iterable[bytes]
Listed = tuple[bytes, Attr, tuple[bytes, ...] | None]


@contextmanager
def suppress_errno(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise


def _at(error: OSError, path: bytes) -> OSError:
    return OSError(error.errno, os.strerror(error.errno or errno.EIO), shown(path))


def target_of(values: Values) -> bytes:
    """Of a symlink."""
    target = values.need("target")
    if not 0 < len(target) < 4096 or b"\0" in target:
        raise ProtocolError("a symlink's target that is none")
    return target


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path and name else path or name


# --- out --------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    path: bytes  # below what is packed
    attr: Attr
    size: int  # of the content that was asked for
    first: Asked | None  # of its content or target
    xattrs: list[tuple[bytes, Asked | None]]  # by name; None: to be asked for when its turn comes


class _Made(NamedTuple):
    path: bytes
    attr: Attr
    member: tarout.Member
    body: Body


def pack(files: GuestFiles, path: bytes, name: bytes, *, plain: bool) -> Generator[bytes, None, None]:
    """What is at `path`, called `name`, in pieces. `plain`: no xattrs, and a hard link is a file of its own. Sockets
    are left out, as is what vanishes meanwhile. Busy when a big file becomes shorter."""
    files.settle()
    with pipeline(files, ROOT) as pipe:
        yield from tarout.archive(_Packer(files, pipe, path, name, plain).members())


class _Packer:
    def __init__(self, files: GuestFiles, pipe: Pipeline, top: bytes, name: bytes, plain: bool) -> None:
        self._files, self._pipe, self._top, self._name, self._plain = files, pipe, top, name, plain
        self._upper = GuestUpper(files, root=ROOT)
        self._links: dict[tuple[int, int], bytes] = {}
        self._count = 0

    def members(self) -> Iterator[tuple[tarout.Member, Body]]:
        try:
            values = self._pipe.answer(self._pipe.ask("STAT", {"path": self._top}))
        except OSError as error:
            raise _at(error, self._top) from error
        top = protocol.parse_attr(values.need("attr"))
        if not stat.S_ISDIR(top.mode):
            for made in self._done(self._ask(b"", top, None)):
                yield made.member, made.body
            return
        dirs = [made for made in self._done(self._ask(b"", top, None))]
        listed: dict[bytes, Asked] = {}
        while dirs:
            path, attr, member, _ = dirs.pop()
            yield member, ()
            if not self._top and path in PLACES and attr.dev != top.dev:
                continue
            try:
                entries = self._list(path, listed.pop(path, None))
            except OSError as error:
                if path and error.errno in GONE:
                    continue
                raise
            below = [_join(path, name) for name, attr, _ in entries if stat.S_ISDIR(attr.mode)]
            if (soon := below[0] if below else dirs[-1].path if dirs else None) is not None and soon not in listed:
                listed[soon] = self._pipe.ask("LIST", {"path": _join(self._top, soon)})
            found: list[_Made] = []
            for made in self._contents(path, entries):
                if made.member.kind == tarout.DIRECTORY:
                    found.append(made)
                else:
                    yield made.member, made.body
            dirs += reversed(found)

    def _list(self, path: bytes, asked: Asked | None) -> list[Listed]:
        """By name. TooLarge for more than MAX_ENTRIES in all, or a path that is too long."""
        full = _join(self._top, path)
        values = self._pipe.answer(asked or self._pipe.ask("LIST", {"path": full}))
        entries, handle = protocol.parse_page(values)
        while handle is not None:
            if self._count + len(entries) > MAX_ENTRIES:
                self._files.done(values.number("handle"))
                raise TooLarge(f"more than {MAX_ENTRIES} entries are to be copied")
            values = self._pipe.answer(self._pipe.ask("LIST", {"handle": handle}))
            more, handle = protocol.parse_page(values)
            entries += more
        self._count += len(entries)
        if self._count > MAX_ENTRIES:
            raise TooLarge(f"more than {MAX_ENTRIES} entries are to be copied")
        entries.sort(key=lambda entry: entry[0])
        if any(one[0] == other[0] for one, other in itertools.pairwise(entries)):
            raise ProtocolError("two entries of one name")
        if entries and len(full) + 1 + max(len(entry[0]) for entry in entries) > MAX_PATH:
            raise TooLarge(f"a path is too long to be copied: {shown(full)[:80]}…")
        return entries

    def _contents(self, path: bytes, entries: list[Listed]) -> Iterator[_Made]:
        waiting: deque[_Entry] = deque()
        size = count = 0
        for name, attr, names in entries:
            if stat.S_ISSOCK(attr.mode):
                continue
            waiting.append(self._ask(_join(path, name), attr, names))
            size += waiting[-1].size
            count += 1 + len(waiting[-1].xattrs)
            while waiting and (size > AHEAD or count > MOST):
                size -= waiting[0].size
                count -= 1 + len(waiting[0].xattrs)
                yield from self._done(waiting.popleft())
        while waiting:
            yield from self._done(waiting.popleft())

    def _ask(self, path: bytes, attr: Attr, names: tuple[bytes, ...] | None) -> _Entry:
        full = _join(self._top, path)
        first, size = None, 0
        if stat.S_ISLNK(attr.mode):
            first = self._pipe.ask("READLINK", {"path": full})
        elif stat.S_ISREG(attr.mode) and attr.size <= protocol.EARLY:
            size = attr.size
            first = self._pipe.ask("OPEN", {"path": full, "flags": "r", "early": protocol.EARLY, "whole": 1})
        if self._plain:
            return _Entry(path, attr, size, first, [])
        if names is None:
            names = self._files.xattr_names(ROOT, full)
        kept = [name for name in names if not name.startswith(OVERLAY) and name not in HOST_ONLY]
        asked: list[tuple[bytes, Asked | None]] = [(name, self._value(full, name)) for name in kept[:MOST]]
        return _Entry(path, attr, size, first, asked + [(name, None) for name in kept[MOST:]])

    def _value(self, path: bytes, name: bytes) -> Asked:
        return self._pipe.ask("GETXATTR", {"path": path, "name": name})

    def _done(self, entry: _Entry) -> Iterator[_Made]:
        """What an entry has become; nothing where it is gone."""
        full = _join(self._top, entry.path)
        attr, link, data = entry.attr, b"", None
        xattrs: dict[bytes, bytes] = {}
        try:
            if entry.first is not None:
                values = self._pipe.answer(entry.first)
                if stat.S_ISLNK(attr.mode):
                    link = target_of(values)
                else:
                    attr, data = self._content(values)
            room = tar.DEFAULT_LIMITS.xattrs  # of who reads it
            for name, asked in entry.xattrs:
                with suppress_errno(errno.ENODATA):
                    xattrs[name] = self._pipe.answer(asked or self._value(full, name)).need("value")
                    room -= len(name) + len(xattrs[name])
                if room < 0:
                    raise TooLarge("the extended attributes of a file are too large", at=shown(full))
        except OSError as error:
            if error.errno in GONE:
                return
            raise _at(error, full) from error
        member = self._member(entry.path, attr, xattrs, link)
        body: Body = ()
        if member.kind == tarout.REGULAR:
            body = self._upper.body(full, member.size) if data is None else (data,)
        yield _Made(entry.path, attr, member, body)

    def _content(self, values: Values) -> tuple[Attr, bytes | None]:
        """Of a small file; None when it has grown."""
        attr, data = protocol.parse_attr(values.need("attr")), values.get("data")
        if not stat.S_ISREG(attr.mode) or (data is not None and len(data) > protocol.EARLY):
            raise ProtocolError("the content of what is no small file")
        if data is None:
            self._files.done(values.number("handle"))
            return attr, None
        return attr._replace(size=len(data)), data

    def _member(self, path: bytes, attr: Attr, xattrs: dict[bytes, bytes], link: bytes = b"") -> tarout.Member:
        kind = tarout.KINDS.get(stat.S_IFMT(attr.mode))
        if kind is None:
            raise ProtocolError(f"a file of the mode {attr.mode:o}")
        uid, gid = userids.shown(attr.uid, attr.gid)
        device = (attr.rdev_major, attr.rdev_minor) if kind in (tarout.CHAR, tarout.BLOCKDEV) else (0, 0)
        name = _join(self._name, path)
        if kind != tarout.DIRECTORY and attr.nlink > 1 and not self._plain:
            known = self._links.setdefault((attr.dev, attr.ino), name)
            if known != name:
                kind, link, xattrs = tarout.HARDLINK, known, {}
        size = attr.size if kind == tarout.REGULAR else 0
        mode = stat.S_IMODE(attr.mode)
        return tarout.Member(name, kind, mode, uid, gid, size, attr.mtime_ns, link, device, xattrs)


# --- in ---------------------------------------------------------------------------------------------------------------


def unpack(files: GuestFiles, path: bytes, blocks: Iterator[bytes], *, owners: bool, merge: bool) -> None:
    """Make what the tar in `blocks` holds in the directory `path`; as volumetar.unpack_stream. With `merge` a directory
    that is there keeps its mode, owner and time."""
    files.settle()
    try:
        with pipeline(files, ROOT) as pipe:
            _Unpacker(files, pipe, path, owners, merge).run(blocks)
    finally:
        files.beliefs.forget(ROOT, path, names=True)
        files.beliefs.forget_below(ROOT, path)


class _Sent(NamedTuple):
    path: bytes
    size: int
    asked: Asked


class _Unpacker:
    def __init__(self, files: GuestFiles, pipe: Pipeline, top: bytes, owners: bool, merge: bool) -> None:
        self._files, self._pipe, self._top = files, pipe, top
        self._owners, self._merge = owners, merge
        self._there = {b"": False}  # directories, and which of them were not there before
        self._sent: deque[_Sent] = deque()
        self._flying: set[bytes] = set()  # their paths
        self._size = 0  # bytes of them
        self._late: list[tuple[bytes, Words]] = []  # of directories: once all is in them

    def run(self, blocks: Iterator[bytes]) -> None:
        reader = tar.TarReader(blocks)
        for member in reader:
            self._member(member, reader)
        self._settle()
        for path, words in reversed(self._late):
            self._send(path, words)
        self._settle()

    def _send(self, path: bytes, words: Words, size: int = 0) -> None:
        """Nothing of one name overtakes another."""
        if path in self._flying:
            self._settle()
        self._sent.append(_Sent(path, size, self._pipe.ask("MAKE", {"at": self._top, "path": path, **words})))
        self._flying.add(path)
        self._size += size
        while len(self._sent) > MOST or self._size > AHEAD:
            self._settle(len(self._sent) - 1)

    def _settle(self, left: int = 0) -> None:
        while len(self._sent) > left:
            path, size, asked = self._sent.popleft()
            self._size -= size
            self._flying.discard(path)
            try:
                self._pipe.answer(asked)
            except OSError as error:
                raise _refused(error, path) from error

    def _member(self, member: tar.Member, reader: tar.TarReader) -> None:
        parts = parts_of(member.name)
        path = b"/".join(parts)
        self._parents(parts[:-1])
        if member.type == tar.DIRECTORY:
            words: dict[str, Value | list[bytes]]
            made = bool(parts) and self._directory(path, "700")
            if made or not self._merge:
                words = {"mode": f"{stat.S_IFDIR | member.mode:o}", "dress": 1}
                self._late.append((path, {**words, **self._dress(member)}))
            return
        if not parts:
            return
        words = {"mode": f"{_KINDS[member.type] | member.mode:o}"}
        if member.type == tar.HARDLINK:
            source = b"/".join(parts_of(member.linkname))
            if not source:
                raise Damaged("a hard link to nothing", at=shown(member.name))
            if source in self._flying:
                self._settle()
            self._send(path, {**words, "link": source})
            return
        words |= self._dress(member)
        if member.type == tar.REGULAR:
            if member.size > protocol.EARLY or member.sparse is not None:
                self._big(path, words, member, reader)
                return
            data = b"".join(reader.pieces())
            self._send(path, {**words, "data": data}, len(data))
            return
        if member.type == tar.SYMLINK:
            words["target"] = member.linkname
        else:
            words |= {"rdev_major": member.devmajor, "rdev_minor": member.devminor}
        self._send(path, words)

    def _dress(self, member: tar.Member) -> dict[str, Value | list[bytes]]:
        words: dict[str, Value | list[bytes]] = {"mtime": member.mtime_ns}
        if self._owners:
            words["uid"], words["gid"] = userids.given(member.uid, member.gid)
        if member.type in (tar.REGULAR, tar.DIRECTORY):
            xattrs = settable(member, self._owners)
            if sum(FRAME + len(name) + len(value) for name, value in xattrs) > MAX_XATTRS:
                raise TooLarge("its extended attributes are too large", at=shown(member.name))
            words["xattr"] = [protocol.fields(name, value) for name, value in xattrs]
        return words

    def _parents(self, parts: list[bytes]) -> None:
        for count in range(1, len(parts) + 1):
            path = b"/".join(parts[:count])
            if path not in self._there:
                self._directory(path, "755")

    def _directory(self, path: bytes, mode: str) -> bool:
        """It is there before anything is made in it. Whether it was not there before."""
        if path in self._there:
            return self._there[path]
        if path in self._flying:
            self._settle()
        words: Words = {"at": self._top, "path": path, "mode": f"{stat.S_IFDIR | int(mode, 8):o}"}
        try:
            made = self._pipe.answer(self._pipe.ask("MAKE", words)).get("made") is not None
        except OSError as error:
            raise _refused(error, path, directory=True) from error
        self._there[path] = made
        return made

    def _big(self, path: bytes, words: Words, member: tar.Member, reader: tar.TarReader) -> None:
        self._send(path, {"mode": f"{stat.S_IFREG | 0o600:o}"})
        self._settle()
        full = _join(self._top, path)
        try:
            file = self._files.open(ROOT, full, "w")
            try:
                _fill(file, member, reader)
            finally:
                file.close()  # the first error of what was written behind, too
        except OSError as error:
            raise _at(error, full) from error
        self._send(path, {**words, "dress": 1})


def _fill(file: GuestFile, member: tar.Member, reader: tar.TarReader) -> None:
    extents = iter(member.sparse if member.sparse is not None else [(0, member.size)])
    at = left = 0
    for piece in reader.pieces():
        while piece:
            while not left:
                at, left = next(extents)
            step = piece[:left]
            if file.write(bytes(step), at) < len(step):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at, left, piece = at + len(step), left - len(step), piece[len(step) :]
    if member.sparse is not None:
        file.truncate(member.size)


_KINDS = {
    tar.REGULAR: stat.S_IFREG,
    tar.HARDLINK: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCKDEV: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}


def _refused(error: OSError, path: bytes, *, directory: bool = False) -> Exception:
    """In the words of volumetar.py."""
    if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and not directory):
        return Damaged("its path leads through what is no directory", at=shown(path))
    if error.errno == errno.ENOTDIR:
        return Damaged("a directory where a file was before", at=shown(path))
    if error.errno == errno.EISDIR:
        return Damaged("a file where a directory was before", at=shown(path))
    return _at(error, path)
