"""The disks of a container's virtual machine: the image's layers as one read-only disk, and a disk of its own to write.

Floor 2. Only here: their files below `containers/<id>/` and what the guest must know of them.

    vm/image.vmdk   a descriptor: QEMU shows the tree's EROFS image and the `data` of every layer behind one another as
                    one disk, nothing is copied, however many layers there are. The guest is told where each begins.
    vm/upper.ext4   a sparse file with an ext4 file system; upper/ and work/ in it are the overlay's

Two kernels on one file system would destroy it. So whoever has upper.ext4 holds an flock(2) on it: the guest's owner a
shared one for as long as it lives; the host, while it is mounted, an exclusive one, which the loop device itself keeps
(so it is there for whatever mounts there are, in whatever mount namespace, and outlives a killed daemon).

Sources: QEMU's block/vmdk.c (flat extents); VMware's Virtual Disk Format 1.1.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import host, hostmounts, loops, userids
from engine.errors import Busy, Damaged, InvalidArgument, RuntimeFailure, Unsupported
from engine.programs import advice, find, run_helper
from engine.volumedrivers import make_ext4

SECTOR = 512
BLOCK = 4096  # bytes: what the store's files are made of
MAX_PATH = 511  # bytes of a path in a descriptor (block/vmdk.c)
MOUNT_SECONDS = 60.0
UPPER_SIZE = 16 << 30  # bytes of a sparse upper file system, unless a quota says otherwise


@dataclass(frozen=True, slots=True)
class Part:
    start: int  # bytes
    length: int  # bytes


def describe(files: Sequence[Path], descriptor: Path) -> list[Part]:
    """Write the descriptor of a disk that is `files` behind one another: where each of them lies.

    InvalidArgument for a path the format cannot hold; Damaged for a file that is not of whole blocks; OSError.
    """
    lines = ["# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff"]
    # with an empty line before the first extent QEMU would take that twice: its sscanf skips line breaks
    lines += ['createType="twoGbMaxExtentFlat"', "# Extent description"]
    parts, at = [], 0
    for file in files:
        size = os.stat(file).st_size
        if size % BLOCK:
            raise Damaged(f"{size} bytes are no whole blocks", at=str(file))
        if '"' in str(file) or "\n" in str(file) or len(os.fsencode(file)) > MAX_PATH:
            raise InvalidArgument("QEMU cannot take the store's path: too long, or with a quotation mark", at=str(file))
        parts.append(Part(at, size))
        if size:
            lines.append(f'RW {size // SECTOR} FLAT "{file}" 0')
        at += size
    geometry = max(1, at // (16 * 63 * SECTOR))
    lines += ["# The Disk Data Base", 'ddb.virtualHWVersion = "4"', f'ddb.geometry.cylinders = "{geometry}"']
    lines += ['ddb.geometry.heads = "16"', 'ddb.geometry.sectors = "63"', 'ddb.adapterType = "ide"', ""]
    host.write_atomic(descriptor, "\n".join(lines).encode(), 0o600)
    return parts


def make_upper(path: Path, size: int = UPPER_SIZE, content: Path | None = None) -> None:
    """A new sparse file of `size` bytes with an ext4 file system (volumedrivers.make_ext4), empty or with what the
    directory `content` has."""
    # inode tables are left for the guest's kernel to zero as they come to be needed; a small journal, for a small file
    extended = ",lazy_itable_init=1,packed_meta_blocks=1,nodiscard"
    options = ("-J", "size=8", *(("-d", str(content)) if content is not None else ()))
    make_ext4(path, size, options=options, extended=extended)


def check_upper(path: Path) -> None:
    """Mend a file system that a guest left in whatever state. RuntimeFailure when that cannot be done by itself."""
    program = find("e2fsck")
    if program is None:
        raise Unsupported("e2fsck is not installed", hint=advice("e2fsprogs"))
    code, out, said = run_helper([program, "-p", str(path)], b"", 600.0, 1 << 20)
    if code & ~3:
        words = " ".join((out + said).decode(errors="replace").split())[:500]
        raise RuntimeFailure(f"the container's disk is damaged: {words}", hint=f"e2fsck -f {path}")


def grow_upper(path: Path, size: int) -> None:
    """Make the file system, which nobody has mounted, as large as `size` bytes. Busy while somebody has; a size that
    cannot be had leaves it as it was: RuntimeFailure."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    before = os.fstat(fd).st_size
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("its disk is in use and cannot grow now", hint="stop it, close its files, start it") from None
        for name, arguments, fine in (("e2fsck", ["-fp"], 3), ("resize2fs", [], 0)):
            program = find(name)
            if program is None:
                raise Unsupported(f"{name} is not installed", hint=advice("e2fsprogs"))
            if name == "resize2fs":
                os.ftruncate(fd, size)
            code, out, said = run_helper([program, *arguments, str(path)], b"", 600.0, 1 << 20)
            if code & ~fine:
                os.ftruncate(fd, before)
                words = " ".join((out + said).decode(errors="replace").split())[:500]
                raise RuntimeFailure(f"the container's disk cannot grow: {words}", at=str(path))
        os.fsync(fd)
    finally:
        os.close(fd)


def mount_upper(path: Path, point: Path) -> None:
    """Mount the file system, mended, at `point`, which is made. Busy while a guest has it.

    What a guest made of it is looked at, not run: its device nodes and setuid bits mean nothing here. Without root it
    is fuse2fs that shows it, read-only.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # a device that still has it (a mount of some process's, files that are open) has the lock, too
        found = loops.of(path)
        if found is None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    "its virtual machine has the disk", hint="stop the container first, or look inside with exec"
                ) from None
            check_upper(path)
            if userids.rootless() is not None:
                return _show_upper(path, point, fd)
            found = loops.attach(path, 0, 512, file=fd)
        device, name = found
        try:
            point.mkdir(exist_ok=True, mode=0o700)
            hostmounts.mount(name, point, "ext4", hostmounts.MS_NODEV | hostmounts.MS_NOSUID)
        finally:
            os.close(device)
    finally:
        os.close(fd)


def _show_upper(path: Path, point: Path, lock: int) -> None:
    """The file system at `point` by fuse2fs, a process that ends with the mount and holds `lock` until then.

    Read-only: an overlay takes no upper directory that is a FUSE file system, so nothing could be written in its terms.
    """
    program = find("fuse2fs")
    if program is None:
        raise Unsupported(
            "without root the disk of a virtual machine is shown by fuse2fs, which is not installed",
            hint="apt-get install fuse2fs",
        )
    point.mkdir(exist_ok=True, mode=0o700)
    argv = [program, "-o", "ro,fakeroot", str(path), str(point)]  # fakeroot: the owner of the file may see it all
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=MOUNT_SECONDS, pass_fds=[lock]
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure(f"fuse2fs has not mounted the disk within {MOUNT_SECONDS:g} s") from error
    if os.stat(point).st_dev == os.stat(point.parent).st_dev:  # its exit status is 0 in any case
        words = " ".join((done.stdout + done.stderr).decode(errors="replace").split())[:500]
        raise RuntimeFailure(f"fuse2fs: {words}")
