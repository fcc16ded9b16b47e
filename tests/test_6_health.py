"""Health and restarts through a real mount, with real containers: what a person writes and reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from mounting import Daemon, can_mount
from ociimages import busybox_rootfs_tar
from runtimebench import no_oci, skip_or_fail


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if (why := can_mount() or no_oci()) is not None:
        skip_or_fail(why)
    place = tmp_path_factory.mktemp("health")
    with Daemon(place, runtime="oci") as daemon:
        (place / "rootfs.tar").write_bytes(busybox_rootfs_tar())
        daemon.sh(f"echo 'import {place}/rootfs.tar box:1' > images/ctl")
        daemon.until("ls images", "box:1", seconds=30)
        yield daemon
        for name in daemon.sh("ls -d containers/*/ | cut -d/ -f2").split():
            daemon.run(f"echo 'stop 0' > containers/{name}/ctl")
            daemon.until(f"rmdir containers/{name} 2>&1; test -e containers/{name} || echo gone", "gone")


def test_health_flips_by_a_file_written_through_the_mount(daemon: Daemon) -> None:
    daemon.sh("mkdir containers/web; echo box:1 > containers/web/config/image")
    daemon.sh("printf 'sleep\\n1000\\n' > containers/web/config/command")
    daemon.refused("echo '{test: [curl]}' > containers/web/config/healthcheck", "Invalid argument")
    assert "healthcheck" in daemon.sh("cat containers/web/error") and daemon.sh("cat containers/web/health") == "none\n"
    daemon.sh(
        "printf 'test: test -e /well || { echo I am ill; exit 1; }\\ninterval: 0.2\\nretries: 2\\n'"
        " > containers/web/config/healthcheck"
    )
    daemon.sh("echo start > containers/web/ctl")
    daemon.until("cat containers/web/health", "unhealthy", seconds=30)
    log = [json.loads(line) for line in daemon.sh("cat containers/web/health.jsonl").splitlines()]
    assert log and all((line["exit_code"], line["output"]) == (1, "I am ill\n") for line in log)
    daemon.sh("touch containers/web/rootfs/well")
    daemon.until("cat containers/web/health | grep -v un", "healthy", seconds=30)
    events = [json.loads(line) for line in daemon.sh("grep healthStatus containers/web/events").splitlines()]
    assert [event["health"] for event in events] == ["starting", "unhealthy", "healthy"]
    assert events[1]["output"] == "I am ill\n"
    if shutil.which("jq"):
        assert daemon.sh("jq -r 'select(.type==\"healthStatus\")|.health' events").split() == [
            "starting",
            "unhealthy",
            "healthy",
        ]


def test_a_restart_policy_and_how_to_end_it(daemon: Daemon) -> None:
    daemon.sh("mkdir containers/again; echo box:1 > containers/again/config/image")
    daemon.sh(
        "echo 'sh -c \"exit 4\"' > containers/again/config/command; echo always > containers/again/config/restart"
    )
    daemon.sh("echo start > containers/again/ctl")
    daemon.until("cat containers/again/restarts", "5", seconds=60)  # by now it waits some seconds
    daemon.until("cat containers/again/reason", "restarts in ", seconds=30)
    assert daemon.sh("cat containers/again/state containers/again/restarting") == "stopped\n1\n"
    assert "stop" in daemon.sh("cat containers/again/ctl")
    daemon.sh("echo stop > containers/again/ctl")
    assert daemon.sh("cat containers/again/restarting containers/again/reason") == "0\n"
    daemon.refused("echo stop > containers/again/ctl", "busy")
    assert "restartScheduled" in daemon.sh("grep restart containers/again/events")
