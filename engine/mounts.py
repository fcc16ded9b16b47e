"""Root filesystems of containers: an overlay each, over the image's tree (treemounts.py). Floor 2.

Only here: what is mounted in containers' directories.

    run/disks/                       an empty disk, ready for the next virtual machine (blanks.py)
    containers/<id>/merged/          the overlay: lower = the tree, upper/ = what the container changed
    containers/<id>/chain            chain id of the overlay that is (or was last) mounted there
    containers/<id>/vm/disk/         of a container that has run in a virtual machine: its disk (upper.ext4 beside it),
                                     which holds what it changed; never mounted while a guest has it

Mounts outlive the daemon on purpose (containers do too). After a restart, `kill -9` included, the kernel's mount table
is the truth and `chain` says what each overlay lies on, so they are used again, not mounted twice.

Without root (in a user namespace) a disk cannot be mounted: its content is put in as it is made, and later only shown,
by fuse2fs below an overlay without an upper directory.

Threading: one lock per container; mounting one never waits for another.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engine import host, hostmounts
from engine.blanks import Blanks
from engine.errors import Busy, Unsupported
from engine.hostfiles import share
from engine.hostmounts import mounted_at
from engine.model import hex_of
from engine.runtimes.vm.disks import UPPER_SIZE, grow_upper, make_upper, mount_upper
from engine.store.trees import Trees
from engine.treecopy import copy_tree
from engine.treemounts import TreeMounts

log = logging.getLogger(__name__)

GIVE_SECONDS = 5.0  # for who just looks in, and for the kernel, to let go of a disk


class RootfsMounts:
    """The mounts of the store at `store`."""

    shows = True  # what a container has while it does not run

    def __init__(self, store: Path, trees: Trees) -> None:
        self._containers = store / "containers"
        self._trees = trees
        self._images = TreeMounts(store / "run" / "trees", trees)
        self._guard = threading.Lock()  # of the locks; never held over I/O
        self._locks: dict[str, threading.RLock] = {}  # by container id
        self._disks: set[str] = set()  # containers whose disk is mounted, as far as known
        self._lent: dict[str, int] = {}  # container id -> its disk, locked for the guest that is about to have it
        self.blanks = Blanks(store / "run" / "disks", self._make_blank)
        self._written = self._images.written  # without root, that is
        self._adopt()

    def _adopt(self) -> None:
        """Learn what an earlier daemon left mounted, and take down trees that nothing lies on."""
        users: dict[str, set[str]] = {}
        points = {point for point, _, _ in hostmounts.mounts()}
        for directory in self._containers.iterdir() if self._containers.is_dir() else ():
            if points & {os.path.abspath(directory / "vm" / "disk"), os.path.abspath(directory)}:
                self._disks.add(directory.name)
            used = self._written or os.path.abspath(directory / "merged") in points
            if used and (chain := self._chain(directory.name)):
                users.setdefault(chain, set()).add(directory.name)
        self._images.adopt(users)

    def _lock(self, key: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(key, threading.RLock())

    def _chain(self, id: str) -> str:
        """What the overlay of `id` lies (or last lay) on; '' when unknown."""
        try:
            return (self._containers / id / "chain").read_text().strip()
        except FileNotFoundError:
            return ""

    def label(self, id: str) -> str:
        """The SELinux context all files of the overlay have; '' for each its own."""
        try:
            return (self._containers / id / "label").read_text().strip()
        except FileNotFoundError:
            return ""

    def merged(self, id: str) -> Path:
        return self._containers / id / "merged"

    def upper(self, id: str) -> Path:
        """What the container changed; of one with a disk, mounted. Busy while a guest has that."""
        disk = self._disk(id)
        if not disk.exists():
            return self._containers / id / "upper"
        with self._lock(id):
            return self._mount_disk(id) / "upper"

    # --- the disk of a virtual machine ---------------------------------------------------------------------------

    def _disk(self, id: str) -> Path:
        return self._containers / id / "vm" / "upper.ext4"

    def has_disk(self, id: str) -> bool:
        """Whether what the container changes is on a disk of its own, for virtual machines."""
        return self._disk(id).exists()

    def use_disk(self, id: str, chain_id: str = "", size: int | None = UPPER_SIZE) -> bool:
        """From now on what the container changes is on a disk of its own; what it has changed moves there. One that is
        smaller than `size` bytes grows. Whether there is nothing on it."""
        disk, size = self._disk(id), size or UPPER_SIZE
        if disk.exists() and disk.stat().st_size >= size:
            return False
        with self._lock(id):
            self._release(id)
            if disk.exists():
                grow_upper(disk, size)
                return False
            place = disk.parent
            place.mkdir(exist_ok=True, mode=0o700)
            aside, old, point = place / "filling.ext4", self._containers / id / "upper", place / "disk"
            hostmounts.unmount(point)  # of one that a killed daemon was filling
            self._drop_disk(id)
            aside.unlink(missing_ok=True)
            empty = not old.exists() or not any(old.iterdir())
            if empty and chain_id and self.blanks.take(chain_id, size, aside):
                pass
            elif self._written or empty:  # without a mount it is made faster, too
                self._fill_unmounted(aside, old, chain_id, size)
            else:
                make_upper(aside, size)
                self._share(id)
                mount_upper(aside, point)
                try:
                    for name in ("upper", "work"):
                        host.remove_tree(point / name)
                        (point / name).mkdir(mode=0o755)
                    copy_tree(old, point / "upper")
                finally:
                    hostmounts.unmount_unused(point)
                    self._drop_disk(id)
            os.rename(aside, disk)  # from here on the disk counts
            host.fsync_dir(place)
            for entry in () if empty else old.iterdir():
                host.remove_tree(entry)
            return empty

    def _fill_unmounted(self, aside: Path, old: Path | None, chain_id: str, size: int) -> None:
        """A new disk with what `old` has, without a mount; the image's root directory gives it its mode and times, for
        nobody can write to it here later."""
        content = aside.with_suffix("")
        host.remove_tree(content)
        try:
            for name in ("upper", "work"):
                (content / name).mkdir(parents=True, mode=0o755)
            if old is not None and old.exists() and any(old.iterdir()):
                copy_tree(old, content / "upper")
            elif chain_id:
                with self.only_image(chain_id) as tree:
                    _copy_root(tree, content / "upper")
            make_upper(aside, size, content)
        finally:
            host.remove_tree(content)

    def _make_blank(self, path: Path, chain_id: str, size: int) -> None:
        self._fill_unmounted(path, None, chain_id, size)

    @contextmanager
    def only_image(self, chain_id: str, id: str = "") -> Iterator[Path]:
        """The image's tree, read-only, while the block runs: for container `id`, which has changed nothing."""
        if self._written and id:  # it costs more to write it out than to keep it
            with self._lock(id), self._images.locked(chain_id):
                tree = self._images.ensure(chain_id)
                host.write_atomic(self._containers / id / "chain", chain_id.encode() + b"\n")
                self._images.use(chain_id, id)
            yield tree
            return
        with self._images.look(chain_id) as tree:
            yield tree

    def _mount_disk(self, id: str) -> Path:
        """Where the container's disk is mounted. Its lock is held."""
        disk, point = self._disk(id), self._disk(id).parent / "disk"
        if not mounted_at(point):
            self._share(id)
            mount_upper(disk, point)
        self._disks.add(id)
        return point

    def _share(self, id: str) -> None:
        """Make the container's directory a mount whose events reach copies of it: what is unmounted here goes from
        other mount namespaces, too, unless they asked for private copies. Else a copy, of a process that has nothing to
        do with us, would keep the disk from the guest. See mount_namespaces(7)."""
        directory = self._containers / id
        self._disks.add(id)
        if not self._written and not hostmounts.is_mounted(directory):
            hostmounts.bind(directory, directory)
            hostmounts.mount("none", directory, "none", hostmounts.MS_SHARED)

    def give_disk(self, id: str) -> None:
        """Let go of the container's disk, so that a guest can have it. Nobody mounts it from here on until `given` says
        that the guest has it, or will not. Busy while somebody has files of it open."""
        with self._lock(id):
            self._release(id)
            busy = Busy(
                "files of its root file system are open", hint="fuser, or grep in /proc/*/mountinfo, says by whom"
            )
            until = time.monotonic() + GIVE_SECONDS
            while mounted_at(self._disk(id).parent / "disk"):  # who just looks in is soon done
                if time.monotonic() > until:
                    raise busy
                time.sleep(0.02)
                self._drop_disk(id)
            fd = os.open(self._disk(id), os.O_RDWR | os.O_CLOEXEC)
            try:
                share(fd, GIVE_SECONDS)
            except Busy:
                os.close(fd)
                raise _elsewhere(self._disk(id).parent / "disk") or busy from None
            self.given(id)
            self._lent[id] = fd

    def given(self, id: str) -> None:
        """The guest holds its disk by itself now, or does not get it. Idempotent."""
        with self._lock(id):
            if (fd := self._lent.pop(id, None)) is not None:
                os.close(fd)

    def _drop_disk(self, id: str) -> None:
        """Its lock is held. Files in it may be open: then it stays."""
        point = self._disk(id).parent / "disk"
        if mounted_at(point):
            try:
                hostmounts.unmount_unused(point)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return
        if id in self._disks and not self._written and hostmounts.is_mounted(self._containers / id):
            hostmounts.unmount(self._containers / id)
        self._disks.discard(id)

    def mounted(self, id: str) -> bool:
        return mounted_at(self.merged(id))

    @staticmethod
    def supported() -> None:
        """Unsupported, with the reason, where this process cannot mount."""
        if not host.LINUX:
            raise Unsupported("root filesystems of containers need a Linux host")
        if not host.is_root():
            raise Unsupported(
                "mounting root filesystems needs root, or subordinate ids of your own",
                hint="`dutchman doctor` says what is missing",
            )

    def ensure(self, id: str, chain_id: str, label: str | None = None) -> Path:
        """The merged root filesystem of container `id` on the tree `chain_id`, mounted. Idempotent.

        A container that moved to another image is mounted anew, its changes kept; so is one whose files get another
        SELinux context, `label` (None: as before). Unsupported where this host cannot; NotFound or Damaged from the
        tree; OSError from the kernel names the path.
        """
        hex_of(chain_id)
        merged = self.merged(id)
        with self._lock(id):
            if mounted_at(merged):
                if self._chain(id) == chain_id and label in (None, self.label(id)):
                    return merged
                self._release(id, forget=True)
            self.supported()
            directory = self._containers / id
            for name in ("upper", "work", "merged"):
                (directory / name).mkdir(mode=0o755, exist_ok=True)
            top = self._mount_disk(id) if self._disk(id).exists() else directory
            shown = self._written and top != directory  # its disk can be read, not written (disks.py)
            with self._images.locked(chain_id):
                tree = self._images.ensure(chain_id)
                if not shown and not any((top / "upper").iterdir()):
                    _copy_root(tree, top / "upper")
                host.write_atomic(directory / "chain", chain_id.encode() + b"\n")
                if label is not None and label != self.label(id):
                    host.write_atomic(directory / "label", label.encode() + b"\n")
                try:
                    if shown:
                        hostmounts.mount_overlay([top / "upper", tree], None, None, merged)
                    else:
                        hostmounts.mount_overlay([tree], top / "upper", top / "work", merged, self.label(id))
                except OSError as error:
                    self._images.leave(chain_id)
                    if error.errno in (errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM):
                        raise Unsupported(
                            f"overlay: {error.strerror} at {error.filename}",
                            hint="the store must lie on a file system an overlay can write to (ext4, xfs, btrfs)",
                        ) from error
                    raise
                self._images.use(chain_id, id)
        return merged

    def release(self, id: str) -> None:
        """Take down the overlay of `id`, and its tree when nothing else lies on it. Idempotent.

        Open files in it go on working until they are closed. Busy only when the kernel keeps it mounted.
        """
        with self._lock(id):
            self._release(id)

    def _release(self, id: str, *, forget: bool = False) -> None:
        merged = self.merged(id)
        for _ in range(8):  # something may be mounted over it; each turn detaches one
            if not mounted_at(merged):
                break
            hostmounts.unmount(merged)
        if mounted_at(merged):
            raise Busy(f"{merged} stays mounted", hint="see who mounts over it: findmnt")
        self._drop_disk(id)
        chain = self._chain(id)
        if not chain or (self._written and not forget):
            return
        self._images.left(chain, id)

    def forget(self, id: str) -> None:
        """Release `id` for good: it is removed."""
        with self._lock(id):
            self._release(id, forget=True)
            hostmounts.unmount(self._disk(id).parent / "disk")
            self._drop_disk(id)
        with self._guard:
            self._locks.pop(id, None)

    def release_all(self, keep: Container[str] = ()) -> None:
        """Take down everything but the containers whose id is in `keep` (those that run), and what they lie on."""
        ids = [id for id in self._disks | self._images.users() if id not in keep]
        with ExitStack() as stack:
            for id in ids:
                stack.callback(self.release, id)  # all are tried; the first error is raised


def _elsewhere(point: Path) -> Busy | None:
    """Whose mount namespace has a copy of the mount that was at `point`."""
    wanted = f" {point} ".encode()
    here = os.readlink("/proc/self/ns/mnt")
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            found = os.readlink(table.parent / "ns/mnt") != here and wanted in table.read_bytes()
            name = (table.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80].strip()
        except OSError:
            continue  # it ended
        if found:
            return Busy(f"process {table.parent.name} ({name}) still has its disk mounted, in a namespace of its own")
    return None


def _copy_root(tree: Path, upper: Path) -> None:
    """The overlay takes mode, owner and times of its root from `upper`: give a fresh one the image's."""
    info = os.stat(tree)
    os.chown(upper, info.st_uid, info.st_gid)
    os.chmod(upper, info.st_mode & 0o7777)
    os.utime(upper, ns=(info.st_atime_ns, info.st_mtime_ns))
