"""`dutchman cp NAME:PATH -` and `cp - NAME:PATH`: the same files as a tar on a pipe.

Floor 7. Only here: what the archive's names are. Files are read and made below open directories, links not followed, by
the engine's own reader and writer of archives. One thread.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from engine.errors import EngineError
from engine.images import tarout
from engine.images.upperlayer import entry
from engine.store.inflate import inflate
from engine.volumetar import unpack_stream
from engine.walk import walk
from fdfs.cli_machine import Machine
from fdfs.cli_mount import Failure

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PIECE = 1 << 20

Entry = tuple[tarout.Member, Iterable[bytes]]


def write(here: int, name: str, shown: str, what: str, machine: Machine | None) -> None:
    """What is `name` in the directory `here`, as a tar on stdout in which it is called `shown`."""
    if sys.stdout.isatty():
        raise Failure(f"{what}: an archive is nothing for a terminal", "hint: > FILE.tar, or a pipe")
    try:
        pieces = machine.pack(here, name, shown, what) if machine else None
        for piece in pieces or tarout.archive(members(here, os.fsencode(name), os.fsencode(shown))):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except EngineError as error:
        raise Failure(f"{what}: {error}") from None


class _Separate(dict[tuple[int, int], bytes]):
    """Of hard links: each is a file of its own."""

    def __setitem__(self, key: tuple[int, int], value: bytes) -> None:
        pass


def members(here: int, name: bytes, shown: bytes, *, plain: bool = False) -> Iterator[Entry]:
    """What is `name` in the directory `here`, called `shown`. `plain`: without xattrs and hard links."""
    links: dict[tuple[int, int], bytes] = _Separate() if plain else {}
    with ExitStack() as stack:
        info = os.stat(name, dir_fd=here, follow_symlinks=False)
        if not stat.S_ISDIR(info.st_mode):
            member, body = entry(here, name, info, links)
            yield replace(member, name=shown), body
            return
        top = os.open(name, DIRECTORY, dir_fd=here)
        stack.callback(os.close, top)
        waiting: dict[bytes, Entry] = {}
        yield tarout.Member(shown, tarout.DIRECTORY, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, 0,
                            info.st_mtime_ns), ()  # fmt: skip
        for path, _, entries in walk(top, whole=True):
            if path in waiting:
                yield waiting.pop(path)
            for below, info in entries:
                if stat.S_ISSOCK(info.st_mode):
                    continue
                whole = path + b"/" + below if path else below
                member, body = entry(top, whole, info, links)
                link = shown + b"/" + member.linkname if member.kind == tarout.HARDLINK else member.linkname
                made = replace(member, name=shown + b"/" + whole, linkname=link), body
                if plain:
                    made = replace(made[0], xattrs={}), body
                if stat.S_ISDIR(info.st_mode):
                    waiting[whole] = made  # right before what is in it, which the walk brings later
                else:
                    yield made


def read(there: int, what: str, machine: Machine | None) -> None:
    """Make what the tar on stdin holds, compressed or not, in the directory `there`."""
    if sys.stdin.isatty():
        raise Failure(f"{what}: a tar is expected on standard input", "hint: < FILE.tar, or a pipe")
    blocks, owners = iter(lambda: os.read(0, PIECE), b""), os.geteuid() == 0
    try:
        if machine is None or not machine.unpack(there, inflate(blocks), owners, False, what):
            unpack_stream(blocks, there, owners=owners)
    except EngineError as error:
        where = f" ({error.at})" if error.at and error.at not in error.reason else ""
        raise Failure(f"{what}: {error.reason}{where}") from None
