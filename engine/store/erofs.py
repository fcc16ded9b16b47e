"""EROFS metadata images, in pure Python: 64-byte inodes, chunk-based files over the layers' data as extra devices.

Only here: the on-disk structures and the writer (reader: tree.py). File content never passes through: a regular file
is one chunk index into the device of the layer that holds its body. The same tree always gives the same bytes. Image:

    block 0            superblock at 1024, device table from 1152 (it may continue in further blocks)
    meta_blkaddr       inodes in breadth-first order, each followed by its xattrs and inline tail or chunk index
    after that         whole blocks of large directories, symlink targets that do not fit beside their inode

A *shown* image is the same tree for people: its files carry provenance xattrs (per layer in the shared xattr area,
one per file inline), which containers must not see. Beside an image `prov`: per inode (by i_ino) the layer it comes
from and the sha256 of its body. Pure functions, one thread.

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

from engine.errors import Damaged, TooLarge
from engine.store.merge import Node, show

BLOCK = 4096
MAGIC = 0xE0F5E1E2
SUPER_OFFSET = 1024
# magic checksum feature_compat blkszbits extslots root_nid inos build_time build_nsec blocks meta_blkaddr
# xattr_blkaddr uuid volume_name feature_incompat compr_algs extra_devices devt_slotoff dirblkbits prefix_count …
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
INODE = struct.Struct("<HHHHQIIIIQII16x")  # format xattr_icount mode reserved size u ino uid gid mtime nsec nlink
DIRENT = struct.Struct("<QHBB")  # nid nameoff file_type reserved
CHUNK = struct.Struct("<HHI")  # startblk_hi device_id startblk_lo
DEVICE = struct.Struct("<64sII56x")  # tag blocks mapped_blkaddr
XATTR = struct.Struct("<BBH")  # name_len name_index value_size
XATTR_HEADER = bytes(12)  # no name filter, no shared xattrs

COMPAT_CHKSUM, COMPAT_MTIME = 0x1, 0x2
INCOMPAT_CHUNKED, INCOMPAT_DEVICES = 0x4, 0x8
FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4
CHUNK_INDEXES = 0x20
DIRENT_SIZE = 12
FIRST_SLOT = 9  # device table at 9 * 128 = right after the 128-byte superblock
FEW = 50_000  # inodes whose plans are kept: some 15 MB
FIRST_NID = 2  # inode number 0 would be skipped by readdir in C libraries
NAMELESS = (b"system.posix_acl_access", b"system.posix_acl_default")
PREFIXES = ((1, b"user."), (4, b"trusted."), (6, b"security."))

PROV_MAGIC = b"FDPROV01"
PROV_HEAD = struct.Struct("<8sII")  # magic, layers, inodes; then 32 bytes per layer
PROV = struct.Struct("<I32s")  # layer number, body sha256 (zeros: no body)

FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_TYPE_OF = bytes(FILE_TYPES.get(kind << 12, 0) for kind in range(16))


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    """CRC-32C without the final inversion, as the EROFS superblock checksum uses it."""
    table = _crc32c_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def pack_xattrs(xattrs: dict[bytes, bytes], shared: Sequence[int] = ()) -> bytes:
    """The inline xattr area; names outside EROFS's namespaces are left out (as a filesystem answers ENOTSUP).

    `shared` are entries of the shared area, by their offset there in units of 4 bytes.
    """
    out = bytearray(XATTR_HEADER)
    out[4] = len(shared)
    for number in shared:
        out += number.to_bytes(4, "little")
    out += _entries(xattrs)
    return bytes(out) if len(out) > len(XATTR_HEADER) else b""


def _entries(xattrs: dict[bytes, bytes]) -> bytes:
    """xattr entries, each padded to 4 bytes, in the order of their names."""
    out = bytearray()
    for name in sorted(xattrs):
        value = xattrs[name]
        if name in NAMELESS:
            index, rest = 2 + NAMELESS.index(name), b""
        else:
            found = [(number, prefix) for number, prefix in PREFIXES if name.startswith(prefix) and name != prefix]
            if not found:
                continue
            index, rest = found[0][0], name[len(found[0][1]) :]
        out += XATTR.pack(len(rest), index, len(value)) + rest + value
        out += bytes(-len(out) % 4)
    return bytes(out)


class Shown:
    """What a shown image adds: `layers` are xattrs of every file of a layer (by its number), `digest` the name of the
    xattr that holds a file's body digest. Symlinks and special files cannot have user xattrs (xattr(7))."""

    def __init__(self, layers: Sequence[dict[bytes, bytes]], digest: bytes) -> None:
        self._digest = digest
        self.area = bytearray(bytes(4))  # offset 0 is never used, so that a zeroed field names nothing
        self._shared: list[list[int]] = []
        known: dict[bytes, int] = {}
        for xattrs in layers:
            numbers = []
            for name, value in xattrs.items():
                entry = _entries({name: value})
                if entry and entry not in known:
                    known[entry] = len(self.area) // 4
                    self.area += entry
                if entry:
                    numbers.append(known[entry])
            self._shared.append(numbers)

    def pack(self, node: Node) -> bytes:
        """The xattr area of one inode."""
        own = node.xattrs or {}
        if not (stat.S_ISREG(node.mode) or stat.S_ISDIR(node.mode)):
            return pack_xattrs(own)
        if node.sha256:
            own = own | {self._digest: b"sha256:" + node.sha256.hex().encode()}
        return pack_xattrs(own, self._shared[node.layer])


