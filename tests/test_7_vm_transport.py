"""A container whose agent is reached over vsock, through the mount. Slow but for the refusal.

`tools/setup slow` fetches vhost-device-vsock. What decides is in test_2_vm_transport.py; DUTCHMAN_TEST_TRANSPORT=hybrid
runs the contract of all drivers over it (test_2_runtimes.py).
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestkernel import CACHE, copy_kernels
from mounting import Daemon, can_mount
from ociimages import busybox_rootfs_tar
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_vm_killed import ended

from engine.runtimes.vm import transport

START = 120.0  # seconds for a machine to boot on a busy host
PLACE = CACHE.parent / "vhost-device-vsock" / "usr" / "bin"
LIFE = "trap 'echo bye; exit 6' TERM; echo up; while :; do date +%s%N > /now; sleep 0.2; done"
NO_VHOST = transport.no_vhost()
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    path = f"{os.environ['PATH']}:{PLACE}"
    if SLOW and shutil.which(transport.PROGRAM, path=path) is None:
        skip_or_fail(f"needs {transport.PROGRAM}: tools/setup slow gets it")
    place = tmp_path_factory.mktemp("transport")
    (place / "store").mkdir()
    copy_kernels(place / "store")
    (place / "rootfs.tar").write_bytes(busybox_rootfs_tar())
    with Daemon(place, runtime="vm", env={"PATH": path}) as daemon:
        daemon.sh(f"echo 'import {place}/rootfs.tar box:1' > images/ctl")
        daemon.until("ls images", "box:1", seconds=60)
        daemon.sh("mkdir containers/v; echo box:1 > containers/v/config/image")
        (daemon.mount / "containers/v/config/command").write_text(f"sh\n-c\n{LIFE}\n")
        yield daemon
        daemon.run("echo kill > containers/v/ctl")  # of a test that failed


def run_of(daemon: Daemon) -> Path:
    return daemon.store / "containers" / daemon.sh("cat containers/v/id").strip() / "run" / "vm"


def start(daemon: Daemon) -> int:
    """QEMU's pid, once the container's trap is set."""
    before = daemon.run("grep -c up containers/v/logs/stdout").stdout.strip() or "0"
    daemon.run("echo start > containers/v/ctl", timeout=60)
    daemon.until("grep -qx starting containers/v/state || echo over", "over", seconds=START)
    now = daemon.sh("cat containers/v/state").strip()
    assert now == "running", daemon.run("cd containers/v; cat error reason logs/*").stdout
    daemon.until("grep -c up containers/v/logs/stdout", f"{int(before) + 1}\n", seconds=60)
    return int((run_of(daemon) / "qemu.pid").read_text())


def stop(daemon: Daemon) -> None:
    daemon.run("echo 'stop 60' > containers/v/ctl")
    daemon.until("cat containers/v/state", "stopped", seconds=START)


def works(daemon: Daemon) -> None:
    """Files, sessions and numbers of the machine, more at once than a packet holds."""
    data = os.urandom(9 << 20)
    (daemon.mount / "containers/v/rootfs/big").write_bytes(data)
    daemon.sh("echo 'run cat /big' > containers/v/exec/ctl", timeout=60)
    daemon.until("cat containers/v/exec/*/state", "stopped", seconds=60)
    daemon.sh("cmp containers/v/exec/*/stdout containers/v/rootfs/big", timeout=60)
    daemon.sh("rmdir containers/v/exec/[0-9]*; rm containers/v/rootfs/big", timeout=60)
    daemon.until("cat containers/v/stats", "memory_bytes", seconds=60)
    for verb, state in (("pause", "paused"), ("resume", "running")):
        daemon.sh(f"echo {verb} > containers/v/ctl; grep -qx {state} containers/v/state", timeout=60)


if NO_VHOST:

    def test_what_this_host_has_not_is_refused_and_nothing_is_changed(daemon: Daemon) -> None:
        daemon.refused("echo carrier-pigeon > containers/v/config/vm_transport", "Invalid argument")
        assert daemon.sh("cat containers/v/config/vm_transport") == "auto\n"
        daemon.sh("echo vsock > containers/v/config/vm_transport")
        daemon.refused("echo start > containers/v/ctl", "Operation not supported")
        error = daemon.sh("cat containers/v/error")
        assert NO_VHOST in error and "modprobe vhost_vsock" in error
        assert daemon.sh("cat containers/v/state containers/v/machine") == "stopped\n"
        assert not run_of(daemon).exists()

elif SLOW:

    def test_it_runs_over_the_vsock_of_the_hosts_kernel(daemon: Daemon) -> None:
        daemon.sh("echo vsock > containers/v/config/vm_transport")
        start(daemon)
        assert "transport vsock\n" in daemon.sh("cat containers/v/machine")
        works(daemon)
        stop(daemon)
        assert daemon.sh("cat containers/v/exit_code") == "6\n"


if SLOW:

    def test_it_runs_over_hybrid_vsock(daemon: Daemon) -> None:
        daemon.sh("echo hybrid > containers/v/config/vm_transport")
        qemu = start(daemon)
        known = dict(line.split(" ", 1) for line in daemon.sh("cat containers/v/machine").splitlines())
        assert (known["transport"], known["started"], known["qemu_pid"]) == ("hybrid", "booted", str(qemu))
        works(daemon)
        daemon.kill()
        daemon.unmount()
        daemon.start(60)
        assert daemon.sh("cat containers/v/state") == "running\n"
        assert "transport hybrid\n" in daemon.sh("cat containers/v/machine")
        before = daemon.sh("cat containers/v/rootfs/now", timeout=60).strip()
        daemon.until(f"cat containers/v/rootfs/now | grep -v '^{before}'", "\n", seconds=60)
        works(daemon)
        vhost = child_of(run_of(daemon))
        stop(daemon)
        assert daemon.sh("cat containers/v/exit_code") == "6\n"
        assert daemon.sh("cat containers/v/logs/stdout") == "up\nbye\n"
        for pid in (qemu, vhost):
            ended(pid)

    def test_the_daemon_that_carries_it_is_killed(daemon: Daemon) -> None:
        daemon.sh("echo hybrid > containers/v/config/vm_transport")
        qemu = start(daemon)
        os.kill(child_of(run_of(daemon)), signal.SIGKILL)
        daemon.until("cat containers/v/state", "stopped", seconds=60)
        assert daemon.sh("cat containers/v/exit_code") == "137\n"
        assert "vhost-device-vsock, which carries its vsock, ended" in daemon.sh("cat containers/v/reason")
        ended(qemu)
        start(daemon)
        stop(daemon)
        assert daemon.sh("cat containers/v/exit_code containers/v/machine") == "6\n"
        daemon.sh("rmdir containers/v")


def child_of(place: Path) -> int:
    """The process that carries the vsock of the machine in `place`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "comm").read_text().strip() == transport.PROGRAM[:15] and (path / "cwd").resolve() == place:
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no {transport.PROGRAM} in {place}")
