"""Volumes and bind mounts in virtual machines through the real mount: by 9p and by virtiofs, shared with each other and
with the host."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import demo_archive, wait_for
from guestkernel import share_kernels
from mounting import Daemon, can_mount
from runtimebench import SLOW, no_vm, skip_or_fail

from engine.runtimes.vm import virtiofs

START = 240.0  # seconds for a machine to boot on a busy host
KINDS = {"nine": "9p", "fs": "virtiofs"}  # container -> how it has its mounts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vmshares")
    (place / "host/sub").mkdir(parents=True)
    (place / "host/one").write_text("one\n")
    (place / "host/two").write_text("two\n")
    os.chown(place / "host/two", 1234, 2345)
    os.chmod(place / "host/two", 0o640)
    for name in KINDS:
        for kind in ("given", "mapped"):
            (place / name / kind).mkdir(parents=True)
            (place / name / kind / "file").write_text(f"{kind}\n")
            for path in (place / name / kind, place / name / kind / "file"):
                os.chown(path, 500, 501)
        (place / name / "one").write_text("one\n")
        os.chmod(place / name / "one", 0o600)
    return place


@pytest.fixture(scope="module")
def daemon(place: Path) -> Iterator[Daemon]:
    """Both containers run, and have a volume and mounts of the host in common."""
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    if not virtiofs.find():
        skip_or_fail("virtiofsd is not installed (qemu-system-common)")
    share_kernels(place / "store")
    host = place / "host"
    mounts = (f"{host}:/host", f"{host}:/hostro:ro", f"{host}/one:/etc/one", f"{host}/two:/etc/two:ro", "v:/vol")
    with Daemon(place, runtime="vm", env={"DUTCHMAN_MOUNT": str(place / "mnt")}) as daemon:
        daemon.sh(f"echo 'load {demo_archive()}' > images/ctl; mkdir volumes/v")
        wait_for(lambda: "demo:1" in os.listdir(daemon.mount / "images"), 60)
        for name, kind in KINDS.items():
            daemon.sh(f"mkdir containers/{name}; cd containers/{name}/config; echo demo:1 > image")
            daemon.sh(f"cd containers/{name}/config; printf 'sleep\\n1000\\n' > command")
            own = (
                f"{place / name}/given:/given:U",
                f"{place / name}/mapped:/mapped:idmap",
                f"{place / name}/one:/one:U",
            )
            daemon.sh(f"cd containers/{name}/config; printf '%s\\n' {' '.join((*mounts, *own))} > volumes")
            daemon.sh(f"echo 1000:1001 > containers/{name}/config/user")
            daemon.sh(f"echo 64m > containers/{name}/config/disk_size")
            daemon.sh(f"echo {'true' if kind == '9p' else 'false'} > containers/{name}/config/fast_start")
            daemon.sh(f"echo start > containers/{name}/ctl || cat containers/{name}/error", timeout=START)
            state = daemon.mount / "containers" / name / "state"
            wait_for(lambda state=state: state.read_text() != "starting\n", START)
            assert state.read_text() == "running\n", daemon.sh(f"cat containers/{name}/error")
        yield daemon
        for name in KINDS:
            daemon.run(f"echo kill > containers/{name}/ctl")


def inside(daemon: Daemon, name: str, script: str, user: str = "0:0") -> str:
    """Output of a shell script in the container; its errors, too."""
    return daemon.sh(f"{sys.executable} -m fdfs exec --user {user} {name} sh -c '{script}' 2>&1", timeout=120)


@pytest.mark.parametrize("name", KINDS)
def test_mounts_of_the_host(daemon: Daemon, place: Path, name: str) -> None:
    assert f" /vol type {KINDS[name]} " in inside(daemon, name, "mount")
    assert inside(daemon, name, "cat /etc/one /etc/two") == "one\ntwo\n"
    assert inside(daemon, name, "stat -c %u:%g:%a /etc/two /host/two").split() == ["1234:2345:640"] * 2
    refused = inside(daemon, name, "echo x > /etc/two; echo x > /hostro/new; rm /hostro/one; true")
    assert refused.count("Read-only file system") == 3
    inside(daemon, name, "cd /host; echo a > f; chown 77:88 f; chmod 4751 f; ln f hard; ln -s f link; mv f sub/f")
    info = os.lstat(place / "host/sub/f")
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode), info.st_nlink) == (77, 88, 0o4751, 2)
    assert os.readlink(place / "host/link") == "f"
    assert inside(daemon, name, "cd /host; rm hard link sub/f; ls").split() == ["one", "sub", "two"]
    made = inside(daemon, name, "mkfifo /host/fifo && rm /host/fifo && echo made; true")
    assert ("made" in made) == (KINDS[name] == "virtiofs")  # QEMU's 9p makes no special files: README, Limits


@pytest.mark.parametrize("name", KINDS)
def test_owners_are_as_the_container_should_see_them(daemon: Daemon, place: Path, name: str) -> None:
    """An ordinary user of the container has what is given to it or mapped, and makes files of its own there."""
    seen = inside(daemon, name, "stat -c %u:%g /given /given/file /mapped /mapped/file /one", "1000:1001")
    assert seen.split() == ["1000:1001"] * 5
    script = "for d in given mapped; do echo a > /$d/new; mkdir /$d/dir; ln -s new /$d/link; chmod 600 /$d/new; done"
    assert not inside(daemon, name, f"{script}; echo b >> /one; echo b >> /mapped/file", "1000:1001")
    assert "ermission denied" in inside(daemon, name, "echo c > /host/no; true", "1000:1001")
    for kind, (uid, gid) in (("given", (1000, 1001)), ("mapped", (500, 501))):
        for path in ("", "file", "new", "dir", "link"):
            info = os.lstat(place / name / kind / path)
            assert (info.st_uid, info.st_gid) == (uid, gid), (kind, path)
    assert (place / name / "one").read_text() == "one\nb\n" and os.stat(place / name / "one").st_uid == 1000


def test_a_full_disk_is_an_error_inside_and_through_the_mount(daemon: Daemon) -> None:
    assert "No space left" in inside(daemon, "fs", "dd if=/dev/zero of=/big bs=1M count=100; true")
    refused = daemon.run("cp /bin/busybox containers/fs/rootfs/more", timeout=60)
    assert refused.returncode != 0 and "No space left" in refused.stderr
    daemon.sh("rm -f containers/fs/rootfs/big containers/fs/rootfs/more", timeout=60)
    daemon.sh("cp /bin/busybox containers/fs/rootfs/more; cmp /bin/busybox containers/fs/rootfs/more", timeout=60)
    id = daemon.sh("cat containers/fs/id").strip()
    assert (daemon.store / "containers" / id / "vm/upper.ext4").stat().st_size == 64 << 20


def test_one_volume_of_two_machines_and_the_host(daemon: Daemon) -> None:
    data = daemon.mount / "volumes/v/data/f"
    data.write_text("host\n")
    for name in KINDS:
        assert inside(daemon, name, "cat /vol/f").startswith("host\n")
        inside(daemon, name, f"echo {name} >> /vol/f")
    for name in KINDS:
        assert inside(daemon, name, "cat /vol/f") == "host\nnine\nfs\n"
    assert data.read_text() == "host\nnine\nfs\n"
    with open(data, "r+b", buffering=0) as file:
        file.write(b"HOST")  # in place: the same size
    for name in KINDS:
        wait_for(lambda name=name: inside(daemon, name, "cat /vol/f").startswith("HOST\n"), 30)
    inside(daemon, "nine", "mv /vol/f /vol/g; mkdir /vol/d")
    wait_for(lambda: inside(daemon, "fs", "ls /vol").split() == ["d", "g"], 30)
    inside(daemon, "fs", "rm -r /vol/g /vol/d")
    assert not os.listdir(data.parent)


if SLOW:

    def test_what_two_machines_append_is_all_there_with_consistent(daemon: Daemon) -> None:
        """Each by 9p, each with the file open all the while."""
        script = (
            "while [ ! -e /vol/go ]; do :; done; i=0; while [ $i -lt 200 ]; do echo $0; i=$((i+1)); done >> /vol/log"
        )
        for name in ("one", "two"):
            daemon.sh(f"mkdir containers/{name}; cd containers/{name}/config; echo demo:1 > image")
            daemon.sh(f"echo v:/vol:consistent > containers/{name}/config/volumes")
            with open(daemon.mount / "containers" / name / "config/command", "w") as file:
                file.write(f"sh\n-c\n{script}\n{name}\n")
            daemon.sh(f"echo start > containers/{name}/ctl", timeout=START)
            state = daemon.mount / "containers" / name / "state"
            wait_for(lambda state=state: state.read_text() == "running\n", START)
        data = daemon.mount / "volumes/v/data"
        (data / "go").touch()
        for name in ("one", "two"):
            daemon.until(f"cat containers/{name}/state", "stopped", seconds=START)
        lines = (data / "log").read_text().split()
        assert (lines.count("one"), lines.count("two"), len(lines)) == (200, 200, 400)
        daemon.sh("rm volumes/v/data/log volumes/v/data/go; rmdir containers/one containers/two", timeout=60)
