"""A container in a virtual machine through the real mount: its files while it runs, and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import manyfiles
import pytest
from dutchman import demo_archive, wait_for
from guestkernel import share_kernels
from mounting import Daemon, can_mount
from runtimebench import SLOW, bench_of

from engine import loops
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.pausing import Pausing


def status(directory: Path) -> str:
    """What QEMU says of a container's machine."""
    return str(Pausing(lambda _: directory / "run/vm")._qmp("", "query-status")["status"])


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if reason := can_mount():
        pytest.skip(reason)
    bench_of("vm", tmp_path / "bench").close()  # skips where there is no virtual machine
    daemon = Daemon(tmp_path, runtime="oci")
    share_kernels(daemon.store)
    with daemon:
        daemon.sh(f"echo 'load {demo_archive()}' > images/ctl")
        wait_for(lambda: "demo:1" in os.listdir(daemon.mount / "images"), 60)
        yield daemon
        daemon.run("echo kill > containers/m/ctl")


def test_files_of_a_machine(daemon: Daemon, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    daemon.sh("mkdir containers/m; cd containers/m/config; echo demo:1 > image; echo vm > runtime")
    daemon.sh("printf 'sleep\\n1000\\n' > containers/m/config/command")
    # people look in all the while: nobody gets at the disk that the guest is about to have
    look = "while :; do ls containers/m/{rootfs,diff}; cat containers/m/changes; sleep 0.01; done &>/dev/null"
    onlooker = subprocess.Popen(["bash", "-c", look], cwd=daemon.mount)
    request.addfinalizer(onlooker.kill)
    daemon.sh("echo start > containers/m/ctl || cat containers/m/error", timeout=120)
    wait_for(lambda: daemon.sh("cat containers/m/state").strip() != "starting", 120)
    assert daemon.sh("cat containers/m/state").strip() == "running", daemon.sh("cat containers/m/error")
    onlooker.kill()
    onlooker.wait()
    [directory] = (daemon.store / "containers").iterdir()
    assert loops.of(directory / "vm/upper.ext4") is None
    place = daemon.mount / "containers/m/rootfs"
    assert "busybox" in os.listdir(place / "bin")
    daemon.sh(
        "cd containers/m/rootfs; echo text > new; mkdir -p d/e; ln -s ../new d/link; ln new hard; mv hard d/;"
        " chmod 640 new; chown 5:6 new; echo more >> new; rm etc/hostname 2>/dev/null; cp -a etc d/copy;"
        " head -c 3000000 /dev/urandom"
        " | dd of=d/big bs=1M iflag=fullblock status=none; cmp <(cat d/big) d/big; touch -d @1000 d/e; cat d/link",
        timeout=120,
    )
    assert os.stat(directory / "vm/scratch").st_blocks  # by it came what is big
    st = os.lstat(place / "new")
    assert (st.st_mode & 0o777, st.st_uid, st.st_gid, st.st_nlink) == (0o640, 5, 6, 2)
    assert os.lstat(place / "d/e").st_mtime == 1000
    assert "new" in os.listdir(daemon.mount / "containers/m/diff")
    big = (place / "d/big").read_bytes()
    with open(place / "gone", "w+") as file:
        file.write("kept")
        file.flush()
        os.unlink(place / "gone")
        assert os.fstat(file.fileno()).st_size == 4
    daemon.sh("echo 'run sh -c \"cat /new; ls -a / | grep -c fuse\"' > containers/m/exec/ctl", timeout=60)
    wait_for(lambda: daemon.run("grep . containers/m/exec/1/exit_code").returncode == 0, 60)
    assert daemon.sh("cat containers/m/exec/1/stdout") == "text\nmore\n0\n"
    # as one stream: by the command, both ways
    small, back = tmp_path / "small", tmp_path / "back"
    manyfiles.make(small, 120)
    (small / "d1/big").write_bytes(os.urandom(200_000))
    cp = f"{sys.executable} -m fdfs cp --mount {daemon.mount}"
    daemon.sh(f"{cp} -a {small} m:/srv/small && {cp} -a m:/srv/small {back}", timeout=120)
    assert manyfiles.facts(back) == manyfiles.facts(small) == manyfiles.facts(place / "srv/small")
    daemon.sh(
        f"cd {tmp_path}; ln small/d1/big small/hard; setfattr -n user.kept -v yes small/hard; mkdir out;"
        f" tar --format=pax --xattrs -C small -c . | {cp} - m:/d/e;"
        f" {cp} m:/d/e - | tar --xattrs -C out -xp; mv out/e .",
        timeout=120,
    )
    assert manyfiles.facts(tmp_path / "e") == manyfiles.facts(small) == manyfiles.facts(place / "d/e")
    assert (tmp_path / "e/hard").stat().st_nlink == 2 == os.stat(place / "d/e/hard").st_nlink
    assert os.getxattr(tmp_path / "e/hard", "user.kept") == b"yes" == os.getxattr(place / "d/e/hard", "user.kept")
    done = daemon.run(f"{cp} {small} m:/new", timeout=60)  # a file is in the way
    assert (done.returncode, done.stdout) == (1, ""), done
    done = daemon.run(f"tar -C {small} -c d1 | {cp} - m:/bin/busybox", timeout=60)
    assert done.returncode == 1 and "Not a directory" in done.stderr, done
    daemon.sh(
        """exec 3<>containers/m/tar; echo '{"out": "/etc", "as": "x"}' >&3; tar -t <&3 | grep -q x/group; exec 3>&-;"""
        """ echo nonsense > containers/m/tar || grep -q 'a line of JSON expected' containers/m/error""",
        timeout=60,
    )
    daemon.sh("rm -r containers/m/rootfs/srv/small; rm -r containers/m/rootfs/d/e; mkdir -p containers/m/rootfs/d/e")
    daemon.sh("touch -d @1000 containers/m/rootfs/d/e")
    # what it changed, while it runs
    daemon.sh("cd containers/m/rootfs; rm -r srv etc/group; mkdir srv; setfattr -n user.kept -v yes d/big")
    told = daemon.sh("cat containers/m/changes").splitlines()
    assert {"A /new", "A /d/link", "D /etc/group", "M /srv", "D /srv/hello.txt"} <= set(told)
    daemon.sh("echo 'commit demo:c' > containers/m/ctl")
    wait_for(lambda: "demo:c" in os.listdir(daemon.mount / "images"), 120)
    image = daemon.mount / "images/demo:c/rootfs"
    assert (image / "d/big").read_bytes() == big
    assert os.getxattr(image / "d/big", "user.kept") == b"yes"
    assert os.readlink(image / "d/link") == "../new"
    assert os.lstat(image / "new").st_ino == os.lstat(image / "d/hard").st_ino
    assert (os.lstat(image / "new").st_uid, os.lstat(image / "d/e").st_mtime) == (5, 1000)
    assert not os.listdir(image / "srv")
    assert daemon.sh("cat containers/m/state").strip() == "running"
    # an engine that is killed while it holds the processes still leaves them running
    held = GuestFiles(directory / "run/vm/agent.sock")
    for command, code in (("echo two > behind", 0), ("cat behind", 1)):  # a name the kernel still believes
        (place / "behind").write_text("one")
        assert os.stat(place / "behind").st_size == 3
        held.change("UNLINK", "container", b"behind", {})
        done = daemon.run(f"cd containers/m/rootfs; {command}", timeout=60)
        assert done.returncode == code and "Stale" not in done.stderr, done
    held.call("FREEZE", {"state": 1}, 60)
    held.close()
    daemon.sh("echo 'run echo goes on' > containers/m/exec/ctl", timeout=60)
    wait_for(lambda: daemon.run("grep . containers/m/exec/2/exit_code").returncode == 0, 60)
    # its own directory by du(1), which takes two places of one inode number for a circle
    done = daemon.run("du -s --exclude=proc --exclude=sys containers/m/diff containers/m/rootfs", timeout=60)
    assert "ircular" not in done.stderr
    sizes = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert sizes[0] >= 3000000 // 1024 and sizes[1] >= sizes[0]
    # paused: it tells what it changed, and nothing in it runs for that; nobody else has its files
    daemon.sh("echo 'run sh -c \"while :; do echo >> /ticks; done\"' > containers/m/exec/ctl", timeout=60)
    wait_for(lambda: (place / "ticks").exists() and os.stat(place / "ticks").st_size > 0, 60)
    told = daemon.sh("echo pause > containers/m/ctl; cat containers/m/changes", timeout=60)
    assert {"A /new", "A /d/link", "D /srv/hello.txt", "A /ticks"} <= set(told.splitlines())
    for reference in ("demo:p1", "demo:p2"):
        daemon.sh(f"echo 'commit {reference}' > containers/m/ctl")
        wait_for(lambda reference=reference: reference in os.listdir(daemon.mount / "images"), 120)
        assert daemon.sh("cat containers/m/changes containers/m/state", timeout=60) == f"{told}paused\n"
    daemon.sh("cd images; cmp demo:p1/rootfs/ticks demo:p2/rootfs/ticks; test -s demo:p2/rootfs/ticks")
    ticks = (daemon.mount / "images/demo:p2/rootfs/ticks").stat().st_size
    daemon.sh(
        "cd containers/m; ls rootfs diff; cp rootfs/ticks rootfs/asleep; cat rootfs/asleep | cmp rootfs/ticks",
        timeout=60,
    )
    assert os.stat(place / "asleep").st_size == ticks
    wait_for(lambda: status(directory) == "paused", 60)  # QEMU's word
    daemon.sh("cmp containers/m/rootfs/ticks containers/m/rootfs/asleep; cat containers/m/state", timeout=60)
    # paused anew while it was awake for its files
    daemon.sh(
        "cd containers/m; ls rootfs/bin; echo resume > ctl; echo pause > ctl; cat state rootfs/new; ls -la", timeout=60
    )
    wait_for(lambda: status(directory) == "paused", 60)
    ticks = os.stat(place / "ticks").st_size
    daemon.sh("echo resume > containers/m/ctl; cat containers/m/rootfs/new", timeout=60)
    wait_for(lambda: os.stat(place / "ticks").st_size > ticks, 60)
    daemon.sh("echo kill > containers/m/exec/3/ctl", timeout=60)
    # a machine that hangs: an error within the deadline, and the rest of the mount goes on
    pid = int((directory / "run/vm/qemu.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        daemon.sh("ls -la containers/m", timeout=60)
        done = daemon.run("ls containers/m/rootfs/lib; cat containers/m/state", timeout=60)
        assert "timed out" in done.stderr and done.stdout.strip() == "running"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: daemon.run("ls containers/m/rootfs/bin").returncode == 0, 60)
    # killed, without a sync: what it wrote is there as with every other driver
    daemon.sh("echo kill > containers/m/ctl")
    wait_for(lambda: daemon.sh("cat containers/m/state").strip() == "stopped", 60)
    check = subprocess.run(["e2fsck", "-p", directory / "vm/upper.ext4"], capture_output=True)  # its journal
    assert not check.returncode & ~1, check.stdout
    assert subprocess.run(["e2fsck", "-fn", directory / "vm/upper.ext4"], capture_output=True).returncode == 0
    # what it wrote is on its disk, which the host mounts now
    assert (place / "new").read_text() == "text\nmore\n"
    assert (place / "d/big").read_bytes() == big
    assert {"A /new", "A /d"} <= set(daemon.sh("cat containers/m/changes").splitlines())


if SLOW:

    @pytest.mark.timeout(1800)
    def test_ten_thousand_files_go_in_and_out_of_a_machine(daemon: Daemon, tmp_path: Path) -> None:
        manyfiles.make(tmp_path / "many", 10_000)
        given = manyfiles.facts(tmp_path / "many")
        assert len(given) == 10_000 + manyfiles.FOLDERS + 1
        daemon.sh("mkdir containers/m; cd containers/m/config; echo demo:1 > image; echo vm > runtime")
        daemon.sh(r"printf 'sleep\n100000\n' > containers/m/config/command")
        daemon.sh("echo start > containers/m/ctl", timeout=120)
        wait_for(lambda: daemon.sh("cat containers/m/state").strip() == "running", 120)
        inside = daemon.mount / "containers/m/rootfs/many"
        daemon.sh(f"cp -a {tmp_path}/many containers/m/rootfs/", timeout=900)
        daemon.sh(f"cp -a containers/m/rootfs/many {tmp_path}/back", timeout=900)
        assert manyfiles.facts(tmp_path / "back") == given
        # and as a process in it sees them
        daemon.sh("echo 'run sh -c \"find /many | wc -l\"' > containers/m/exec/ctl", timeout=60)
        wait_for(lambda: daemon.run("grep . containers/m/exec/1/exit_code").returncode == 0, 120)
        assert int(daemon.sh("cat containers/m/exec/1/stdout")) == len(given)
        daemon.sh("rm -r containers/m/rootfs/many/d[5-9]*", timeout=900)
        left = {path: fact for path, fact in given.items() if path[:2] not in ("d5", "d6", "d7", "d8", "d9")}
        assert 4_000 < len(left) < 5_000
        # on its disk, once it has ended
        daemon.sh("echo 'stop 0' > containers/m/ctl", timeout=60)
        wait_for(lambda: daemon.sh("cat containers/m/state").strip() == "stopped", 60)
        found = manyfiles.facts(inside)
        assert found.pop(".") != left.pop(".")  # when it was last changed
        assert found == left
