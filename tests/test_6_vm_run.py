"""A container in a virtual machine through a real mount: what it uses, limits, health, and a daemon that was killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from guestkernel import share_kernels
from mounting import Daemon, can_mount
from ociimages import busybox_rootfs_tar
from runtimebench import SLOW, no_vm, skip_or_fail

from engine.runtimes import pids

START = 120.0  # seconds for a machine to boot on a busy host
CHECK = "test: test -e /well || { echo I am ill; exit 1; }\\ninterval: 0.5\\ntimeout: 20\\nretries: 1\\n"
SERVE = "echo up; while ! rmdir /end 2>/dev/null; do sleep 0.2; done; echo over; exit 7"


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def flat(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    place = tmp_path_factory.mktemp("vmrun")
    share_kernels(place / "store")
    with Daemon(place, runtime="vm") as daemon:
        (place / "rootfs.tar").write_bytes(busybox_rootfs_tar())
        daemon.sh(f"echo 'import {place}/rootfs.tar box:1' > images/ctl")
        daemon.until("ls images", "box:1", seconds=30)
        daemon.sh("mkdir containers/web; echo box:1 > containers/web/config/image")
        daemon.sh(f"printf 'sh\\n-c\\n{SERVE}\\n' > containers/web/config/command")
        daemon.sh("echo 64m > containers/web/config/memory; echo always > containers/web/config/restart")
        daemon.sh(f"printf '{CHECK}' > containers/web/config/healthcheck")
        daemon.run("echo start > containers/web/ctl")
        daemon.until("cat containers/web/state", "running", seconds=START)
        yield daemon
        daemon.run("echo 'stop 0' > containers/web/ctl")
        daemon.until("cat containers/web/state", "stopped", seconds=60)
        daemon.sh("rmdir containers/web")


def qemu_of(daemon: Daemon) -> int:
    id = daemon.sh("cat containers/web/id").strip()
    return int((daemon.store / "containers" / id / "run" / "vm" / "qemu.pid").read_text())


def test_what_it_uses_is_told_by_its_agent(daemon: Daemon) -> None:
    daemon.until("cat containers/web/stats", "memory_bytes", seconds=30)
    stats = flat(daemon.sh("cat containers/web/stats"))
    assert stats["memory_limit_bytes"] == 64 << 20 and 0 < stats["memory_bytes"] <= 64 << 20
    assert stats["cpu_usec"] > 0 and stats["pids"] >= 1 and "network_received_bytes" in stats
    assert stats["memory_machine_bytes"] > 64 << 20
    top = daemon.sh("cat containers/web/top").splitlines()
    assert top[0].split()[:4] == ["PID", "INSIDE", "PARENT", "USER"]
    first = top[1].split()
    assert first[1] == "1" and first[3] == "root" and "echo up" in top[1]
    daemon.until("grep -c polyline containers/web/stats.svg", "2", seconds=30)
    daemon.until("cat containers/web/events", "resourceUpdate", seconds=60)


def test_limits_change_while_it_runs_and_more_than_the_machine_is_refused(daemon: Daemon) -> None:
    daemon.sh("echo 48m > containers/web/config/memory; echo 77 > containers/web/config/pids")
    daemon.until("cat containers/web/stats", f"memory_limit_bytes {48 << 20}", seconds=30)
    assert "pids_limit 77\n" in daemon.sh("cat containers/web/stats")
    daemon.refused("echo 1g > containers/web/config/memory", "Invalid argument")
    error = daemon.sh("cat containers/web/error")
    assert "memory: its virtual machine has 128 MiB" in error and "hint: stop it" in error
    assert daemon.sh("cat containers/web/config/memory") == daemon.sh("echo 50331648")


def test_its_health_is_asked_inside_it(daemon: Daemon) -> None:
    daemon.until("cat containers/web/health", "unhealthy", seconds=60)
    log = [json.loads(line) for line in daemon.sh("cat containers/web/health.jsonl").splitlines()]
    assert (log[-1]["exit_code"], log[-1]["output"]) == (1, "I am ill\n")
    daemon.sh("touch containers/web/rootfs/well")
    daemon.until("cat containers/web/health | grep -v un", "healthy", seconds=60)


def test_a_killed_daemon_finds_it_again(daemon: Daemon) -> None:
    qemu = qemu_of(daemon)
    daemon.kill()
    daemon.unmount()
    daemon.start(seconds=60)
    assert daemon.sh("cat containers/web/state containers/web/config/pids").split() == ["running", "77"]
    assert qemu_of(daemon) == qemu
    assert daemon.sh("cat containers/web/logs/stdout") == "up\n"
    daemon.until("cat containers/web/stats", "pids_limit 77", seconds=30)
    os.kill(qemu, signal.SIGKILL)  # while it is watched again: its end is told, and its policy starts it anew
    daemon.until("cat containers/web/restarts", "1", seconds=30)
    daemon.until("cat containers/web/state", "running", seconds=START)
    assert "virtual machine ended" in daemon.sh("grep stateChanged containers/web/events")
    assert qemu_of(daemon) != qemu
    stats = flat(daemon.until("cat containers/web/stats", "pids_limit", seconds=30))
    assert (stats["memory_limit_bytes"], stats["pids_limit"]) == (48 << 20, 77)  # they are in its config


def test_how_it_ended_while_no_daemon_looked(daemon: Daemon) -> None:
    qemu = qemu_of(daemon)
    daemon.sh("echo 'run sh -c \"sleep 1; mkdir /end\"' > containers/web/exec/ctl")
    daemon.until("cat containers/web/exec/*/state", "running", seconds=60)
    daemon.kill()
    daemon.unmount()
    wait_for(lambda: pids.start_time(qemu) is None)
    daemon.start(seconds=60)
    daemon.until("cat containers/web/restarts", "2", seconds=30)
    ends = [json.loads(line) for line in daemon.sh('grep \'"to":"stopped"\' containers/web/events').splitlines()]
    assert ends[-1]["exit_code"] == 7
    assert "over\n" in daemon.sh("cat containers/web/logs/stdout")
    daemon.until("cat containers/web/state", "running", seconds=START)


if SLOW:

    def test_a_mute_machine_is_seen_and_holds_nobody_up(daemon: Daemon) -> None:
        daemon.sh("touch containers/web/rootfs/well")  # the first may not have reached the disk of a killed machine
        daemon.until("cat containers/web/health | grep -v un", "healthy", seconds=60)
        qemu = qemu_of(daemon)
        os.kill(qemu, signal.SIGSTOP)
        try:
            daemon.until("cat containers/web/stats 2>&1", "timed out", seconds=60)
            daemon.refused("cat containers/web/top", "timed out")
            daemon.refused("echo 40m > containers/web/config/memory", "timed out")
            assert "it may hang" in daemon.sh("cat containers/web/error")
            daemon.refused("echo 'run ls' > containers/web/exec/ctl", "timed out")
            assert "does not answer" in daemon.sh("cat containers/web/exec/error")
            daemon.until("cat containers/web/error", "its virtual machine has not answered", seconds=60)
            assert "echo kill > ctl" in daemon.sh("cat containers/web/error")
            assert daemon.sh("cat containers/web/state containers/web/health").split() == ["running", "unhealthy"]
        finally:
            os.kill(qemu, signal.SIGCONT)
        daemon.until("cat containers/web/health | grep -v un", "healthy", seconds=60)
        daemon.until("cat containers/web/stats", "memory_bytes", seconds=30)

    def test_a_mute_machine_that_is_killed_tells_why(daemon: Daemon) -> None:
        daemon.until("cat containers/web/state", "running", seconds=START)
        daemon.sh("echo no > containers/web/config/restart")
        qemu = qemu_of(daemon)
        os.kill(qemu, signal.SIGSTOP)
        daemon.sh("echo kill > containers/web/ctl")
        daemon.until("cat containers/web/state", "stopped", seconds=60)
        assert daemon.sh("cat containers/web/exit_code").strip() == "137"
        assert "killed with its virtual machine" in daemon.sh("cat containers/web/reason")
        daemon.sh("echo start > containers/web/ctl")
        daemon.until("cat containers/web/state", "running", seconds=START)
        assert daemon.sh("cat containers/web/reason") == ""
