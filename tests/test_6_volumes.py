"""Volumes through a real mount: their files, drivers, copies, the plan, and kill -9 in the middle."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import eventually
from mounting import ROOT, Daemon, can_mount
from ociimages import busybox_rootfs_tar, make_layout

from engine import host, hostmounts


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if not (host.LINUX and host.is_root()) or (reason := can_mount()):
        pytest.skip("needs root on Linux and FUSE" if not host.is_root() else str(reason))
    place = tmp_path_factory.mktemp("volumes")
    files = {"data": None, "data/given": b"given\n"}
    make_layout(place / "layout", [busybox_rootfs_tar(), files], config={"Volumes": {"/data": {}}}, reference="box:1")
    with Daemon(place, runtime="oci") as daemon:
        finish(daemon, "images", f"load {place}/layout")
        yield daemon
        daemon.sh("for c in $(ls containers); do [ -d containers/$c ] && { echo kill > containers/$c/ctl; "
                  "rmdir containers/$c; } 2>/dev/null; done; true")  # fmt: skip


def begin(daemon: Daemon, directory: str, line: str) -> str:
    """Write a line that starts a job; the job's directory."""
    return daemon.sh(f"exec 3<>{directory}/ctl; echo '{line}' >&3; cat <&3").strip()


def finish(daemon: Daemon, directory: str, line: str, state: str = "done") -> str:
    """What the job said."""
    job = begin(daemon, directory, line)
    eventually(lambda: daemon.sh(f"cat {job}/state").strip() not in ("running",), 60)
    assert daemon.sh(f"cat {job}/state").strip() == state, daemon.sh(f"cat {job}/error")
    return daemon.sh(f"cat {job}/{'progress' if state == 'done' else 'error'}").strip()


def run(daemon: Daemon, name: str, script: str, volumes: str, more: str = "") -> None:
    daemon.sh(f"mkdir containers/{name}; cat > containers/{name}/config.yaml <<'X'\n"
              f"image: box:1\ncommand: [sh, -c, '{script}']\nvolumes: {volumes}\n{more}\nX\n"
              f"echo start > containers/{name}/ctl")  # fmt: skip


def ended(daemon: Daemon, name: str) -> str:
    daemon.until(f"cat containers/{name}/state", "stopped", seconds=30)
    return daemon.sh(f"cat containers/{name}/exit_code").strip()


def test_a_volume_shows_who_uses_it_and_stays_while_it_is_used(daemon: Daemon) -> None:
    daemon.sh("echo 'create shared label=tier=db label=a=b' > volumes/ctl")
    assert daemon.sh("cat volumes/shared/labels") == "tier=db\na=b\n"
    run(daemon, "one", "cat /v/given /v/x; sleep 60", "['shared:/v', '/data']")
    assert os.readlink(daemon.mount / "volumes/shared/used_by/one") == "../../../containers/one"
    assert daemon.sh("cat volumes/shared/used_by/one/state; ls volumes/shared/used_by") == "running\none\n"
    daemon.refused("rmdir volumes/shared", "Device or resource busy")
    assert "used by one" in daemon.sh("cat volumes/shared/error")
    links = daemon.sh("readlink containers/one/mounts/*").split()
    assert links[0] == "../../../volumes/shared/data" and re.fullmatch(r"../../../volumes/[0-9a-f]{64}/data", links[1])
    assert daemon.sh("cat containers/one/mounts/1/given") == "given\n"  # the image's content, in its anonymous volume
    daemon.sh("echo kill > containers/one/ctl")
    ended(daemon, "one")
    daemon.sh("rmdir containers/one")
    assert daemon.sh("ls volumes").split() == ["ctl", "error", "plan", "shared"]
    daemon.sh("rmdir volumes/shared")


def test_bad_options_are_refused_by_name(daemon: Daemon) -> None:
    for line, named in (
        ("create v driver=zfs", "zfs"),
        ("create v colour=red", "colour"),
        ("create v type=nfs", "device"),
        ("create v driver=ext4", "size"),
        ("create v driver=ext4 size=1k", "1k"),
        ("create v size=1g", "size"),
        ("create v read_only=perhaps", "perhaps"),
    ):
        daemon.refused(f"/usr/bin/printf '{line}\\n' > volumes/ctl", "Invalid argument")
        assert named in daemon.sh("head -4 volumes/error"), line
    assert daemon.sh("ls volumes").split() == ["ctl", "error", "plan"]


