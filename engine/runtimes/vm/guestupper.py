"""What a running guest's container changed, read through its agent: the upper of its overlay. Floor 2.

Only here: changes.Upper over the agent's file verbs. The guest is hostile: entries are counted, paths bounded, and each
call has a deadline. Stateless, thread-safe.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator

from engine.changes import OPAQUE
from engine.errors import Busy, DeadlineExceeded, TooLarge
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.protocol import Attr, ProtocolError
from engine.walk import GONE

ROOT = "upper"
MAX_PATH = 4095
PIECE = 1 << 20
CHANGES_SECONDS = 10.0  # of listing all that is changed, for who waits at a read


def as_stat(attr: Attr) -> os.stat_result:
    """What the guest tells of a file in the words of this host."""
    seconds = [ns // 1_000_000_000 for ns in (attr.atime_ns, attr.mtime_ns, attr.ctime_ns)]
    fields = (attr.mode, attr.ino, attr.dev, attr.nlink, attr.uid, attr.gid, attr.size, *seconds)
    more = {"st_mtime_ns": attr.mtime_ns, "st_rdev": os.makedev(attr.rdev_major, attr.rdev_minor)}
    return os.stat_result(fields, more)


class GuestUpper:
    """Of the guest that `files` reaches. With `seconds` all of it must be done within that: DeadlineExceeded. `root`:
    what else of the guest is read in the same way."""

    def __init__(self, files: GuestFiles, seconds: float = 0.0, root: str = ROOT) -> None:
        self._files, self._root = files, root
        self._until = time.monotonic() + seconds if seconds else float("inf")

    def walk(
        self, limit: int, *, whole: bool = False
    ) -> Iterator[tuple[bytes, bytes, list[tuple[bytes, os.stat_result]]]]:
        """As walk.walk; in place of the descriptor the path."""
        count, pending = 0, [b""]
        while pending:
            path = pending.pop()
            entries: list[tuple[bytes, os.stat_result]] = []
            try:
                for name, attr in self._files.list(self._root, path):
                    self._in_time()
                    count += 1
                    if count > limit:
                        raise TooLarge(f"more than {limit} entries are changed")
                    entries.append((name, as_stat(attr)))
            except OSError as error:
                if error.errno in GONE or not whole:
                    continue
                raise
            entries.sort(key=lambda entry: entry[0])
            if any(one[0] == other[0] for one, other in itertools.pairwise(entries)):
                raise ProtocolError("two entries of one name")
            yield path, path, entries
            below = [path + b"/" + name if path else name for name, info in entries if info.st_mode >> 12 == 0o4]
            if whole and any(len(each) > MAX_PATH for each in below):
                raise TooLarge(f"a path is too long to be copied: {os.fsdecode(path[:80])}…")
            pending += [each for each in reversed(below) if len(each) <= MAX_PATH]

    def _in_time(self) -> None:
        if time.monotonic() > self._until:
            raise DeadlineExceeded("the guest takes too long to tell what it changed", hint="commit it, or stop it")

    def opaque(self, here: bytes) -> bool:
        try:
            return OPAQUE in self._files.xattr_names(self._root, here) and self._xattr(here, OPAQUE) == b"y"
        except OSError:
            return False

    def empty(self, here: bytes, name: bytes) -> bool:
        return next(iter(self._files.list(self._root, here + b"/" + name if here else name)), None) is None

    def _xattr(self, path: bytes, name: bytes) -> bytes:
        return self._files.call("GETXATTR", {"root": self._root, "path": path, "name": name}).need("value")

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        out: dict[bytes, bytes] = {}
        for name in sorted(self._files.xattr_names(self._root, path)):
            try:
                out[name] = self._xattr(path, name)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
        return out

    def readlink(self, path: bytes) -> bytes:
        return self._files.call("READLINK", {"root": self._root, "path": path}).need("target")

    def body(self, path: bytes, size: int) -> Iterator[bytes]:
        """Its first `size` bytes. Busy when there are fewer."""
        file = self._files.open(self._root, path, "r")
        try:
            offset = 0
            while offset < size:
                piece = file.read(min(PIECE, size - offset), offset)
                if not piece:
                    raise Busy("a file became shorter while it was read", at=os.fsdecode(path), hint="try again")
                offset += len(piece)
                yield piece
        finally:
            file.close()
