"""`dutchman cp` with a container in a running virtual machine: by its file `tar`, as one stream. Floor 7.

Only here: how that file is asked. Where it has nothing to say (the machine has ended, it is another user's), the files
in `rootfs/` are there as always: each call says whether it was done so. One thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from fdfs.cli_mount import Failure, Mount

PIECE = 1 << 20


class Machine:
    """Of the container `name`; `root` is its root directory, open."""

    def __init__(self, mount: Mount, name: str, root: int) -> None:
        self._mount, self._name, self._root = mount, name, root

    def _inside(self, directory: int) -> str | None:
        """The path of an open directory, from the container's root; None where this host does not tell."""
        try:
            root, path = (os.readlink(f"/proc/self/fd/{fd}") for fd in (self._root, directory))
        except OSError:
            return None
        return "/" + path[len(root) :].lstrip("/") if path == root or path.startswith(root + "/") else None

    def _asked(self, request: dict[str, object]) -> int | None:
        """The open file, when it takes this."""
        try:
            fd = os.open(self._mount.path("containers", self._name, "tar"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            os.write(fd, json.dumps(request).encode() + b"\n")
        except OSError:
            os.close(fd)
            return None
        return fd

    def _failure(self, error: OSError, what: str) -> Failure:
        return self._mount.failure(error, ("containers", self._name), what=what)

    # --- a tar ------------------------------------------------------------------------------------------------------

    def pack(self, here: int, name: str, shown: str, what: str, *, plain: bool = False) -> Iterator[bytes] | None:
        """`name` in the directory `here`, called `shown`."""
        inside = self._inside(here)
        path = None if inside is None else inside if name == "." else os.path.join(inside, name)
        fd = None if path is None else self._asked({"out": path, "as": shown, "plain": plain})
        return None if fd is None else self._pieces(fd, what)

    def _pieces(self, fd: int, what: str) -> Iterator[bytes]:
        try:
            while piece := os.read(fd, PIECE):
                yield piece
        except OSError as error:
            raise self._failure(error, what) from None
        finally:
            os.close(fd)

    def unpack(self, there: int, blocks: Iterable[bytes], owners: bool, merge: bool, what: str) -> bool:
        """In the directory `there`."""
        inside = self._inside(there)
        fd = None if inside is None else self._asked({"in": inside, "owners": owners, "merge": merge})
        if fd is None:
            return False
        with ExitStack() as stack:
            stack.callback(os.close, fd)
            for block in blocks:
                view = memoryview(block)
                while view:
                    try:
                        view = view[os.write(fd, view[:PIECE]) :]
                    except OSError as error:
                        raise self._failure(error, what) from None
            try:
                os.fsync(fd)
            except OSError as error:
                raise self._failure(error, what) from None
        return True

    # --- directories, as cp copies them: no xattrs, hard links are files of their own --------------------------------

    def fill(self, there: int, here: int, name: str, new: str, owners: bool, what: str) -> bool:
        """The directory `name` in `here` becomes `new` in `there`, which is in the machine."""
        from engine.images import tarout
        from fdfs import cli_tar

        entries = cli_tar.members(here, os.fsencode(name), os.fsencode(new), plain=True)
        return self.unpack(there, tarout.archive(entries), owners, True, what)

    def fetch(self, here: int, name: str, there: int, new: str, owners: bool, what: str) -> bool:
        """The directory `name` in `here`, which is in the machine, becomes `new` in `there`."""
        from engine.errors import EngineError
        from engine.volumetar import unpack_stream

        pieces = self.pack(here, name, new, what, plain=True)
        if pieces is None:
            return False
        try:
            unpack_stream(pieces, there, owners=owners, merge=True)
        except EngineError as error:
            raise Failure(f"{what}: {error.reason}" + (f" ({error.at})" if error.at else "")) from None
        return True
