"""Read one merged tree: mmap and struct over an EROFS image, no Python object per file.

Only here: the reader. Hot paths (stat, lookup, readdir run once per FUSE getattr) are a few microseconds and never
take a lock or touch SQLite. The image is treated as possibly damaged: what is not there is KeyError, what makes no
sense is `Damaged`; nothing loops or reads outside the map. Thread-safe.

Source: Linux fs/erofs/erofs_fs.h, dir.c, namei.c, xattr.c.
"""

from __future__ import annotations

import mmap
import os
import stat as stat_module
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import Damaged
from engine.store import erofs
from engine.store.entries import decode_rdev
from engine.store.erofs import BLOCK, CHUNK_BASED, DIRENT_SIZE, FLAT_INLINE, FLAT_PLAIN

_INODE = struct.Struct("<HHHHQIIIIQII")
_DIRENT = erofs.DIRENT
_NAMEOFF = struct.Struct("<8xH")
_NID = struct.Struct("<Q")
_CACHED_PATHS = 8192
_MAX_DIR = 1 << 32  # bytes of one directory
_IFMT, _IFDIR, _IFREG, _IFLNK = 0o170000, stat_module.S_IFDIR, stat_module.S_IFREG, stat_module.S_IFLNK
_MODE_BITS = {number: kind for kind, number in erofs.FILE_TYPES.items()}
_PREFIXES = {1: b"user.", 2: erofs.NAMELESS[0], 3: erofs.NAMELESS[1], 4: b"trusted.", 6: b"security."}