def test_an_ext4_volume_is_mounted_on_use_and_outlives_the_daemon(daemon: Daemon) -> None:
    daemon.sh("echo 'create disk driver=ext4 opt.size=16m' > volumes/ctl")
    assert daemon.sh("cat volumes/disk/driver volumes/disk/options volumes/disk/mounted") == "ext4\nsize=16m\n0\n"
    daemon.refused("touch volumes/disk/data/hidden", "Read-only file system")
    run(daemon, "full", "dd if=/dev/zero of=/v/big bs=1M count=64; echo $? > /v/../code; sleep 60", "['disk:/v']")
    daemon.until("cat containers/full/rootfs/code", "1", seconds=30)
    assert "No space left" in daemon.sh("cat containers/full/logs/stderr")
    assert daemon.sh("cat volumes/disk/mounted; rm volumes/disk/data/big; echo kept > volumes/disk/data/f") == "1\n"
    daemon.kill()
    daemon.start()
    assert daemon.sh("cat volumes/disk/mounted volumes/disk/data/f containers/full/state") == "1\nkept\nrunning\n"
    daemon.sh("echo kill > containers/full/ctl")
    daemon.until("cat volumes/disk/mounted", "0")
    assert finish(daemon, "volumes/disk", "clone disk2").startswith("disk2\n")
    run(daemon, "again", "cat /v/f; df -k /v | tail -1", "['disk2:/v']")
    assert ended(daemon, "again") == "0" and "kept" in daemon.sh("cat containers/again/logs/stdout")
    daemon.sh("rmdir containers/full containers/again")
    daemon.until("cat volumes/disk2/mounted", "0")
    daemon.sh("rmdir volumes/disk volumes/disk2")
    assert not [point for point, _, _ in hostmounts.mounts() if "/volumes/disk" in point]


def test_a_driver_of_others_outlives_the_daemon_too(daemon: Daemon, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tools" / "volume-drivers" / "dirs", daemon.store / "volume-drivers" / "dirs")
    daemon.refused("echo 'create far driver=dirs' > volumes/ctl", "Invalid argument")
    assert "dirs: check: it takes one option: root=DIRECTORY" in daemon.sh("cat volumes/error")
    daemon.sh(f"echo 'create far driver=dirs root={tmp_path}' > volumes/ctl")
    run(daemon, "away", "echo kept > /v/f; sleep 60", "['far:/v']")
    daemon.until("cat volumes/far/data/f", "kept")
    daemon.kill()
    (left,) = tmp_path.iterdir()
    notes = daemon.store / "volume-drivers" / ".made"
    dead = "0" * 32  # as if the daemon had been killed between the driver's creation and the volume's row
    (tmp_path / dead).mkdir()
    (notes / dead).write_text((notes / left.name).read_text().replace(left.name, dead))
    daemon.start()
    eventually(lambda: not (tmp_path / dead).exists() and not (notes / dead).exists())
    assert daemon.sh("cat volumes/far/mounted volumes/far/data/f containers/away/state") == "1\nkept\nrunning\n"
    daemon.sh("echo kill > containers/away/ctl")
    daemon.until("cat volumes/far/mounted", "0")
    assert finish(daemon, "volumes/far", "clone far2").startswith("far2\n")
    assert sorted(path.read_text() for path in tmp_path.glob("*/f")) == ["kept\n", "kept\n"]
    daemon.sh("rmdir containers/away; rmdir volumes/far volumes/far2")
    assert not list(tmp_path.iterdir()) and not list(notes.iterdir())


def test_snapshots_are_read_only_for_all(daemon: Daemon) -> None:
    daemon.sh("mkdir volumes/src; echo one > volumes/src/data/f; ln volumes/src/data/f volumes/src/data/g")
    assert finish(daemon, "volumes/src", "snapshot snap").startswith("snap\n")
    daemon.sh("echo two > volumes/src/data/f")
    assert daemon.sh("cat volumes/snap/data/f; stat -c %h volumes/snap/data/g; cat volumes/snap/options") == (
        "one\n2\nread_only=true\n"
    )
    daemon.refused("touch volumes/snap/data/x", "Read-only file system")
    run(daemon, "reader", "cat /s/f; touch /s/x", "['snap:/s']")
    assert ended(daemon, "reader") == "1" and daemon.sh("cat containers/reader/logs/stdout") == "one\n"
    for line, errno in (
        ("clone src", "File exists"),
        ("clone ../x", "Invalid argument"),
        ("clone", "Invalid argument"),
    ):
        daemon.refused(f"/usr/bin/printf '{line}\\n' > volumes/src/ctl", errno)
    daemon.sh("rmdir containers/reader volumes/snap volumes/src")


def test_out_and_in_again_all_or_nothing(daemon: Daemon, tmp_path: Path) -> None:
    daemon.sh("mkdir volumes/src volumes/dst; cd volumes/src/data; mkdir d; echo x > d/f; ln -s /etc/passwd l")
    finish(daemon, "volumes/src", f"export {tmp_path}/v.tar")
    daemon.refused(f"/usr/bin/printf 'export {tmp_path}/v.tar\\n' > volumes/src/ctl", "File exists")
    finish(daemon, "volumes/dst", f"import {tmp_path}/v.tar")
    assert daemon.sh("cat volumes/dst/data/d/f; readlink volumes/dst/data/l") == "x\n/etc/passwd\n"
    assert "not empty" in finish(daemon, "volumes/dst", f"import {tmp_path}/v.tar", "failed")
    assert "not empty" in daemon.sh("cat volumes/dst/error")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "v.tar").read_bytes()[:1800])
    daemon.sh("mkdir volumes/none")
    finish(daemon, "volumes/none", f"import {tmp_path}/cut.tar", "failed")
    assert daemon.sh("ls -A volumes/none/data") == ""
    assert os.listdir(daemon.store / "volumes/none") == ["data"]
    daemon.sh("rmdir volumes/src volumes/dst volumes/none")


