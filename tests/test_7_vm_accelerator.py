"""A QEMU whose hardware accelerator passes the probe and fails with a real guest, through the mount.

QEMU here is a program in front of the real one: it emulates where it is asked for KVM, then aborts as QEMU does on a
para-virtual /dev/kvm, or, once the machine runs, tells by its monitor that it stopped for good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestkernel import copy_kernels
from mounting import Daemon, can_mount
from ociimages import busybox_rootfs_tar
from runtimebench import SLOW, no_vm, skip_or_fail

from engine.runtimes.vm import accel

START = 120.0  # seconds for a machine to boot on a busy host
QEMU = """#!{python} -SE
import ctypes, os, select, signal, socket, subprocess, sys
argv = sys.argv[1:]
if "kvm" not in argv:
    os.execv({real!r}, [{real!r}, *argv])
argv[argv.index("kvm")] = "tcg"
argv[argv.index("-cpu") + 1] = "max,-xsave,-la57,-erms,-fsrm"
if "-bios" in argv:  # the probe
    os.execv({real!r}, [{real!r}, *argv])
if os.path.exists({place!r} + "/abort"):
    print("error: kvm run failed Bad address", file=sys.stderr)
    sys.exit(134)
at = next(n for n, word in enumerate(argv) if word.startswith("socket,id=watch,fd="))
engine = socket.socket(fileno=int(argv[at].rpartition("=")[2]))
ours, theirs = socket.socketpair()
theirs.set_inheritable(True)
argv[at] = f"socket,id=watch,fd={{theirs.fileno()}}"
engine.set_inheritable(False)
die = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
qemu = subprocess.Popen([{real!r}, *argv], close_fds=False, preexec_fn=die)
theirs.close()
told = False
while True:
    ready = select.select([engine, ours], [], [], 0.1)[0]
    if not told and os.path.exists({place!r} + "/break"):
        engine.sendall(b'{{"event": "STOP"}}\\n')
        told = True
    for here, there in ((engine, ours), (ours, engine)):
        if here in ready:
            data = here.recv(65536)
            if not data:
                sys.exit(qemu.wait())
            if told and here is engine and b"query-status" in data:
                engine.sendall(b'{{"id": "status", "return": {{"status": "internal-error"}}}}\\n')
            else:
                there.sendall(data)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    arch = accel.architecture()
    qemu = tmp_path / "bin" / f"qemu-system-{arch}"
    qemu.parent.mkdir()
    text = QEMU.format(python=sys.executable, real=str(accel.find_qemu(arch)), place=str(tmp_path))
    qemu.write_text(text)
    qemu.chmod(0o755)
    (tmp_path / "store").mkdir()
    copy_kernels(tmp_path / "store")
    with Daemon(tmp_path, runtime="vm", env={"PATH": f"{qemu.parent}:{os.environ['PATH']}"}) as daemon:
        (tmp_path / "rootfs.tar").write_bytes(busybox_rootfs_tar())
        daemon.sh(f"echo 'import {tmp_path}/rootfs.tar box:1' > images/ctl")
        daemon.until("ls images", "box:1", seconds=30)
        daemon.sh(
            "mkdir containers/c; echo box:1 > containers/c/config/image; echo false > containers/c/config/fast_start"
        )
        daemon.sh("printf 'sh\\n-c\\necho up; exec sleep 1000\\n' > containers/c/config/command")
        assert "kvm runs guest code" in daemon.sh("cat status")
        yield daemon
        daemon.run("echo kill > containers/c/ctl", timeout=START)
        daemon.until("cat containers/c/state", "stopped", seconds=60)
        daemon.sh("rmdir containers/c")


def up(daemon: Daemon) -> str:
    """It runs, and has printed: what the machine was made with."""
    daemon.run("echo start > containers/c/ctl", timeout=START)
    daemon.until("cat containers/c/state", "running", seconds=START)
    daemon.until("cat containers/c/logs/stdout", "up", seconds=60)
    return daemon.sh("cat status")


if SLOW and accel.architecture() == "x86_64" and os.access("/dev/kvm", os.R_OK | os.W_OK):

    def test_one_that_aborts_with_a_guest_is_emulated_in_the_same_start(daemon: Daemon, tmp_path: Path) -> None:
        (tmp_path / "abort").touch()
        said = up(daemon)
        assert "tcg" in said and "QEMU aborted: error: kvm run failed" in said

    def test_one_that_stops_a_machine_for_good_later_ends_it_and_is_not_used_again(
        daemon: Daemon, tmp_path: Path
    ) -> None:
        assert "kvm runs guest code" in up(daemon)
        (tmp_path / "break").touch()
        daemon.until("cat containers/c/state", "stopped", seconds=60)
        assert daemon.sh("cat containers/c/exit_code") == "137\n"
        told = daemon.sh("grep stateChanged containers/c/events")
        assert "QEMU stopped it: internal-error; kvm is not used again" in told
        assert "internal-error" in up(daemon)