def order(root: Node) -> list[Node]:
    """Every inode once, breadth first, names ascending; sets `nlink`."""
    nodes = [root]
    root.nlink = 2
    for node in nodes:  # grows while it is read
        kids = node.kids
        if kids is None:
            continue
        for name in sorted(kids):
            kid = kids[name]
            if not kid.nlink:
                nodes.append(kid)
                if kid.kids is not None:
                    kid.nlink = 2
                    node.nlink += 1
                else:
                    kid.nlink = 1
            else:
                kid.nlink += 1
    return nodes


def _split(names: list[bytes]) -> tuple[list[tuple[int, int]], int]:
    """Sorted names into directory blocks: [(first, end)], and the bytes used in the last one."""
    total = DIRENT_SIZE * len(names) + sum(map(len, names))
    if total <= BLOCK:
        return [(0, len(names))], total
    blocks = []
    first = used = 0
    for at, name in enumerate(names):
        need = DIRENT_SIZE + len(name)
        if used + need > BLOCK:
            blocks.append((first, at))
            first, used = at, 0
        used += need
    blocks.append((first, len(names)))
    return blocks, used


def _dir_block(node: Node, names: Sequence[bytes]) -> bytes:
    kids = node.kids
    assert kids is not None
    nameoff = DIRENT_SIZE * len(names)
    fields: list[int] = []
    for name in names:
        kid = kids.get(name)
        if kid is None:
            kid = node if name == b"." else node.parent or node
        fields += (kid.nid, nameoff, _TYPE_OF[kid.mode >> 12], 0)
        nameoff += len(name)
    return struct.pack("<" + "QHBB" * len(names), *fields) + b"".join(names)


class _Plan(NamedTuple):
    """How one inode is stored: its xattr area, layout, whole blocks behind the inodes, size, a directory's names and
    their blocks, and the bytes the inode itself takes."""

    xattrs: bytes
    layout: int
    plain: int
    size: int
    names: list[bytes]
    blocks: list[tuple[int, int]]
    need: int


def _plan(node: Node, shown: Shown | None) -> _Plan:
    """Made twice in a large tree, once to place the inodes and once to write them: a million plans would take more
    memory than time."""
    kind = stat.S_IFMT(node.mode)
    xattrs = shown.pack(node) if shown else pack_xattrs(node.xattrs) if node.xattrs else b""
    need = 64 + len(xattrs)
    layout, plain, size = FLAT_PLAIN, 0, 0
    names: list[bytes] = []
    blocks: list[tuple[int, int]] = []
    tail = 0
    if kind == stat.S_IFREG:
        size = node.size
        if size:
            layout = CHUNK_BASED
            need = (need + 7 & ~7) + 8
    elif kind == stat.S_IFDIR:
        assert node.kids is not None
        names = sorted((*node.kids, b".", b".."))
        blocks, tail = _split(names)
        size = (len(blocks) - 1) * BLOCK + tail
        plain = len(blocks) - 1
    elif kind == stat.S_IFLNK:
        size = tail = len(node.link)
    if tail:
        if need + tail <= BLOCK:
            layout = FLAT_INLINE
            need += tail
        else:
            plain += 1
    return _Plan(xattrs, layout, plain, size, names, blocks, need)


