"""The process that mounts, binds, and the ends of a daemon: clean, killed, and brought back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import SMALL, add_busybox, add_image
from mounting import ROOT, Daemon, can_mount
from ociimages import make_tar

from engine import host, hostmounts
from engine.engine import Engine
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees
from fdfs import binds
from fdfs.binder import Binder
from fdfs.tree.root import ROOT as TREE

REASON = can_mount() or (None if host.LINUX and host.is_root() else "binds need root on Linux")
if REASON and os.environ.get("CI") == "true" and host.LINUX and host.is_root():
    raise RuntimeError(f"this test must run in CI: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

FILES = {
    "etc": None,
    "etc/motd": b"ahoy\n",
    "etc/empty": b"",
    "etc/link": "motd",
    "big": bytes(range(256)) * 5000,
    "tool": (0o4755, b"x"),
} | {f"many/{number:05d}-{'x' * 60}": str(number).encode() for number in range(3000)}


def eventually(check: Callable[[], Any], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


class Process:
    """A mounting process, and the order that mounts one tree."""

    def __init__(self, image: Path, devices: list[Path], chain: str) -> None:
        self.chain = chain
        self.tree = {"image": str(image), "devices": [str(path) for path in devices]}
        self.process = binds.spawn()
        assert self.answer()["ready"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def order(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(5) == 0


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    store = tmp_path_factory.mktemp("plane") / "store"
    (store / "run").mkdir(parents=True)
    meta = Meta(store / "db.sqlite")
    layers = Layers(store, meta)
    info = layers.ingest([make_tar(FILES)], "application/vnd.oci.image.layer.v1.tar")
    trees = Trees(store, meta, layers)
    chain = trees.build([info.diff_id])
    shown = trees.shown(chain, {chain: {"created_by": "RUN it", "media_type": "a/b"}})
    plane = Process(shown, trees.devices(chain), chain)
    meta.close()
    yield plane
    plane.end()


@pytest.fixture
def tree(plane: Process, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "tree"
    target.mkdir()
    assert plane.order(bind=str(target), **plane.tree)["ok"]
    yield target
    assert plane.order(unbind=str(target))["ok"]
    assert not hostmounts.is_mounted(target) and not list(target.iterdir())


def test_files_are_what_the_layer_holds(tree: Path) -> None:
    assert (tree / "etc/motd").read_bytes() == b"ahoy\n"
    assert (tree / "etc/empty").read_bytes() == b""
    assert (tree / "big").read_bytes() == FILES["big"]
    with open(tree / "big", "rb") as handle:
        handle.seek(1_000_001)
        assert handle.read(7) == bytes(range(256))[1_000_001 % 256 :][:7]
    assert os.readlink(tree / "etc/link") == "motd"
    assert (tree / "tool").stat().st_mode & 0o7777 == 0o4755
    assert (tree / "big").stat().st_blocks * 512 >= 1_280_000
    with pytest.raises(FileNotFoundError):
        (tree / "etc/none").read_bytes()


def test_a_large_directory_is_listed_whole_and_again(tree: Path) -> None:
    wanted = sorted(name.rpartition("/")[2] for name in FILES if name.startswith("many/"))
    for _ in range(3):
        assert sorted(os.listdir(tree / "many")) == wanted
    with os.scandir(tree / "many") as entries:
        assert all(entry.is_file(follow_symlinks=False) and entry.inode() == entry.stat().st_ino for entry in entries)


def test_nothing_can_be_written(tree: Path) -> None:
    for attempt in (
        lambda: (tree / "x").write_text("x"),
        lambda: (tree / "etc/motd").unlink(),
        lambda: os.chmod(tree / "tool", 0),
        lambda: os.setxattr(tree / "tool", "user.x", b"1"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            attempt()


def test_provenance_is_shown(tree: Path, plane: Process) -> None:
    found = {name: os.getxattr(tree / "etc/motd", name) for name in os.listxattr(tree / "etc/motd")}
    assert found["user.dutchman.layer"] == plane.chain.encode()
    assert found["user.dutchman.digest"].startswith(b"sha256:")
    assert found["user.dutchman.created_by"] == b"RUN it" and found["user.dutchman.media_type"] == b"a/b"
    with pytest.raises(OSError, match="No data"):
        os.getxattr(tree / "etc/motd", "user.none")


def test_a_directory_is_bound_anew_when_it_is_another(plane: Process, tmp_path: Path) -> None:
    for name in ("one", "two", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    target = str(tmp_path / "target")
    assert plane.order(bind=target, directory=str(tmp_path / "one"))["bound"] is True
    assert plane.order(bind=target, directory=str(tmp_path / "one"))["bound"] is False
    assert os.listdir(target) == ["one"]
    assert plane.order(bind=target, directory=str(tmp_path / "two"))["bound"] is True
    assert os.listdir(target) == ["two"]
    plane.order(unbind=target)
    assert os.listdir(target) == ["target"]


def test_a_bad_order_is_answered(plane: Process, tmp_path: Path) -> None:
    for order in (
        {"bind": str(tmp_path / "none"), **plane.tree},
        {"bind": str(tmp_path), "image": str(tmp_path / "none"), "devices": plane.tree["devices"]},
        {"bind": str(tmp_path), "image": plane.tree["devices"][0], "devices": []},
        {"bind": str(tmp_path), "directory": str(tmp_path / "none")},
    ):
        assert plane.order(**order)["ok"] is False
    assert not hostmounts.is_mounted(tmp_path)


# --- with a daemon ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_busybox(engine, Cmd=["sleep", "inf"])
        add_image(engine, "docker.io/library/small:1", SMALL)
    return tmp_path


def test_binds_come_and_go_with_what_they_show(store: Path) -> None:
    with Daemon(store) as daemon:
        digest = os.readlink(daemon.mount / "images/small:1")
        eventually(lambda: daemon.bound(f"images/{digest}/rootfs"))
        assert daemon.sh("cat images/small:1/rootfs/etc/motd") == "ahoy\n"
        daemon.sh("mkdir volumes/v containers/c; echo small:1 > containers/c/config/image")
        eventually(lambda: daemon.bound("volumes/v/data"))
        daemon.sh("echo kept > volumes/v/data/f; echo mine > containers/c/rootfs/etc/mine")
        daemon.sh("sleep 1.1; ls containers/c/rootfs")
        eventually(lambda: daemon.run("ls containers/c/rootfs").returncode == 0 and daemon.bound("containers/c/rootfs"))
        assert daemon.sh("cat containers/c/rootfs/etc/mine volumes/v/data/f") == "mine\nkept\n"
        daemon.sh("rmdir containers/c volumes/v")
        eventually(lambda: not daemon.bound("containers/c/rootfs") and not daemon.bound("volumes/v/data"))
        daemon.sh("echo remove > images/small:1/ctl")
        eventually(lambda: not daemon.bound(f"images/{digest}/rootfs"))
        daemon.refused("ls images/small:1", "No such file")
    assert not [point for point, _, _ in hostmounts.mounts() if point.startswith(str(store))]


def test_without_its_data_process_the_mount_goes_on(store: Path) -> None:
    with Daemon(store) as daemon:
        digest = os.readlink(daemon.mount / "images/small:1")
        eventually(lambda: daemon.bound(f"images/{digest}/rootfs"))
        pid = daemon.sh("grep ^pid status").split()[1]
        found = subprocess.run(["pgrep", "-P", pid, "-f", "fdfs.binds"], capture_output=True, text=True).stdout.split()
        assert len(found) == 1
        os.kill(int(found[0]), signal.SIGKILL)
        eventually(lambda: daemon.run("cat images/small:1/rootfs/etc/motd").stdout == "ahoy\n")
        eventually(lambda: daemon.bound(f"images/{digest}/rootfs"))
        assert daemon.sh("ls volumes")


def test_a_killed_daemon_leaves_a_mount_that_the_next_one_recovers(store: Path) -> None:
    daemon = Daemon(store)
    try:
        daemon.start()
        daemon.sh("mkdir containers/kept")
        daemon.kill()
        with pytest.raises(OSError, match=r"."):
            os.listdir(daemon.mount)
        eventually(lambda: not [p for p, _, _ in hostmounts.mounts() if p.startswith(f"{daemon.mount}/images")])
        daemon.start()
        assert "kept" in daemon.sh("ls containers")
        assert daemon.sh("cat images/small:1/rootfs/etc/motd") == "ahoy\n"
    finally:
        daemon.stop()


def test_a_second_daemon_is_refused_and_told_who_holds_the_store(store: Path) -> None:
    with Daemon(store) as daemon:
        assert daemon.process is not None
        second = Daemon(store)
        second.mount = store / "elsewhere"
        with pytest.raises(RuntimeError, match=f"pid {daemon.process.pid}"):
            second.start()
        assert daemon.sh("cat version")


def test_a_mount_in_use_is_refused(store: Path, tmp_path: Path) -> None:
    with Daemon(store) as daemon:
        command = [sys.executable, "-m", "fdfs.daemon", "--store", tmp_path / "other", "--mount", daemon.mount]
        second = subprocess.run([*command, "--runtime", "fake"], capture_output=True, text=True, cwd=ROOT, timeout=20)
        assert second.returncode == 1 and "already a mount point" in second.stderr
        assert daemon.sh("cat version")


def test_ending_by_a_file(store: Path) -> None:
    with Daemon(store) as daemon:
        assert daemon.process is not None
        daemon.sh("echo down > ctl")
        assert daemon.process.wait(10) == 0
        assert not hostmounts.is_mounted(daemon.mount)


@pytest.mark.parametrize("binds", [True, False])
def test_others_are_held_to_the_modes_of_files(binds: bool) -> None:
    """With --allow-other: another user may use what modes allow, and what he makes is his."""
    place = Path(tempfile.mkdtemp())
    try:
        os.chmod(place, 0o755)
        with Daemon(place, binds=binds, allow_other=True) as daemon:
            daemon.sh("mkdir volumes/v; cd volumes/v/data; echo s > secret; chmod 600 secret; mkdir -m 1777 open")
            other = "setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '{}'"
            assert daemon.sh(other.format("cat version"))
            daemon.refused(other.format("cat volumes/v/data/secret"), "Permission denied")
            daemon.refused(other.format("echo x > volumes/v/data/new"), "Permission denied")
            daemon.refused(other.format("rmdir volumes/v"), "Permission denied")
            daemon.refused(other.format("echo create x > volumes/ctl"), "Permission denied")
            daemon.sh(other.format("umask 027; cd volumes/v/data/open; echo y > f; mkdir d; ln -s f s"))
            shown = daemon.sh("cd volumes/v/data/open; stat -c %u:%g:%a f d; stat -c %u s").split()
            assert shown == ["65534:65534:640", "65534:65534:750", "65534"]
            daemon.sh("rmdir volumes/v")
    finally:
        shutil.rmtree(place)


def test_a_listing_of_links_mounts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ls -l images` reads every tag: four in a second may be about to be followed, more are a listing."""
    now = 100.0
    monkeypatch.setattr("fdfs.binder.time.monotonic", lambda: now)
    with Engine(tmp_path / "store", runtime="fake") as engine:
        binder = Binder(engine, TREE, tmp_path / "mnt")
        seen = [(binder._listed(), binder._unbound(b"/images/by-digest/%d/rootfs" % n))[0] for n in range(6)]
        assert seen == [False] * 4 + [True] * 2
        now = 101.0  # it has ended
        assert not binder._listed()
