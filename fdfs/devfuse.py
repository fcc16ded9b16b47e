"""Immutable trees over /dev/fuse itself: the data plane's transport on Linux as root. Floor 6.

Only here: the FUSE protocol as the kernel speaks it (include/uapi/linux/fuse.h, 7.31 and later), for trees that never
change. What libfuse 2 cannot say and this does: `opendir` answered ENOSYS, so that the kernel keeps whole directories
and asks no more; readdirplus, so that `find -ls` needs no lookups; per-entry lifetimes of hours. A node's number is the
tree's slot and the EROFS nid in it: nothing is looked up by path, nothing is remembered per file, FORGET is free.

One thread. Requests are answered in order; every answer comes from mmaps or one pread.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine import host
from fdfs.rootfs import PREFIX

if TYPE_CHECKING:
    from engine.store.tree import Tree
    from fdfs.data import Forest

log = logging.getLogger(__name__)

LIFETIME = 12 * 3600  # seconds the kernel may believe names and attributes
SLOT = 40  # bits of a nid in a node number
ROOT = 1
MAX_SLOTS = 1 << 23
BUFFER = (1 << 20) + (64 << 10)
MAX_PAGES = 256

# opcodes
LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, GETXATTR, LISTXATTR, INIT, OPENDIR, READDIR = (
    1, 2, 3, 5, 14, 15, 17, 22, 23, 26, 27, 28,
)  # fmt: skip
DESTROY, BATCH_FORGET, READDIRPLUS, INTERRUPT = 38, 42, 44, 36

# init flags
ASYNC_READ, BIG_WRITES, AUTO_INVAL, READDIRPLUS_OK, READDIRPLUS_AUTO = 1 << 0, 1 << 5, 1 << 12, 1 << 13, 1 << 14
PARALLEL_DIROPS, NO_OPEN, MAX_PAGES_OK, CACHE_SYMLINKS, NO_OPENDIR = 1 << 18, 1 << 17, 1 << 22, 1 << 23, 1 << 24
POSIX_ACL = 1 << 20  # the kernel keeps "has no ACL" per file, which `ls -l` asks of every one

_IN = struct.Struct("<IIQQIIII")  # len opcode unique node uid gid pid padding
_OUT = struct.Struct("<IiQ")  # len error unique
_ENTRY = struct.Struct("<QQQQII")  # node generation entry_valid attr_valid nsecs
_ATTR = struct.Struct(
    "<QQQQQQIIIIIIIIII"
)  # ino size blocks atime mtime ctime nsecs mode nlink uid gid rdev blksize flags
_READ = struct.Struct("<QQI")  # fh offset size
_XATTR = struct.Struct("<II")  # size padding
_DIRENT = struct.Struct("<QQII")  # ino offset namelen type
_STATFS = struct.Struct("<QQQQQIIII24x")
_NO_ENTRY = bytes(_ENTRY.size + _ATTR.size)
_LIFE = struct.pack("<QII", LIFETIME, 0, 0)


class Connection:
    """A mount at `target` serving `forest`; `xattrs(tree, nid, chain)` are those shown. `serve` until unmounted."""

    def __init__(self, forest: Forest, target: Path, xattrs: Callable[[Tree, int, bytes], dict[bytes, bytes]]) -> None:
        self._forest, self._xattrs = forest, xattrs
        self._slots: list[bytes] = [b""]  # slot -> hex chain id; 0 is the root
        self._known: dict[bytes, int] = {}
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        data = f"fd={self._fd},rootmode=40555,user_id=0,group_id=0,allow_other,default_permissions"
        flags = host.MS_RDONLY | host.MS_NOSUID | host.MS_NODEV
        try:
            host.mount("dutchman-data", target, "fuse.dutchman", flags, data)
        except OSError:
            os.close(self._fd)
            raise
        self._listing: tuple[int, bool, list[bytes]] | None = None  # the directory being read

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _node(self, node: int) -> tuple[Tree, int, int, int]:
        """(tree, nid, slot, what is mixed into inode numbers). KeyError for the root and what is gone."""
        slot = node >> SLOT
        if not 0 < slot < len(self._slots):
            raise KeyError(node)
        tree, mix = self._forest.get(self._slots[slot])
        return tree, node & ((1 << SLOT) - 1), slot, mix

    def _attr(self, tree: Tree, nid: int, mix: int) -> bytes:
        mode, nlink, uid, gid, size, mtime, rdev, ino, blocks = tree.stat(nid)
        seconds, nanos = divmod(mtime, 1_000_000_000)
        return _ATTR.pack(
            mix + ino, size, blocks, seconds, seconds, seconds, nanos, nanos, nanos,
            mode, nlink, uid, gid, _device(rdev), 4096, 0,
        )  # fmt: skip

    def _entry(self, tree: Tree, nid: int, slot: int, mix: int) -> bytes:
        return _ENTRY.pack(slot << SLOT | nid, 0, LIFETIME, LIFETIME, 0, 0) + self._attr(tree, nid, mix)

    def _root_attr(self) -> bytes:
        return _ATTR.pack(ROOT, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o555, 2, 0, 0, 0, 4096, 0)

    # --- requests: bytes after the header in, bytes after the header out --------------------------------------------

    def _lookup(self, node: int, body: bytes) -> bytes:
        name = body.rstrip(b"\0")
        if node == ROOT:
            tree, mix = self._forest.get(name)
            slot = self._known.get(name)
            if slot is None:
                if len(self._slots) >= MAX_SLOTS:
                    raise OSError(errno.ENFILE, "too many trees")
                slot = self._known[name] = len(self._slots)
                self._slots.append(name)
            return self._entry(tree, tree.root, slot, mix)
        tree, nid, slot, mix = self._node(node)
        return self._entry(tree, tree.child(nid, name), slot, mix)

    def _getattr(self, node: int, body: bytes) -> bytes:
        if node == ROOT:
            return _LIFE + self._root_attr()
        tree, nid, _, mix = self._node(node)
        return _LIFE + self._attr(tree, nid, mix)

    def _readlink(self, node: int, body: bytes) -> bytes:
        tree, nid, _, _ = self._node(node)
        return tree.readlink(nid)

    def _unsupported(self, node: int, body: bytes) -> bytes:
        raise OSError(errno.ENOSYS, "")  # the kernel stops asking, and keeps pages and directories

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = _READ.unpack_from(body)
        tree, nid, _, _ = self._node(node)
        fd, base, length = tree.extent(nid)
        size = min(size, length - offset)
        return os.pread(fd, size, base + offset) if size > 0 else b""

    def _readdir(self, node: int, body: bytes, plus: bool = False) -> bytes:
        _, offset, size = _READ.unpack_from(body)
        if node == ROOT:
            return b""
        known = self._listing
        if known is None or known[0] != node or known[1] is not plus or offset == 0:
            known = self._listing = (node, plus, self._entries(node, plus))
        out, room = [], size
        for entry in known[2][offset:]:
            room -= len(entry)
            if room < 0:
                break
            out.append(entry)
        return b"".join(out)

    def _readdirplus(self, node: int, body: bytes) -> bytes:
        return self._readdir(node, body, True)

    def _entries(self, node: int, plus: bool) -> list[bytes]:
        tree, nid, slot, mix = self._node(node)
        out = []
        for number, name in enumerate((b".", b".."), 1):
            entry = _dirent(mix + nid, number, name, stat.S_IFDIR)
            out.append(_NO_ENTRY + entry if plus else entry)
        for number, (name, child, mode) in enumerate(tree.readdir(nid), 3):
            entry = _dirent(mix + child, number, name, mode)
            out.append(self._entry(tree, child, slot, mix) + entry if plus else entry)
        return out

    def _names(self, node: int) -> dict[bytes, bytes]:
        if node == ROOT:
            return {}
        tree, nid, slot, _ = self._node(node)
        return self._xattrs(tree, nid, self._slots[slot])

    def _listxattr(self, node: int, body: bytes) -> bytes:
        return _sized(b"".join(name + b"\0" for name in self._names(node)), _XATTR.unpack_from(body)[0])

    def _getxattr(self, node: int, body: bytes) -> bytes:
        name = body[_XATTR.size :].rstrip(b"\0")
        if node != ROOT and not name.startswith(PREFIX):  # `ls -l` asks for ACLs of every file: the short way
            tree, nid, _, _ = self._node(node)
            value = tree.xattrs(nid).get(name)
        else:
            value = self._names(node).get(name)
        if value is None:
            raise OSError(errno.ENODATA, "")
        return _sized(value, _XATTR.unpack_from(body)[0])

    def _statfs(self, node: int, body: bytes) -> bytes:
        return _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)

    def _init(self, node: int, body: bytes) -> bytes:
        major, minor, readahead, offered = struct.unpack_from("<IIII", body)
        if major != 7 or minor < 31:
            raise OSError(errno.EPROTO, f"FUSE protocol {major}.{minor}")
        wanted = ASYNC_READ | READDIRPLUS_OK | READDIRPLUS_AUTO | PARALLEL_DIROPS | NO_OPEN | MAX_PAGES_OK
        wanted |= CACHE_SYMLINKS | NO_OPENDIR | POSIX_ACL
        return struct.pack(
            "<IIIIHHIIHHI28x", 7, 31, max(readahead, 1 << 20), offered & wanted, 64, 48, 1 << 20, 1, MAX_PAGES, 0, 0
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer until the mount is gone."""
        answers: dict[int, Callable[[int, bytes], bytes]] = {
            LOOKUP: self._lookup, GETATTR: self._getattr, READLINK: self._readlink, OPEN: self._unsupported,
            READ: self._read, STATFS: self._statfs, GETXATTR: self._getxattr, LISTXATTR: self._listxattr,
            INIT: self._init, OPENDIR: self._unsupported, READDIR: self._readdir, READDIRPLUS: self._readdirplus,
        }  # fmt: skip
        buffer = bytearray(BUFFER)
        view = memoryview(buffer)
        fd, header, pack = self._fd, _IN.size, _OUT.pack
        while True:
            try:
                length = os.readv(fd, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                if error.errno == errno.ENODEV:
                    return  # unmounted
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(buffer)
            if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
                continue  # there is nothing to forget, and every answer is on its way
            answer = answers.get(opcode)
            number = 0
            body = b""
            if answer is None:
                number = errno.ENOSYS
            else:
                try:
                    body = answer(node, bytes(view[header:length]))
                except KeyError:
                    number = errno.ENOENT
                except OSError as error:
                    number = error.errno or errno.EIO
                except Exception:
                    log.exception("opcode %d failed", opcode)
                    number = errno.EIO
            try:
                os.writev(fd, (pack(16 + len(body), -number, unique), body))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EINTR):  # ENOENT: the request was interrupted
                    raise
            if opcode == DESTROY:
                return


def _dirent(ino: int, number: int, name: bytes, mode: int) -> bytes:
    entry = _DIRENT.pack(ino, number, len(name), (mode >> 12) & 15) + name
    return entry + bytes(-len(entry) % 8)


def _sized(value: bytes, size: int) -> bytes:
    """An xattr answer: the size when asked for that, ERANGE when it does not fit."""
    if size == 0:
        return _XATTR.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "")
    return value


def _device(rdev: int) -> int:
    """A device number as the protocol has it (the kernel's new_encode_dev)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