def test_prune_takes_what_its_plan_shows(daemon: Daemon) -> None:
    daemon.sh("mkdir volumes/used volumes/idle; mkdir containers/keeps; echo used:/u > containers/keeps/config/volumes")
    plan = daemon.sh("cat volumes/plan").splitlines()
    assert plan[0].startswith("volume idle ") and plan[-2].startswith("total 1 volumes")
    daemon.refused("/usr/bin/printf 'prune\\n' > volumes/ctl", "Invalid argument")
    assert "volumes/plan" in daemon.sh("cat volumes/error")
    daemon.sh("mkdir volumes/late")
    daemon.refused(f"/usr/bin/printf '{plan[-1]}\\n' > volumes/ctl", "Device or resource busy")
    assert "2 volumes removed" in finish(daemon, "volumes", daemon.sh("tail -1 volumes/plan").strip())
    assert daemon.sh("ls volumes").split() == ["ctl", "error", "plan", "used"]
    daemon.sh("rmdir containers/keeps volumes/used")


def test_kill_9_while_copying_leaves_nothing_half(daemon: Daemon, tmp_path: Path) -> None:
    daemon.sh("mkdir volumes/many volumes/into; cd volumes/many/data; seq 1 4000 | xargs touch")
    with open(daemon.store / "volumes/many/data/big", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    finish(daemon, "volumes/many", f"export {tmp_path}/many.tar")
    places = (daemon.store / "tmp", daemon.store / "volumes/into")
    for directory, line in (("volumes/many", "clone half"), ("volumes/into", f"import {tmp_path}/many.tar")):
        begin(daemon, directory, line)
        eventually(
            lambda: any(name.startswith(("volume-new", ".dutchman")) for place in places for name in os.listdir(place))
        )
        daemon.kill()
        daemon.start()
        whole = len(daemon.sh("ls volumes/many/data").split())
        assert whole == 4001
        if "half" in daemon.sh("ls volumes").split():  # it was done before it was killed
            assert len(daemon.sh("ls -A volumes/half/data; rmdir volumes/half").split()) == whole
        assert len(daemon.sh("ls -A volumes/into/data").split()) in (0, whole)
        assert not [name for name in os.listdir(daemon.store / "tmp") if name.startswith("volume")]
        assert os.listdir(daemon.store / "volumes/into") == ["data"]
    daemon.sh("rmdir volumes/many volumes/into")
