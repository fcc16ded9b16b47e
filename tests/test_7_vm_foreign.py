"""A container of an image for another processor, in an emulated machine of that kind, through the mount. Slow.

`tools/setup slow` fetches Debian's kernel and busybox for arm64. What decides is in test_2_foreign.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestkernel import CACHE, copy_kernels
from mounting import Daemon, can_mount
from ociimages import busybox_rootfs_tar, make_layout
from runtimebench import SLOW, no_vm, skip_or_fail

from engine.runtimes.vm import agentbuild, driver

START = 240.0  # seconds for an emulated machine to boot on a busy host
LIFE = r"trap 'echo bye; exit 6' TERM; busybox uname -m; while :; do date +%s%N > /now; sleep 0.2; done"
pytestmark = pytest.mark.timeout(900)


def newest(pattern: str) -> Path:
    found = sorted(CACHE.parent.glob(pattern))
    if not found:
        skip_or_fail(f"no {pattern}: tools/setup slow gets it")
    return found[-1]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    if shutil.which("qemu-system-aarch64") is None:
        skip_or_fail("needs qemu-system-arm: tools/setup slow gets it")
    agentbuild.build("aarch64", driver.agents())  # else the first start waits for it, whatever else is missing
    place = tmp_path_factory.mktemp("foreign")
    subprocess.run(["dpkg-deb", "-x", newest("busybox-arm64/*.deb"), place / "deb"], check=True)
    busybox = next(path for path in (place / "deb").rglob("bin/busybox"))
    make_layout(place / "layout", [busybox_rootfs_tar(busybox)], platform="linux/arm64", reference="box:arm")
    make_layout(place / "layout", [busybox_rootfs_tar()], platform="linux/amd64", reference="box:1")
    (place / "store").mkdir()
    copy_kernels(place / "store")
    with Daemon(place, runtime="vm", env={"DUTCHMAN_STANDBY": "1"}) as daemon:
        daemon.sh(f"echo 'load {place}/layout' > images/ctl")
        daemon.until("ls images", "box:arm", seconds=60)
        yield daemon
        daemon.run("echo kill > containers/far/ctl")  # of a test that failed


def command(daemon: Daemon, text: str) -> None:
    (daemon.mount / "containers/far/config/command").write_text(f"sh\n-c\n{text}\n")


def start(daemon: Daemon, state: str = "running") -> None:
    before = daemon.run("grep -c aarch64 containers/far/logs/stdout").stdout.strip() or "0"
    daemon.run("echo start > containers/far/ctl", timeout=60)
    daemon.until("grep -qx starting containers/far/state || echo over", "over", seconds=START)
    if state == "stopped":
        daemon.until("cat containers/far/state", state, seconds=START)
    now = daemon.sh("cat containers/far/state").strip()
    assert now == state, daemon.run("cd containers/far; cat error reason logs/*").stdout
    if state == "running":  # its trap is set
        daemon.until("grep -c aarch64 containers/far/logs/stdout", f"{int(before) + 1}\n", seconds=60)


def qemu_of(daemon: Daemon) -> int:
    id = daemon.sh("cat containers/far/id").strip()
    return int((daemon.store / "containers" / id / "run" / "vm" / "qemu.pid").read_text())


def how(daemon: Daemon) -> str:
    id = daemon.sh("cat containers/far/id").strip()
    return (daemon.store / "containers" / id / "run" / "vm" / "how").read_text()


if SLOW:

    def test_what_is_missing_is_said(daemon: Daemon) -> None:
        daemon.sh("mkdir containers/far; echo box:arm > containers/far/config/image")
        daemon.sh("echo oci > containers/far/config/runtime")
        daemon.refused("echo start > containers/far/ctl", "Operation not supported")
        error = daemon.sh("cat containers/far/error")
        assert "the image is for linux/arm64, and this host is linux/amd64" in error and "--runtime vm" in error
        daemon.sh("echo vm > containers/far/config/runtime; echo > containers/far/error")
        daemon.refused("echo start > containers/far/ctl", "No such file or directory")
        error = daemon.sh("cat containers/far/error")
        assert "no guest kernel for aarch64 is here" in error and "arch=aarch64" in error
        daemon.sh(f"echo 'import {newest('kernels-arm64/*.deb')} arm arch=aarch64' > kernels/ctl")
        daemon.until("ls kernels", "arm", seconds=120)
        assert "arm" not in daemon.sh("readlink kernels/default; cat kernels/plan")
        (name,) = set(daemon.sh("ls kernels").split()) - {"arm", "ctl", "default", "error", "plan"}
        daemon.sh(f"echo {name} > containers/far/config/kernel")
        daemon.refused("echo start > containers/far/ctl", "Invalid argument")
        assert "is for x86_64, the guest is aarch64" in daemon.sh("cat containers/far/error")
        daemon.sh("echo > containers/far/config/kernel; echo true > containers/far/config/init")
        daemon.refused("echo start > containers/far/ctl", "Invalid argument")
        assert "init program is for x86_64" in daemon.sh("cat containers/far/error")
        daemon.sh("echo false > containers/far/config/init")
        assert "accelerator_aarch64 tcg" in daemon.sh("cat status")

    def test_it_runs_and_its_files_and_sessions_work(daemon: Daemon) -> None:
        daemon.sh("echo linux/arm64 > containers/far/config/platform")
        command(daemon, LIFE)
        start(daemon)
        daemon.until("cat containers/far/logs/stdout", "aarch64\n", seconds=60)
        assert "aarch64" in Path(f"/proc/{qemu_of(daemon)}/exe").resolve().name
        daemon.sh("echo there > containers/far/rootfs/hi; mkdir containers/far/rootfs/d", timeout=60)
        daemon.sh("echo 'run sh -c \"cat /hi; exit 4\"' > containers/far/exec/ctl", timeout=60)
        daemon.until("cat containers/far/exec/1/exit_code", "4", seconds=60)
        assert daemon.sh("cat containers/far/exec/1/stdout") == "there\n"
        daemon.until("cat containers/far/stats", "memory_bytes", seconds=60)
        daemon.until("cat containers/far/changes", "A /hi", seconds=60)
        # a seccomp filter is in force: that of its own architecture, or nothing would run
        daemon.sh("echo 'run busybox grep Seccomp: /proc/self/status' > containers/far/exec/ctl", timeout=60)
        daemon.until("cat containers/far/exec/2/exit_code", "0", seconds=60)
        assert daemon.sh("cat containers/far/exec/2/stdout").split() == ["Seccomp:", "2"]
        daemon.sh("echo pause > containers/far/ctl; grep -q paused containers/far/state", timeout=60)
        daemon.sh("echo resume > containers/far/ctl; grep -q running containers/far/state", timeout=60)

    def test_a_killed_daemon_finds_it_again_and_stops_it(daemon: Daemon) -> None:
        qemu = qemu_of(daemon)
        daemon.kill()
        daemon.unmount()
        daemon.start(60)
        assert daemon.sh("cat containers/far/state") == "running\n" and qemu_of(daemon) == qemu
        before = daemon.sh("cat containers/far/rootfs/now", timeout=60)
        daemon.until(f"cat containers/far/rootfs/now | grep -v {before.strip()}", "\n", seconds=60)
        daemon.run("echo 'stop 60' > containers/far/ctl")
        daemon.until("cat containers/far/state", "stopped", seconds=120)
        assert daemon.sh("cat containers/far/exit_code") == "6\n"
        assert daemon.sh("cat containers/far/logs/stdout").endswith("bye\n")
        assert daemon.sh("cat containers/far/rootfs/hi", timeout=60) == "there\n"

    def test_want_of_memory_and_a_program_of_the_host(daemon: Daemon) -> None:
        daemon.sh("echo 64m > containers/far/config/memory")
        command(daemon, "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done")
        start(daemon, "stopped")
        assert daemon.sh("cat containers/far/exit_code containers/far/oom").split() == ["137", "1"]
        shutil.copy("/bin/busybox", daemon.mount / "containers/far/rootfs/host-busybox")
        daemon.sh("chmod 755 containers/far/rootfs/host-busybox")
        daemon.sh("echo '/host-busybox true' > containers/far/config/command")
        start(daemon, "stopped")
        assert daemon.sh("cat containers/far/exit_code") == "126\n"
        assert "exec format error" in daemon.sh("cat containers/far/error")

    def test_it_starts_from_a_template_and_stands_by(daemon: Daemon) -> None:
        daemon.sh("echo 'busybox uname -m' > containers/far/config/command")
        start(daemon, "stopped")
        daemon.until("cat kernels/arm/templates", "memory=128M", seconds=START)
        for wanted in ("template", "standby"):
            command(daemon, LIFE)
            start(daemon)
            assert how(daemon).startswith(wanted), how(daemon)
            daemon.until("cat kernels/arm/templates", "standby memory", seconds=START)
            daemon.run("echo 'stop 60' > containers/far/ctl")
            daemon.until("cat containers/far/state", "stopped", seconds=120)
            assert daemon.sh("cat containers/far/exit_code") == "6\n"
        daemon.sh("echo forget > kernels/arm/ctl; rmdir containers/far")
