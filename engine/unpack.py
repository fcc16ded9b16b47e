"""An image tree as plain files, for an overlay to lie on where EROFS cannot be mounted: in a user namespace. Floor 2.

Only here: writing out a merged tree (whiteouts are applied already, so an overlay sees plain files). File bodies are
cloned from the layers' data where the file system can (btrfs, xfs), else copied. What an ordinary user cannot make is
left out: device nodes (containers get those of /dev bound by the runtime) and xattrs the kernel keeps for root.
Where the user has no other ids, all of it is theirs: a guest has the image itself, this is what is shown of it.
Appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

from engine import host, userids
from engine.errors import Unsupported
from engine.store.blobs import no_space
from engine.store.tree import Tree

log = logging.getLogger(__name__)

PIECE = 8 << 20
_NO_CLONE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def unpack(tree: Tree, target: Path) -> None:
    """Make the directory `target` from `tree`. NoSpace; Unsupported for an id beyond the user's subordinate ids."""
    aside = target.with_name(f".part-{target.name}")
    host.remove_tree(aside)
    try:
        _write(tree, aside)
        os.rename(aside, target)
    except OSError as error:
        host.remove_tree(aside)
        if full := no_space(error):
            raise full from error
        raise
    except BaseException:
        host.remove_tree(aside)
        raise


def _write(tree: Tree, top: Path) -> None:
    base = os.fsencode(top)
    os.mkdir(base, 0o700)
    directories = [(base, tree.root)]
    links: dict[int, bytes] = {}
    skipped = 0
    for path, nid in tree.walk():
        place = base + b"/" + path
        info = tree.stat(nid)
        if info.nlink > 1 and not stat.S_ISDIR(info.mode):
            if nid in links:
                os.link(links[nid], place, follow_symlinks=False)
                continue
            links[nid] = place
        if stat.S_ISDIR(info.mode):
            os.mkdir(place, 0o700)
            directories.append((place, nid))  # last: its times change while it is filled
            continue
        if stat.S_ISREG(info.mode):
            _body(tree, nid, place)
        elif stat.S_ISLNK(info.mode):
            os.symlink(tree.readlink(nid), place)
        elif stat.S_ISFIFO(info.mode) or stat.S_ISSOCK(info.mode):
            os.mknod(place, stat.S_IFMT(info.mode) | 0o600)
        else:
            skipped += 1
            links.pop(nid, None)
            continue
        _dress(tree, nid, place, path)
    for place, nid in reversed(directories):
        _dress(tree, nid, place, place[len(base) + 1 :])
    if skipped:
        log.info("%s: %d device nodes left out", top.name, skipped)


def _body(tree: Tree, nid: int, place: bytes) -> None:
    source, offset, size = tree.extent(nid)
    out = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < size:
            try:
                count = os.copy_file_range(source, out, min(size - done, 1 << 30), offset + done)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                count = 0
            if not count:
                piece = tree.pread(nid, min(PIECE, size - done), done)
                count = os.write(out, piece)
                if not count:
                    raise OSError(errno.EIO, "a file's body is shorter than it should be", os.fsdecode(place))
            done += count
    finally:
        os.close(out)


def _dress(tree: Tree, nid: int, place: bytes, path: bytes) -> None:
    """Owner, mode, xattrs and times, in the order in which one does not undo another."""
    info = tree.stat(nid)
    try:
        if not userids.alone():
            os.chown(place, info.uid, info.gid, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Unsupported(
            f"/{os.fsdecode(path)} belongs to {info.uid}:{info.gid}, beyond your subordinate ids",
            hint="a larger range in /etc/subuid and /etc/subgid",
        ) from error
    if not stat.S_ISLNK(info.mode):
        os.chmod(place, stat.S_IMODE(info.mode))
        for name, value in tree.xattrs(nid).items():
            with contextlib.suppress(PermissionError):  # the kernel keeps trusted. and most of security. for root
                _set(place, name, value)
    os.utime(place, ns=(info.mtime_ns, info.mtime_ns), follow_symlinks=False)


def _set(place: bytes, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(place, name, value, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # a file system without any
            raise
