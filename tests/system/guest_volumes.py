"""Volumes on file systems that share blocks (btrfs, xfs), and one on an NFS server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import add_busybox
from mounting import Daemon

from engine import hostmounts
from engine.engine import Engine

BIG = 200 << 20  # bytes of a file that is cloned


def run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}"


@pytest.fixture(params=["btrfs", "xfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    image, place = tmp_path / "disk", tmp_path / "place"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(1 << 30)
    run(f"mkfs.{request.param}", image)
    run("mount", "-o", "loop", image, place)
    yield place
    hostmounts.unmount(place)


def used(place: Path) -> int:
    os.sync()
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def finish(daemon: Daemon, directory: str, line: str) -> None:
    daemon.sh(f"echo '{line}' > {directory}/ctl", timeout=300)


def test_clones_and_snapshots_share_their_blocks(sharing: Path) -> None:
    daemon = Daemon(sharing, runtime="oci")
    with daemon:
        daemon.sh("mkdir volumes/one")
        daemon.sh(f"head -c {BIG} /dev/urandom > volumes/one/data/big", timeout=300)
        before = used(sharing)
        finish(daemon, "volumes/one", "clone two")
        daemon.until("ls volumes", "two", seconds=120)
        finish(daemon, "volumes/one", "snapshot three")
        daemon.until("ls volumes", "three", seconds=120)
        more = used(sharing) - before
        assert more < BIG // 4, f"two copies took {more} bytes of {BIG}"
        daemon.sh("echo changed | dd of=volumes/two/data/big conv=notrunc")
        daemon.sh("cmp volumes/one/data/big volumes/three/data/big", timeout=300)
        daemon.refused("cmp volumes/one/data/big volumes/two/data/big", "")


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """A directory that this machine's own NFS server gives away, version 4 only."""
    place = tmp_path / "export"
    place.mkdir()
    (place / "there").write_text("from afar\n")
    run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
    Path("/var/lib/nfs/v4recovery").mkdir(parents=True, exist_ok=True)
    run("exportfs", "-o", "rw,no_root_squash,insecure,no_subtree_check,fsid=0", f"127.0.0.1:{place}")
    run("rpc.nfsd", "-N", "3", "-V", "4", "2")
    server = subprocess.Popen(["rpc.mountd", "-F", "-N", "3"])
    yield place
    run("rpc.nfsd", "0")
    server.terminate()
    server.wait(30)
    run("exportfs", "-ua")
    run("umount", "/proc/fs/nfsd")


def test_an_nfs_volume_is_mounted_while_it_is_used(export: Path, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "d", runtime="oci")
    daemon.store.mkdir(parents=True)
    with Engine(daemon.store, runtime="oci") as engine:
        add_busybox(engine)
    with daemon:
        daemon.sh("echo 'create far type=nfs4 device=:/ o=addr=127.0.0.1,rw,vers=4.2' > volumes/ctl")
        daemon.sh("mkdir containers/c")
        script = "cat /v/there; echo back > /v/new; sleep 600"
        config = json.dumps({"image": "busybox", "volumes": ["far:/v"], "command": ["sh", "-c", script]})
        (daemon.mount / "containers/c/config.yaml").write_text(config)
        daemon.sh("echo start > containers/c/ctl", timeout=120)
        daemon.until("cat containers/c/logs/stdout", "from afar", seconds=120)
        daemon.until(f"cat {export}/new", "back", seconds=60)
        assert [kind for point, kind, _ in hostmounts.mounts() if point.endswith("/volumes/far/data") or "nfs4" in kind]
        assert daemon.sh("cat volumes/far/mounted volumes/far/data/there") == "1\nfrom afar\n"
        daemon.kill()
        daemon.start()
        assert daemon.sh("cat volumes/far/mounted containers/c/state") == "1\nrunning\n"
        daemon.sh("echo kill > containers/c/ctl")
        daemon.until("cat volumes/far/mounted", "0", seconds=60)
        daemon.sh("rmdir containers/c volumes/far")
        assert (export / "new").read_text() == "back\n"