class Stat(NamedTuple):
    """As stat(2); `rdev` in the host's encoding, `ino` is the nid (what the kernel's EROFS shows), blocks of 512."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int
    ino: int
    blocks: int


class Provenance(NamedTuple):
    """Where an inode comes from: diff_id of the layer, digest of the body (sha256:… or "" without one)."""

    layer: str
    digest: str


class Handle:
    """An open file that lives as long as somebody refers to it."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Damaged("an empty file where a tree is stored", at=str(path))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Tree:
    """The tree in the directory `path` (`erofs` and `prov`); `open_data` opens a layer's data by diff_id."""

    def __init__(self, path: Path, open_data: Callable[[str], Handle]) -> None:
        self._map = _map(path / "erofs")
        self._prov = _map(path / "prov")
        self._open_data = open_data
        self._at = str(path)
        view = self._map
        if len(view) < 2 * BLOCK or len(view) % BLOCK:
            raise Damaged("the tree's image is truncated", at=self._at)
        fields = erofs.SUPER.unpack_from(view, erofs.SUPER_OFFSET)
        magic, checksum, blkszbits, root, blocks, meta_block = fields[0], fields[1], fields[3], fields[5], *fields[9:11]
        head = bytearray(view[erofs.SUPER_OFFSET : BLOCK])
        head[4:8] = bytes(4)
        if magic != erofs.MAGIC or blkszbits != 12 or erofs.crc32c(bytes(head)) != checksum:
            raise Damaged("the tree's superblock is damaged", at=self._at)
        if blocks * BLOCK != len(view) or meta_block * BLOCK >= len(view):
            raise Damaged("the tree's image is truncated", at=self._at)
        self._meta = meta_block * BLOCK
        self._end = len(view)
        self.root: int = root
        count = fields[16]
        if (erofs.FIRST_SLOT + count) * 128 > self._meta:
            raise Damaged("the tree's device table is damaged", at=self._at)
        self.devices: list[str] = []
        for number in range(count):
            tag, _, _ = erofs.DEVICE.unpack_from(view, (erofs.FIRST_SLOT + number) * 128)
            self.devices.append("sha256:" + tag.decode("ascii", "replace"))
        self._handles: list[Handle | None] = [None] * count
        self._paths: dict[bytes, int] = {}
        self._dirs: dict[int, tuple[int, int, int]] = {}
        self._layers, self._inodes, self._prov_at = self._open_prov()
        self._dir(root)

    def _open_prov(self) -> tuple[list[str], int, int]:
        prov = self._prov
        if len(prov) < erofs.PROV_HEAD.size:
            raise Damaged("the tree's provenance is truncated", at=self._at)
        magic, layers, inodes = erofs.PROV_HEAD.unpack_from(prov, 0)
        start = erofs.PROV_HEAD.size + 32 * layers
        if magic != erofs.PROV_MAGIC or start + erofs.PROV.size * inodes != len(prov):
            raise Damaged("the tree's provenance is damaged", at=self._at)
        head = erofs.PROV_HEAD.size
        return ["sha256:" + prov[head + 32 * n : head + 32 * n + 32].hex() for n in range(layers)], inodes, start

    # --- inodes --------------------------------------------------------------------------------------------------

    def _inode(self, nid: int) -> tuple[int, ...]:
        """The fields of an inode. KeyError outside the image."""
        at = self._meta + nid * 32
        if nid < 0 or at + 64 > self._end:
            raise KeyError(nid)
        fields: tuple[int, ...] = _INODE.unpack_from(self._map, at)
        return fields

    def stat(self, nid: int) -> Stat:
        form, _, mode, _, size, union, _, uid, gid, seconds, nanoseconds, nlink = self._inode(nid)
        if form not in (1, 5, 9):
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        rdev = 0
        if mode & 0o130000 == 0o020000:  # character and block devices
            rdev = os.makedev(*decode_rdev(union))
        return Stat(
            mode, nlink, uid, gid, size, seconds * 1_000_000_000 + nanoseconds, rdev, nid, (size + 4095 >> 12) << 3
        )

    def _inline_at(self, nid: int, icount: int) -> int:
        at: int = self._meta + nid * 32 + 64 + ((icount - 1) * 4 + 12 if icount else 0)
        return at

    def _content(self, nid: int, fields: tuple[int, ...]) -> tuple[int, int, int]:
        """Of a directory or symlink in the image: (offset of its whole blocks, offset of its tail, size)."""
        form, icount, size, union = fields[0], fields[1], fields[4], fields[5]
        layout = form >> 1
        tail_blocks = size >> 12
        plain = union * BLOCK
        if layout == FLAT_INLINE:
            tail = self._inline_at(nid, icount)
            if size and size & 4095 == 0:
                raise Damaged(f"inode {nid} is damaged", at=self._at)
        elif layout == FLAT_PLAIN:
            tail = plain + tail_blocks * BLOCK
        else:
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        if (
            size > _MAX_DIR
            or tail + (size & 4095) > self._end
            or (tail_blocks and plain + tail_blocks * BLOCK > self._end)
        ):
            raise Damaged(f"inode {nid} lies outside the image", at=self._at)
        return plain, tail, size

    def _dir(self, nid: int) -> tuple[int, int, int]:
        known = self._dirs.get(nid)
        if known is not None:
            return known
        fields = self._inode(nid)
        if fields[2] & _IFMT != _IFDIR:
            raise KeyError(nid)
        content = self._content(nid, fields)
        if len(self._dirs) >= _CACHED_PATHS:
            self._dirs.clear()
        self._dirs[nid] = content
        return content

    # --- names ---------------------------------------------------------------------------------------------------

    def lookup(self, path: bytes) -> int:
        """nid of a path from the root (with or without a leading slash); symlinks are not followed. KeyError."""
        path = path.strip(b"/")
        if not path:
            return self.root
        known = self._paths.get(path)
        if known is not None:
            return known
        cut = path.rfind(b"/")
        if cut < 0:
            parent, name = self.root, path
        else:
            parent, name = self.lookup_dir(path[:cut]), path[cut + 1 :]
        return self.child(parent, name)

    def lookup_dir(self, path: bytes) -> int:
        """`lookup` of a directory, remembered: siblings are usually asked for one after another. KeyError."""
        known = self._paths.get(path)
        if known is not None:
            return known
        nid = self.root
        for name in path.split(b"/"):
            if name:
                nid = self.child(nid, name)
        if self._inode(nid)[2] & _IFMT != _IFDIR:
            raise KeyError(path)
        if len(self._paths) >= _CACHED_PATHS:
            self._paths.clear()
        self._paths[path] = nid
        return nid

    def child(self, nid: int, name: bytes) -> int:
        """nid of `name` in the directory `nid`; KeyError. Binary search over blocks, then within one."""
        plain, tail, size = self._dir(nid)
        view = self._map
        if name == b"." or name == b"..":
            raise KeyError(name)
        try:
            at, length = tail, size
            if size > BLOCK:
                low, high = 0, size - 1 >> 12
                while low < high:  # the last block whose first name is not above
                    middle = low + high + 1 >> 1
                    first, used = self._block(plain, tail, size, middle)
                    if self._first_name(first, used) <= name:
                        low = middle
                    else:
                        high = middle - 1
                at, length = self._block(plain, tail, size, low)
            elif size == BLOCK:
                at = plain
            (nameoff,) = _NAMEOFF.unpack_from(view, at)
            count = nameoff // DIRENT_SIZE
            if nameoff % DIRENT_SIZE or count <= 0 or nameoff > length:
                raise Damaged(f"directory {nid} is damaged", at=self._at)
            low, high = 0, count - 1
            unpack = _NAMEOFF.unpack_from
            while low <= high:
                middle = low + high >> 1
                entry = at + middle * DIRENT_SIZE
                (start,) = unpack(view, entry)
                end = unpack(view, entry + DIRENT_SIZE)[0] if middle + 1 < count else length
                found = view[at + start : at + end]
                if middle + 1 == count and length == BLOCK:
                    found = found.rstrip(b"\0")
                if found == name:
                    return int(_NID.unpack_from(view, entry)[0])
                if found < name:
                    low = middle + 1
                else:
                    high = middle - 1
        except struct.error as error:
            raise Damaged(f"directory {nid} is damaged", at=self._at) from error
        raise KeyError(name)

    @staticmethod
    def _block(plain: int, tail: int, size: int, number: int) -> tuple[int, int]:
        """(offset, bytes) of one directory block."""
        left = size - number * BLOCK
        if left >= BLOCK:
            return plain + number * BLOCK, BLOCK
        return tail, left

    def _first_name(self, at: int, length: int) -> bytes:
        (start,) = _NAMEOFF.unpack_from(self._map, at)
        end = _NAMEOFF.unpack_from(self._map, at + DIRENT_SIZE)[0] if start > DIRENT_SIZE else length
        return self._map[at + start : at + min(end, length)].rstrip(b"\0")

    def readdir(self, nid: int) -> list[tuple[bytes, int, int]]:
        """(name, nid, file type bits of the mode) in byte order, without . and ..; KeyError when not a directory."""
        plain, tail, size = self._dir(nid)
        view = self._map
        out: list[tuple[bytes, int, int]] = []
        kinds = _MODE_BITS
        for number in range(-(-size // BLOCK)):
            at, length = self._block(plain, tail, size, number)
            block = view[at : at + length]
            if length < DIRENT_SIZE:
                raise Damaged(f"directory {nid} is damaged", at=self._at)
            (names,) = _NAMEOFF.unpack_from(block, 0)
            if names % DIRENT_SIZE or not DIRENT_SIZE <= names <= length:
                raise Damaged(f"directory {nid} is damaged", at=self._at)
            entries = list(_DIRENT.iter_unpack(block[:names]))
            last = len(entries) - 1
            for position, (child, start, kind, _) in enumerate(entries):
                name = block[start : entries[position + 1][1]] if position < last else block[start:].rstrip(b"\0")
                if name != b"." and name != b"..":
                    if not name or b"/" in name or start < names:
                        raise Damaged(f"directory {nid} is damaged", at=self._at)
                    out.append((name, child, kinds.get(kind, 0)))
        return out

    def walk(self, nid: int | None = None, path: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """(path, nid) of everything below, parents first. Damaged when directories form a loop."""
        stack = [(path, self.root if nid is None else nid)]
        seen: set[int] = set()
        while stack:
            path, here = stack.pop()
            if here in seen:
                raise Damaged(f"directory {here} is its own ancestor", at=self._at)
            seen.add(here)
            for name, child, kind in self.readdir(here):
                below = path + b"/" + name if path else name
                yield below, child
                if kind == _IFDIR:
                    stack.append((below, child))

    # --- content -------------------------------------------------------------------------------------------------

    def readlink(self, nid: int) -> bytes:
        """A symlink's target. KeyError when it is not a symlink."""
        fields = self._inode(nid)
        if fields[2] & _IFMT != _IFLNK:
            raise KeyError(nid)
        _, tail, size = self._content(nid, fields)
        if size >= BLOCK:
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        return self._map[tail : tail + size]

    def extent(self, nid: int) -> tuple[int, int, int]:
        """(fd, offset, size) of a regular file's body; fd is -1 for an empty file. The fd is valid while this Tree
        is referenced. KeyError when it is not a regular file, Damaged when its data is gone."""
        form, icount, mode, _, size, union, *_ = self._inode(nid)
        if mode & _IFMT != _IFREG:
            raise KeyError(nid)
        if not size:
            return -1, 0, 0
        if form >> 1 != CHUNK_BASED or size > BLOCK << (union & 31):
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        at = self._inline_at(nid, icount) + 7 & ~7
        if at + 8 > self._end:
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        _, device, first = erofs.CHUNK.unpack_from(self._map, at)
        if not 0 < device <= len(self.devices):
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        handle = self._handles[device - 1]
        if handle is None:
            try:
                handle = self._handles[device - 1] = self._open_data(self.devices[device - 1])
            except FileNotFoundError as error:
                raise Damaged("the layer's data is gone", at=self.devices[device - 1]) from error
        return handle.fd, first * BLOCK, size

    def pread(self, nid: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of a regular file from `offset`; short at its end."""
        fd, base, length = self.extent(nid)
        count = min(size, length - offset)
        if count <= 0 or offset < 0:
            return b""
        data = os.pread(fd, count, base + offset)
        while len(data) < count:
            more = os.pread(fd, count - len(data), base + offset + len(data))
            if not more:
                raise Damaged("the layer's data is truncated", at=self._at)
            data += more
        return data

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """The file's own extended attributes (provenance is not among them)."""
        icount = self._inode(nid)[1]
        if not icount:
            return {}
        start = self._meta + nid * 32 + 64
        end = start + 12 + (icount - 1) * 4
        if end > self._end:
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        out: dict[bytes, bytes] = {}
        at = start + 12
        while at + 4 <= end:
            name_len, index, value_len = erofs.XATTR.unpack_from(self._map, at)
            value = at + 4 + name_len
            prefix = _PREFIXES.get(index)
            if prefix is None or value + value_len > end:
                raise Damaged(f"the xattrs of inode {nid} are damaged", at=self._at)
            out[prefix + self._map[at + 4 : value]] = self._map[value : value + value_len]
            at = value + value_len + 3 & ~3
        return out

    def identity(self, nid: int) -> tuple[int, int, int, int, int, bytes, bool]:
        """What makes an entry what it is: (mode, uid, gid, size, rdev as stored, sha256 of its body or b"", whether it
        has xattrs). No times; no size of a directory; of a symlink the length of its target."""
        form, icount, mode, _, size, union, ordinal, uid, gid, *_ = self._inode(nid)
        kind = mode & _IFMT
        if form not in (1, 5, 9) or not 0 < ordinal <= self._inodes:
            raise Damaged(f"inode {nid} is damaged", at=self._at)
        digest, rdev = b"", 0
        if kind == _IFREG and size:
            at = self._prov_at + (ordinal - 1) * erofs.PROV.size
            digest = erofs.PROV.unpack_from(self._prov, at)[1]
        elif kind == _IFDIR:
            size = 0
        elif mode & 0o130000 == 0o020000:
            rdev = union
        return mode, uid, gid, size, rdev, digest, icount != 0

    def provenance(self, nid: int) -> Provenance:
        """The layer an inode comes from and the digest of its body."""
        ordinal = self._inode(nid)[6]
        if not 0 < ordinal <= self._inodes:
            raise Damaged(f"inode {nid} has no provenance", at=self._at)
        layer, digest = erofs.PROV.unpack_from(self._prov, self._prov_at + (ordinal - 1) * erofs.PROV.size)
        if layer >= len(self._layers):
            return Provenance("", "")  # the root of a tree without layers
        return Provenance(self._layers[layer], "sha256:" + digest.hex() if any(digest) else "")
