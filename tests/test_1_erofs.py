"""The images we write are EROFS: the kernel mounts them and shows what tar extracts; fsck.erofs agrees."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import host, hostmounts
from engine.store.check import check
from engine.store.erofs import crc32c
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Tree, Trees

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *row)
    for row in ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF))
)
CAP = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep, revision 2


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Layers, Trees]]:
    meta = Meta(tmp_path / "db.sqlite")
    layers = Layers(tmp_path, meta)
    yield layers, Trees(tmp_path, meta, layers)
    small = sum(info.data_size for info in layers.all()) < 1 << 30
    assert check(tmp_path, meta, deep=small) == []
    meta.close()


@contextmanager
def mounted(trees: Trees, chain: str, target: Path) -> Iterator[Path]:
    if not (host.LINUX and host.is_root()):
        pytest.skip("mounting needs Linux and root")
    target.mkdir()
    hostmounts.mount_erofs(trees.meta_path(chain), trees.devices(chain), target)
    try:
        yield target
    finally:
        hostmounts.unmount(target)


class Maker:
    """A pax archive by hand."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.out, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, body: bytes = b"", **fields: object) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(body)
        for key, value in fields.items():
            setattr(info, key, value)
        self.tar.addfile(info, io.BytesIO(body))

    def bytes(self) -> bytes:
        self.tar.close()
        return self.out.getvalue()


def one_of_each() -> bytes:
    make = Maker()
    make.add("./", tarfile.DIRTYPE, mode=0o755, mtime=1_600_000_000)
    make.add(
        "dir/",
        tarfile.DIRTYPE,
        mode=0o1777,
        uid=7,
        gid=70_000,
        mtime=1_500_000_000.5,
        pax_headers={"mtime": "1500000000.123456789"},
    )
    make.add("dir/suid", body=b"#!/bin/true\n", mode=0o6755, uid=4_000_000_000, mtime=1)
    make.add("empty", mode=0o600, mtime=5)
    make.add("big", body=os.urandom(1000) * 5000, mode=0o644, mtime=5, pax_headers={"mtime": "1700000000.999999999"})
    make.add(
        "linked",
        tarfile.LNKTYPE,
        linkname="big",
        mode=0o644,
        mtime=1_700_000_000,
        pax_headers={"mtime": "1700000000.999999999"},
    )
    make.add("short", tarfile.SYMTYPE, linkname="dir/suid", mode=0o777, mtime=3)
    make.add("long", tarfile.SYMTYPE, linkname="x/" * 2040, mode=0o777, mtime=3)
    make.add("middle", tarfile.SYMTYPE, linkname="y" * 3000, mode=0o777, mtime=3)
    make.add("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666, mtime=3)
    make.add("block", tarfile.BLKTYPE, devmajor=259, devminor=300_000, mode=0o660, gid=6, mtime=3)
    make.add("pipe", tarfile.FIFOTYPE, mode=0o640, mtime=3)
    make.add("n" * 255, body=b"long name", mtime=3)
    make.add("späte-ß-名前", body=b"utf8", mtime=3)
    deep = "/".join(["deep"] * 60)
    make.add(deep, tarfile.DIRTYPE, mode=0o700, mtime=3)
    return make.bytes()


def facts(path: Path) -> dict[str, tuple[object, ...]]:
    """Everything stat, readlink, read and listxattr say about what is below `path`."""
    out: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for folder, dirs, files in os.walk(os.fsencode(path)):
        for name in sorted(dirs + files):
            full = os.path.join(folder, name)
            st = os.lstat(full)
            relative = os.fsdecode(os.path.relpath(full, os.fsencode(path)))
            content: object = None
            if stat.S_ISREG(st.st_mode):
                content = hashlib.sha256(Path(os.fsdecode(full)).read_bytes()).hexdigest()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(full)
            xattrs = {
                key: os.getxattr(full, key, follow_symlinks=False) for key in os.listxattr(full, follow_symlinks=False)
            }
            size = st.st_size if not stat.S_ISDIR(st.st_mode) else 0
            rdev = st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0
            group = inodes.setdefault(st.st_ino, relative)
            implicit = relative.startswith("deep") and relative.count("/") < 59
            time = 0 if implicit else st.st_mtime_ns
            out[relative] = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, size, time, rdev, content, xattrs, group)
    return out


