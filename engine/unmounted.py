"""A container's root file system on a host that cannot mount it (macOS), before its machine has it. Floor 2.

Only here: a new disk (disks.py) made without a mount, and an *outline* of the root file system: a directory with the
few files a start looks up, users and groups. What the container changed of them is read by debugfs (e2fsprogs) from its
disk, mended before. Everything else is the guest's: its agent makes mount points and directories.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine import host
from engine.errors import Busy, RuntimeFailure, Unsupported
from engine.mounts import RootfsMounts
from engine.programs import advice, find, run_helper
from engine.runtimes.users import MAX_FILE
from engine.runtimes.vm.disks import UPPER_SIZE, check_upper, grow_upper, make_upper
from engine.store.trees import Tree

NOT_SHOWN = "this host cannot mount what a container has while it does not run"
HINT = "start it: while it runs its own agent serves its files"
LOOKED_UP = ("etc/passwd", "etc/group")
SECONDS = 30.0  # for debugfs
PIECE = 1 << 20


class Unmounted(RootfsMounts):
    """Of a host that mounts nothing."""

    shows = False

    def _adopt(self) -> None:
        """Nothing can be left."""

    @staticmethod
    def supported() -> None:
        raise Unsupported(NOT_SHOWN, hint=HINT)

    def upper(self, id: str) -> Path:
        if self.has_disk(id):
            raise Unsupported(NOT_SHOWN, hint=HINT)
        return super().upper(id)

    def use_disk(self, id: str, chain_id: str = "", size: int | None = UPPER_SIZE) -> bool:
        disk, size = self._disk(id), size or UPPER_SIZE
        if disk.exists() and disk.stat().st_size >= size:
            return False
        with self._lock(id):
            if disk.exists():
                grow_upper(disk, size)
                return False
            disk.parent.mkdir(exist_ok=True, mode=0o700)
            aside = disk.parent / "filling.ext4"
            aside.unlink(missing_ok=True)
            make_disk(aside, size, self._trees.open(chain_id))
            os.rename(aside, disk)
            host.fsync_dir(disk.parent)
            return True

    @contextmanager
    def only_image(self, chain_id: str, id: str = "") -> Iterator[Path]:
        """The outline of the container's root file system."""
        with self._lock(id):
            place = outline(self._trees.open(chain_id), self._disk(id), self._disk(id).parent / "outline")
        yield place

    def lay_out(self, chain_id: str, rootfs: Path, target: str) -> None:
        """What the image has at `target`, for a volume that is new, in the outline `rootfs`."""
        tree = self._trees.open(chain_id)
        with suppress(KeyError):
            write_out(tree, tree.lookup(target.strip("/").encode()), rootfs / target.strip("/"))

    def forget(self, id: str) -> None:
        self.given(id)
        with self._guard:
            self._locks.pop(id, None)


def make_disk(path: Path, size: int, tree: Tree) -> None:
    """A new disk, with an empty upper directory that has mode and owner of the tree's root."""
    make_upper(path, size)
    root = tree.stat(tree.root)
    commands = ["mkdir upper", "mkdir work", f"sif upper mode {stat.S_IFDIR | root.mode & 0o7777:#o}"]
    commands += [f"sif upper {field} {value}" for field, value in (("uid", root.uid), ("gid", root.gid))]
    _debugfs(path, ["-w", "-f", "-"], "\n".join(commands) + "\n")
    said = _debugfs(path, ["-R", "stat upper"])
    if b"Type: directory" not in said or b"Type: directory" not in _debugfs(path, ["-R", "stat work"]):
        raise RuntimeFailure(f"the container's disk could not be filled: {said.decode(errors='replace')[:300]}")


def outline(tree: Tree, disk: Path, place: Path) -> Path:
    """`place`, made anew. Busy while a guest has the disk."""
    host.remove_tree(place)
    (place / "etc").mkdir(parents=True)
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("its virtual machine has the disk", hint="stop the container first") from None
        check_upper(disk)
        for name in LOOKED_UP:
            (place / name).write_bytes(_file(tree, disk, name))
    finally:
        os.close(fd)
    return place


def write_out(tree: Tree, nid: int, place: Path) -> None:
    """A directory of a tree, made at `place` by whoever runs this: modes, times and links are the tree's, owners are
    not, and there are no device nodes."""
    info = tree.stat(nid)
    if not stat.S_ISDIR(info.mode):
        return
    place.mkdir(parents=True, exist_ok=True)
    for name, child, _ in tree.readdir(nid):
        here, about = place / os.fsdecode(name), tree.stat(child)
        if stat.S_ISDIR(about.mode):
            write_out(tree, child, here)
        elif os.path.lexists(here):  # the container's own, looked up before
            continue
        elif stat.S_ISLNK(about.mode):
            here.symlink_to(os.fsdecode(tree.readlink(child)))
        elif stat.S_ISREG(about.mode):
            with open(here, "xb") as file:
                for at in range(0, about.size, PIECE):
                    file.write(tree.pread(child, min(PIECE, about.size - at), at))
            here.chmod(stat.S_IMODE(about.mode))
            os.utime(here, ns=(about.mtime_ns, about.mtime_ns))
    place.chmod(stat.S_IMODE(info.mode) | stat.S_IRWXU)


def _file(tree: Tree, disk: Path, name: str) -> bytes:
    """A regular file as the container has it; empty when there is none."""
    about = _debugfs(disk, ["-R", f"stat upper/{name}"])
    if b"Type: regular" in about:
        return _debugfs(disk, ["-R", f"cat upper/{name}"])
    if b"Type: " in about:  # a whiteout, a link
        return b""
    try:
        nid = tree.lookup(name.encode())
    except KeyError:
        return b""
    found = tree.stat(nid)
    return bytes(tree.pread(nid, min(found.size, MAX_FILE), 0)) if stat.S_ISREG(found.mode) else b""


def _debugfs(disk: Path, options: list[str], commands: str = "") -> bytes:
    """What it prints; it ends with 0 whatever becomes of its commands."""
    program = find("debugfs")
    if program is None:
        raise Unsupported("debugfs is not installed", hint=advice("e2fsprogs"))
    try:
        code, out, said = run_helper([program, *options, str(disk)], commands.encode(), SECONDS, MAX_FILE)
    except (TimeoutError, OverflowError) as error:
        raise RuntimeFailure(f"debugfs: {error}") from error
    if code:
        raise RuntimeFailure(f"debugfs: {' '.join(said.decode(errors='replace').split())[:300]}")
    return out
