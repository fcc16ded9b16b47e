"""Disks and outlines of root file systems on a host that mounts nothing: read and written by e2fsprogs alone."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from imagestore import ImageStore
from ociimages import make_tar

from engine.errors import Busy, Unsupported
from engine.store.trees import Tree
from engine.unmounted import Unmounted, _debugfs, make_disk, outline, write_out

FILES = {
    "etc": None,
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "seed": None,
    "seed/below": None,
    "seed/below/tool": (0o750, b"x" * 3_000_000),
    "seed/link": "below/tool",
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as store:
        yield store


@pytest.fixture
def chain(store: ImageStore) -> str:
    layer = store.layers.ingest([make_tar(FILES)], "application/vnd.oci.image.layer.v1.tar")
    return store.trees.build([layer.diff_id])


@pytest.fixture
def tree(store: ImageStore, chain: str) -> Tree:
    return store.trees.open(chain)


def write(disk: Path, *commands: str) -> None:
    _debugfs(disk, ["-w", "-f", "-"], "\n".join(commands) + "\n")


def test_a_disk_is_made_and_what_it_has_counts(tree: Tree, tmp_path: Path) -> None:
    disk, place = tmp_path / "upper.ext4", tmp_path / "outline"
    make_disk(disk, 64 << 20, tree)
    root = _debugfs(disk, ["-R", "stat upper"])
    assert b"Type: directory" in root and b"Mode:  0755" in root and root.split(b"User:")[1].split()[0] == b"0"
    assert outline(tree, disk, place) == place
    assert (place / "etc/passwd").read_bytes() == FILES["etc/passwd"]
    (tmp_path / "passwd").write_text("web:x:33:33::/:/bin/sh\n")
    write(disk, "mkdir upper/etc", "cd upper/etc", f"write {tmp_path}/passwd passwd", "mknod group c 0 0")
    outline(tree, disk, place)
    assert (place / "etc/passwd").read_text() == "web:x:33:33::/:/bin/sh\n"
    assert (place / "etc/group").read_bytes() == b""  # removed in the container
    with disk.open("rb") as guest:
        fcntl.flock(guest, fcntl.LOCK_SH)
        with pytest.raises(Busy):
            outline(tree, disk, place)


def test_a_new_volume_gets_what_the_image_has(tree: Tree, tmp_path: Path) -> None:
    place = tmp_path / "out"
    write_out(tree, tree.lookup(b"seed"), place)
    assert sorted(os.listdir(place)) == ["below", "link"] and os.readlink(place / "link") == "below/tool"
    tool = place / "below/tool"
    assert tool.read_bytes() == b"x" * 3_000_000 and stat.S_IMODE(tool.stat().st_mode) == 0o750
    write_out(tree, tree.lookup(b"etc/passwd"), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_what_does_not_run_is_not_shown(store: ImageStore, chain: str) -> None:
    mounts = Unmounted(store.root, store.trees)
    (store.root / "containers/a").mkdir(parents=True)
    assert mounts.use_disk("a", chain, 64 << 20) and not mounts.use_disk("a", chain, 64 << 20)
    looks: list[Callable[[], object]] = [lambda: mounts.upper("a"), lambda: mounts.ensure("a", chain)]
    for look in looks:
        with pytest.raises(Unsupported) as caught:
            look()
        assert "start it" in (caught.value.hint or "")
    with mounts.only_image(chain, "a") as place:
        mounts.lay_out(chain, place, "/seed")
        mounts.lay_out(chain, place, "/nowhere")
        assert sorted(os.listdir(place)) == ["etc", "seed"]
    mounts.give_disk("a")
    mounts.forget("a")