def tree_facts(tree: Tree) -> dict[str, tuple[object, ...]]:
    """The same from our own reader."""
    out: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for path, nid in sorted(tree.walk()):
        st = tree.stat(nid)
        relative = os.fsdecode(path)
        content: object = None
        if stat.S_ISREG(st.mode):
            content = hashlib.sha256(tree.pread(nid, st.size, 0)).hexdigest()
        elif stat.S_ISLNK(st.mode):
            content = tree.readlink(nid)
        xattrs = {key.decode(): value for key, value in tree.xattrs(nid).items()}
        size = st.size if not stat.S_ISDIR(st.mode) else 0
        group = inodes.setdefault(nid, relative)
        implicit = relative.startswith("deep") and relative.count("/") < 59
        time = 0 if implicit else st.mtime_ns
        out[relative] = (st.mode, st.nlink, st.uid, st.gid, size, time, st.rdev, content, xattrs, group)
    return out


def groups(rows: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """Name hardlink groups by their smallest member: walks differ in order."""
    least: dict[object, str] = {}
    for name in sorted(rows):
        least.setdefault(rows[name][-1], name)
    return {name: (*row[:-1], least[row[-1]]) for name, row in rows.items()}


def test_the_kernel_shows_what_tar_extracts(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    layers, trees = stores
    data = one_of_each()
    chain = trees.build([layers.ingest([data], "").diff_id])
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xp", "--numeric-owner", "-C", unpacked], input=data, check=True)
    with mounted(trees, chain, tmp_path / "mnt") as mnt:
        shown = groups(facts(mnt))
        assert shown == groups(facts(unpacked))
        # the type and inode number directories give, and the one stat gives
        for entry in os.scandir(mnt):
            assert entry.inode() == entry.stat(follow_symlinks=False).st_ino != 0
    ours = groups(tree_facts(trees.open(chain)))
    assert {
        name: (*row[:7], os.fsencode(row[7]) if stat.S_ISLNK(int(str(row[0]))) else row[7], *row[8:])
        for name, row in shown.items()
    } == ours  # type: ignore[arg-type]


def pax_record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def with_xattrs(name: str, kind: bytes, xattrs: dict[str, bytes], body: bytes = b"", linkname: str = "") -> bytes:
    records = b"".join(pax_record("SCHILY.xattr." + key, value) for key, value in xattrs.items())
    out = b""
    for info, content in ((tarfile.TarInfo("pax"), records), (tarfile.TarInfo(name), body)):
        info.type = b"x" if content is records else kind
        info.size, info.linkname, info.mode = len(content), linkname if content is body else "", 0o644
        out += info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    return out


def test_xattrs_capabilities_and_acls(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    layers, trees = stores
    full = {
        "security.capability": CAP,
        "user.text": b"value",
        "user.empty": b"",
        "user.binary": bytes(range(256)),
        "user.large": b"z" * 9000,
        "trusted.note": b"t",
        "system.posix_acl_access": ACL,
    }
    data = (
        with_xattrs(
            "file", b"0", {**full, "com.apple.quarantine": b"dropped", "trusted.overlay.opaque": b"y"}, b"content"
        )
        + with_xattrs("dir/", b"5", {"user.d": b"1", "system.posix_acl_default": ACL})
        + with_xattrs("link", b"2", {"security.label": b"l", "user.no": b"dropped"}, linkname="file")
        + with_xattrs("full", b"0", {f"user.k{n}": b"v" * 3000 for n in range(30)})
        + bytes(1024)
    )
    chain = trees.build([layers.ingest([data], "").diff_id])
    tree = trees.open(chain)
    expected = {key.encode(): value for key, value in full.items()}
    assert tree.xattrs(tree.lookup(b"file")) == expected
    assert tree.xattrs(tree.lookup(b"link")) == {b"security.label": b"l"}
    with mounted(trees, chain, tmp_path / "mnt") as mnt:
        for name in ("file", "dir", "link", "full"):
            path = mnt / name
            seen = {
                key.encode(): os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            assert seen == tree.xattrs(tree.lookup(name.encode())), name
        if shutil.which("getcap"):
            assert "cap_net_bind_service" in subprocess.check_output(["getcap", mnt / "file"], text=True)


def test_fsck_and_dump_accept_the_image(stores: tuple[Layers, Trees]) -> None:
    if not shutil.which("fsck.erofs"):
        pytest.skip("fsck.erofs is not installed (erofs-utils)")
    layers, trees = stores
    chain = trees.build([layers.ingest([one_of_each()], "").diff_id])
    devices = [f"--device={path}" for path in trees.devices(chain)]
    done = subprocess.run(["fsck.erofs", *devices, trees.meta_path(chain)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<E>" not in done.stdout + done.stderr
    dump = subprocess.run(["dump.erofs", *devices, "-s", trees.meta_path(chain)], capture_output=True, text=True)
    assert dump.returncode == 0 and "sb_csum" in dump.stdout, dump.stdout + dump.stderr


def test_crc32c_is_the_one_of_the_standard() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # RFC 3720 B.4's polynomial, the usual check value


def test_many_layers_are_many_devices(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    """More devices than the first block's table holds, and more options than mount(2) takes."""
    layers, trees = stores
    ids = []
    for number in range(60):
        make = Maker()
        make.add(f"f{number:03}", body=f"body {number}".encode())
        ids.append(layers.ingest([make.bytes()], "").diff_id)
    chain = trees.build(ids)
    assert len(trees.devices(chain)) == 60
    with mounted(trees, chain, tmp_path / "mnt") as mnt:
        for number in range(60):
            assert (mnt / f"f{number:03}").read_text() == f"body {number}"


def test_a_directory_of_seventy_thousand_files(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    layers, trees = stores
    header = tarfile.TarInfo("d/00000").tobuf(tarfile.USTAR_FORMAT)
    base = sum(header) - sum(header[148:156]) - sum(b"00000")
    out = bytearray()
    for number in range(70_000):
        name = b"%05d" % number
        total = base + sum(name) + 256
        out += header[:2] + name + header[7:148] + b"%06o\0 " % total + header[156:]
    chain = trees.build([layers.ingest([bytes(out)], "").diff_id])
    with mounted(trees, chain, tmp_path / "mnt") as mnt:
        assert sorted(os.listdir(mnt / "d")) == [f"{n:05}" for n in range(70_000)]
        assert all((mnt / "d" / f"{n:05}").exists() for n in range(0, 70_000, 997))
    tree = trees.open(chain)
    assert len(tree.readdir(tree.lookup(b"d"))) == 70_000


def test_a_sparse_file_beyond_four_gibibytes(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    layers, trees = stores
    size = (4 << 30) + 12_345
    source = tmp_path / "huge"
    with open(source, "wb") as file:
        file.write(b"start")
        file.seek(size - 3)
        file.write(b"end")
    data = subprocess.run(["tar", "-c", "--sparse", "-C", tmp_path, "huge"], capture_output=True, check=True).stdout
    assert len(data) < 1 << 20
    info = layers.ingest([data], "")
    chain = trees.build([info.diff_id])
    assert info.size == size
    assert os.stat(layers.data_path(info.diff_id)).st_blocks * 512 < 1 << 20
    tree = trees.open(chain)
    nid = tree.lookup(b"huge")
    assert tree.pread(nid, 5, 0) == b"start" and tree.pread(nid, 100, size - 3) == b"end"
    with mounted(trees, chain, tmp_path / "mnt") as mnt, open(mnt / "huge", "rb") as file:
        assert os.fstat(file.fileno()).st_size == size
        assert file.read(8) == b"start\0\0\0"
        file.seek(size - 10)
        assert file.read() == b"\0" * 7 + b"end"


def test_an_overlay_on_top_is_writable(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    layers, trees = stores
    chain = trees.build([layers.ingest([one_of_each()], "").diff_id])
    with mounted(trees, chain, tmp_path / "lower") as lower:
        for name in ("upper", "work", "merged"):
            (tmp_path / name).mkdir()
        hostmounts.mount_overlay([lower], tmp_path / "upper", tmp_path / "work", tmp_path / "merged")
        try:
            merged = tmp_path / "merged"
            (merged / "dir" / "suid").write_text("changed")
            (merged / "empty").unlink()
            assert (merged / "dir" / "suid").read_text() == "changed" and not (merged / "empty").exists()
            assert (lower / "dir" / "suid").read_text() == "#!/bin/true\n"
        finally:
            hostmounts.unmount(tmp_path / "merged")


def test_older_kernels_mount_through_loop_devices(
    stores: tuple[Layers, Trees], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("no loop devices")
    layers, trees = stores
    info = layers.ingest([one_of_each()], "application/vnd.oci.image.layer.v1.tar")
    chain = trees.build([info.diff_id])
    monkeypatch.setattr(host, "kernel_version", lambda: (6, 11))
    with mounted(trees, chain, tmp_path / "mnt") as root:
        source = next(source for point, _, source in hostmounts.mounts() if point == str(root))
        assert source.startswith("/dev/loop")
        tree = trees.open(chain)
        for path, nid in tree.walk():
            st = tree.stat(nid)
            assert os.lstat(root / os.fsdecode(path)).st_mode == st.mode
            if stat.S_ISREG(st.mode):
                assert (root / os.fsdecode(path)).read_bytes() == tree.pread(nid, st.size, 0)


def test_a_shown_image_adds_provenance_and_nothing_else(stores: tuple[Layers, Trees], tmp_path: Path) -> None:
    if not (host.LINUX and host.is_root()):
        pytest.skip("mounting needs Linux and root")
    layers, trees = stores
    info = layers.ingest([one_of_each()], "application/vnd.oci.image.layer.v1.tar")
    chain = trees.build([info.diff_id])
    target = tmp_path / "shown"
    target.mkdir()
    image = trees.shown(chain, {info.diff_id: {"created_by": "RUN " + "x" * 9000}})
    assert trees.shown(chain, {}) == image
    hostmounts.mount_erofs(image, trees.devices(chain), target, inert=True)
    try:
        tree = trees.open(chain)
        for path, nid in tree.walk():
            here = target / os.fsdecode(path)
            st, seen = tree.stat(nid), os.lstat(here)
            assert (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_nlink) == (st.mode, st.uid, st.gid, st.nlink)
            assert seen.st_mtime_ns == st.mtime_ns
            found = {
                name.encode(): os.getxattr(here, name, follow_symlinks=False)
                for name in os.listxattr(here, follow_symlinks=False)
            }
            own = {name: value for name, value in found.items() if not name.startswith(b"user.dutchman.")}
            assert own == tree.xattrs(nid)
            if stat.S_ISREG(st.mode):
                assert here.read_bytes() == tree.pread(nid, st.size, 0)
                assert found[b"user.dutchman.layer"].decode() == info.diff_id
                assert found[b"user.dutchman.created_by"] == b"RUN " + b"x" * 4092
                if st.size:
                    digest = "sha256:" + hashlib.sha256(here.read_bytes()).hexdigest()
                    assert found[b"user.dutchman.digest"].decode() == digest == tree.provenance(nid).digest
    finally:
        hostmounts.unmount(target)


def test_a_store_on_tmpfs_mounts_through_loop_devices(tmp_path: Path) -> None:
    """EROFS reads files of most file systems by itself from Linux 6.12 on; of tmpfs it refuses with ENOTBLK."""
    if not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("no loop devices")
    ram = tmp_path / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(ram)], check=True)
    meta = Meta(ram / "db.sqlite")
    try:
        layers = Layers(ram, meta)
        trees = Trees(ram, meta, layers)
        chain = trees.build([layers.ingest([one_of_each()], "").diff_id])
        with mounted(trees, chain, tmp_path / "mnt") as root:
            assert (root / "dir" / "suid").read_text() == "#!/bin/true\n"
    finally:
        meta.close()
        hostmounts.unmount(ram)
