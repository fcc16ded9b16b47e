"""Places of our own that a start's sources are bound to while the runtime mounts them. Floor 3.

Only here: a path inside a volume, and what has its owners mapped or changed. Whoever writes to a source cannot exchange
it between the look and the mount. A place lies in a private mount of its own, so that it appears in no other mount
namespace. Thread-safe; a place that a killed start left is taken down by `clear`.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import host, hostmounts
from engine.errors import InvalidArgument, NotFound
from engine.runtimes import idmap
from engine.runtimes.users import Identity

RESOLVE = host.RESOLVE_IN_ROOT
O_PATH = getattr(os, "O_PATH", os.O_RDONLY)


class Staging:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def below(self, data: Path, name: str, subpath: str) -> Iterator[Path]:
        """What `subpath` names inside a volume, links resolved within it. NotFound, InvalidArgument."""
        with host.directory_fd(data) as root:
            try:
                fd = host.open_in_root(root, subpath, O_PATH, resolve=RESOLVE)
            except FileNotFoundError as error:
                raise NotFound(f"volumes: volume {name} has no {subpath}", at=subpath) from error
            except OSError as error:
                raise InvalidArgument(f"volumes: {subpath} in volume {name}: {error.strerror}", at=subpath) from error
        with self._bound(fd, lambda place: hostmounts.bind(Path(f"/proc/self/fd/{fd}"), place)) as place:
            yield place

    @contextmanager
    def mapped(self, source: Path, wanted: bool | str, user: Identity, name: str) -> Iterator[Path]:
        """`source` with its owners mapped (MountSpec.idmap). Unsupported names `name` where that cannot be."""
        fd = os.open(source, O_PATH | os.O_CLOEXEC)
        with self._bound(fd, lambda place: idmap.bind(fd, place, wanted, user, name)) as place:
            yield place

    @contextmanager
    def held(self, source: Path, check: Callable[[str], None], *, shared: bool = False) -> Iterator[Path]:
        """What `source` is now, whatever takes its name meanwhile. `check` is called with its real path. `shared`: what
        is mounted in the one is seen in the other."""
        fd = os.open(source, O_PATH | os.O_CLOEXEC)
        try:
            check(os.path.realpath(f"/proc/self/fd/{fd}"))
        except BaseException:
            os.close(fd)
            raise
        with self._bound(fd, lambda place: idmap.bind_tree(fd, place, None, shared=shared)) as place:
            yield place

    @contextmanager
    def _bound(self, fd: int, bind: Callable[[Path], None]) -> Iterator[Path]:
        """A place where `bind` bound what `fd`, which is closed, is: a directory or a file."""
        try:
            above = Path(tempfile.mkdtemp(dir=self._directory))
        except OSError:
            os.close(fd)
            raise
        place = above / "source"
        try:
            try:
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    place.mkdir()
                else:
                    place.touch()
                hostmounts.bind(above, above)
                hostmounts.mount("none", above, "none", hostmounts.MS_PRIVATE)
                bind(place)
            finally:
                os.close(fd)
            yield place
        finally:
            _take_down(above)

    def clear(self) -> None:
        """After a restart: take down what a start that was killed left."""
        for above in self._directory.iterdir():
            _take_down(above)


def _take_down(above: Path) -> None:
    """Private first: what is shared with a source would be taken down there, too."""
    for point in (Path(os.path.realpath(above / "source")), Path(os.path.realpath(above))):
        while host.LINUX and hostmounts.is_mounted(point):
            hostmounts.mount("none", point, "none", hostmounts.MS_REC | hostmounts.MS_PRIVATE)
            hostmounts.unmount(point)
    host.remove_tree(above)
