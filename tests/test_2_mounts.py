"""Root filesystems: the tree mounted once, an overlay each, everything found again and nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ociimages import make_tar

from engine import host, hostmounts
from engine.errors import Unsupported
from engine.hostmounts import mounted_at
from engine.mounts import RootfsMounts
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees

pytestmark = pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="mounting needs root on Linux")

TAR = "application/vnd.oci.image.layer.v1.tar"


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("containers", "run", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.meta = Meta(root / "db.sqlite")
        self.layers = Layers(root, self.meta)
        self.trees = Trees(root, self.meta, self.layers)
        self.mounts = RootfsMounts(root, self.trees)

    def chain(self, text: bytes) -> str:
        info = self.layers.ingest([make_tar({"etc": None, "etc/motd": text, "gone": b"x"})], TAR)
        return self.trees.build([info.diff_id])

    def container(self, id: str) -> str:
        (self.root / "containers" / id).mkdir(exist_ok=True)
        return id

    def points(self) -> set[str]:
        return {
            os.path.relpath(point, self.root)
            for point, _, _ in hostmounts.mounts()
            if point.startswith(f"{self.root}/")
        }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "a:b,c\\d")  # what mount options are split at
    yield store
    store.mounts.release_all()
    store.meta.close()
    assert store.points() == set()


def test_containers_share_the_tree_and_keep_their_changes_apart(store: Store) -> None:
    chain = store.chain(b"ahoy\n")
    one, two = (store.mounts.ensure(store.container(id), chain) for id in ("one", "two"))
    assert (one / "etc/motd").read_bytes() == b"ahoy\n"
    (one / "etc/motd").write_bytes(b"mine\n")
    os.unlink(one / "gone")
    assert (two / "etc/motd").read_bytes() == b"ahoy\n" and (two / "gone").exists()
    assert sorted(os.listdir(store.mounts.upper("one"))) == ["etc", "gone"]
    tree = f"run/trees/{chain[7:]}"
    assert store.points() == {tree, "containers/one/merged", "containers/two/merged"}
    store.mounts.release("one")
    assert store.points() == {tree, "containers/two/merged"}
    store.mounts.release("two")
    assert store.points() == set() and not os.listdir(store.root / "run/trees")
    again = store.mounts.ensure("one", chain)
    assert (again / "etc/motd").read_bytes() == b"mine\n" and not (again / "gone").exists()


def test_ensure_and_release_are_idempotent_and_survive_a_crowd(store: Store) -> None:
    chain = store.chain(b"x")
    ids = [store.container(f"c{number}") for number in range(4)]
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(12):
                id = ids[(seed + step) % 4]
                if (seed + step) % 3:
                    store.mounts.ensure(id, chain)
                else:
                    store.mounts.release(id)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for id in ids:
        store.mounts.ensure(id, chain)
        store.mounts.ensure(id, chain)
    assert len([point for point, _, _ in hostmounts.mounts() if point.startswith(str(store.root))]) == 5


def test_another_image_is_mounted_anew_with_the_changes_kept(store: Store) -> None:
    old, new = store.chain(b"old"), store.chain(b"new")
    merged = store.mounts.ensure(store.container("c"), old)
    (merged / "mine").write_bytes(b"kept")
    merged = store.mounts.ensure("c", new)
    assert (merged / "etc/motd").read_bytes() == b"new" and (merged / "mine").read_bytes() == b"kept"
    assert store.points() == {f"run/trees/{new[7:]}", "containers/c/merged"}


def test_the_root_directory_is_the_images(store: Store) -> None:
    info = store.layers.ingest([make_tar({"./": None, "f": b""})], TAR)
    chain = store.trees.build([info.diff_id])
    merged = store.mounts.ensure(store.container("c"), chain)
    assert os.stat(merged).st_mode & 0o7777 == 0o755


def test_mounts_of_a_killed_daemon_are_used_again_and_stray_ones_taken_down(store: Store) -> None:
    chain, stray = store.chain(b"x"), store.chain(b"stray")
    store.container("c")
    script = (
        "import os, sys; sys.path[:0] = sys.argv[4:]\n"
        "from pathlib import Path; from test_2_mounts import Store\n"
        "store = Store(Path(sys.argv[1])); store.mounts.ensure('c', sys.argv[2])\n"
        "store.mounts._images.ensure(sys.argv[3]); os.kill(os.getpid(), 9)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.root), chain, stray, str(here), str(here.parent)],
        timeout=60,
        check=False,
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr
    before = store.points()
    assert f"run/trees/{stray[7:]}" in before and "containers/c/merged" in before
    device = os.stat(store.root / "containers/c/merged").st_dev
    store.mounts = RootfsMounts(store.root, store.trees)
    assert os.stat(store.mounts.ensure("c", chain)).st_dev == device  # the same mount
    assert store.points() == {f"run/trees/{chain[7:]}", "containers/c/merged"}


def test_an_unmount_behind_our_back_is_noticed(store: Store) -> None:
    chain = store.chain(b"x")
    merged = store.mounts.ensure(store.container("c"), chain)
    hostmounts.unmount(merged)
    assert (store.mounts.ensure("c", chain) / "etc/motd").read_bytes() == b"x"
    hostmounts.unmount(merged)
    hostmounts.unmount(store.root / "run/trees" / chain[7:])
    assert (store.mounts.ensure("c", chain) / "etc/motd").read_bytes() == b"x"


def test_release_all_keeps_what_it_is_told_to(store: Store) -> None:
    chain = store.chain(b"x")
    for id in ("runs", "rests"):
        store.mounts.ensure(store.container(id), chain)
    store.mounts.release_all(keep={"runs"})
    assert store.points() == {f"run/trees/{chain[7:]}", "containers/runs/merged"}


def test_without_the_right_it_says_why(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = store.chain(b"x")
    store.container("c")
    monkeypatch.setattr(host, "is_root", lambda: False)
    with pytest.raises(Unsupported, match="root"):
        store.mounts.ensure("c", chain)
    assert not mounted_at(store.mounts.merged("c"))