class _Area:
    """A part of the image that is written front to back, with zeros where nothing is put, beside others."""

    def __init__(self, out: BinaryIO, start: int, size: int) -> None:
        self._out, self._start, self._size = out, start, size
        self._buffer = bytearray()

    def put(self, at: int, data: bytes | bytearray) -> None:
        """`at` counts from the start of the area and never goes back."""
        self._buffer += bytes(at - self._done())
        self._buffer += data
        if len(self._buffer) >= 1 << 20:
            self._flush()

    def _done(self) -> int:
        return self._flushed + len(self._buffer)

    _flushed = 0

    def _flush(self) -> None:
        self._out.seek(self._start + self._flushed)
        self._out.write(self._buffer)
        self._flushed += len(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        self._buffer += bytes(self._size - self._done())
        self._flush()


def write(
    root: Node,
    out: BinaryIO,
    prov: BinaryIO | None,
    layers: Sequence[str],
    uuid: bytes,
    blocks_of: Callable[[str], int],
    shown: Shown | None = None,
) -> tuple[int, int]:
    """Write the image and, unless it is a `shown` one, its `prov`; returns (inodes, bytes of the image).

    `layers` are the diff_ids Node.layer counts; `blocks_of` gives the 4 KiB blocks of a diff_id's data. Damaged when
    a file lies outside its data, TooLarge beyond what the format holds.
    """
    nodes = order(root)
    devices = _devices(nodes)
    table_end = FIRST_SLOT * 128 + DEVICE.size * len(devices)
    meta_block = -(-table_end // BLOCK)

    # first pass: where everything goes
    at = FIRST_NID * 32
    tail_blocks = 0  # whole blocks behind the inodes
    few = len(nodes) <= FEW
    plans: list[_Plan] = []
    for node in nodes:
        plan = _plan(node, shown)
        if few:
            plans.append(plan)
        room = BLOCK - at % BLOCK
        if room < (plan.need if plan.layout == FLAT_INLINE else 64):
            at += room
        node.nid = at // 32
        tail_blocks += plan.plain
        at += plan.need + 31 & ~31
    meta_size = -(-at // BLOCK) * BLOCK
    first_plain = meta_block + meta_size // BLOCK
    shared = bytes(shown.area) if shown else b""
    shared += bytes(-len(shared) % BLOCK)
    total_blocks = first_plain + tail_blocks + len(shared) // BLOCK
    shared_block = first_plain + tail_blocks if shared else 0
    if total_blocks >= 1 << 32:
        raise TooLarge("the tree's metadata exceeds 16 TiB")

    # second pass: the bytes, of inodes and of whole blocks, each in ascending order
    meta = _Area(out, meta_block * BLOCK, meta_size)
    plain_area = _Area(out, first_plain * BLOCK, tail_blocks * BLOCK)
    blocks_in = [blocks_of(diff_id) for diff_id in devices]
    if prov is not None:
        prov.write(PROV_HEAD.pack(PROV_MAGIC, len(layers), len(nodes)))
        prov.write(b"".join(bytes.fromhex(diff_id[7:]) for diff_id in layers))
    pack_prov = PROV.pack
    plain_at = 0
    for ordinal, node in enumerate(nodes, 1):
        xattrs, layout, plain, size, names, blocks, need = plans[ordinal - 1] if few else _plan(node, shown)
        inode = bytearray(need)
        mode = node.mode
        kind = stat.S_IFMT(mode)
        body = 64 + len(xattrs)
        union = 0
        if layout == CHUNK_BASED:
            count = -(-size // BLOCK)
            union = CHUNK_INDEXES | (count - 1).bit_length()
            device = devices[node.data]
            first = node.offset // BLOCK
            if node.offset % BLOCK or first + count > blocks_in[device - 1]:
                raise Damaged(f"a file of {size} bytes lies outside its layer's data", at=node.data)
            CHUNK.pack_into(inode, body + 7 & ~7, 0, device, first)
        elif names:
            union = first_plain + plain_at if len(blocks) > 1 or layout == FLAT_PLAIN else 0
            for number, (first, end) in enumerate(blocks):
                block = _dir_block(node, names[first:end])
                if number == len(blocks) - 1 and layout == FLAT_INLINE:
                    inode[body : body + len(block)] = block
                else:
                    plain_area.put((plain_at + number) * BLOCK, block)
        elif kind == stat.S_IFLNK:
            if layout == FLAT_INLINE:
                inode[body : body + size] = node.link
            else:
                union = first_plain + plain_at
                plain_area.put(plain_at * BLOCK, node.link)
        else:
            union = node.rdev
        if xattrs:
            inode[64:body] = xattrs
        seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
        INODE.pack_into(
            inode,
            0,
            1 | layout << 1,
            (len(xattrs) - 12) // 4 + 1 if xattrs else 0,
            mode,
            0,
            size,
            union,
            ordinal,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            node.nlink,
        )
        meta.put(node.nid * 32, inode)
        plain_at += plain
        if prov is not None:
            prov.write(pack_prov(node.layer, node.sha256))
    meta.close()
    plain_area.close()

    head = bytearray(meta_block * BLOCK)
    SUPER.pack_into(
        head,
        SUPER_OFFSET,
        *(
            MAGIC,
            0,
            COMPAT_CHKSUM | COMPAT_MTIME,
            12,
            0,
            root.nid,
            len(nodes),
            0,
            0,
            total_blocks,
            meta_block,
            shared_block,
        ),
        *(uuid[:16], b"", INCOMPAT_CHUNKED | INCOMPAT_DEVICES, 0, len(devices), FIRST_SLOT, 0, 0, 0, 0, 0),
    )
    for number, diff_id in enumerate(devices):
        DEVICE.pack_into(head, (FIRST_SLOT + number) * 128, diff_id[7:].encode(), blocks_in[number], 0)
    struct.pack_into("<I", head, SUPER_OFFSET + 4, crc32c(bytes(head[SUPER_OFFSET:BLOCK])))
    out.seek(total_blocks * BLOCK - len(shared))
    out.write(shared)
    out.seek(0)
    out.write(head)
    return len(nodes), total_blocks * BLOCK


def _devices(nodes: Sequence[Node]) -> dict[str, int]:
    """diff_id -> device number (from 1) of the data layers in use, in order of first use."""
    devices: dict[str, int] = {}
    for node in nodes:
        if node.sha256 and node.data not in devices:
            devices[node.data] = len(devices) + 1
            if len(devices) >= 1 << 16:
                raise TooLarge("the tree uses more than 65535 data layers", at=show(node.data.encode()))
    return devices
