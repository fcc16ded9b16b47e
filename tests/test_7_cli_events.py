"""`dutchman events`, and what `dutchman run` says of health and restarts, on a live mount."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Daemon, can_mount
from runtimebench import skip_or_fail


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if (why := can_mount()) is not None:
        skip_or_fail(why)
    with Daemon(tmp_path, env={"DUTCHMAN_MOUNT": str(tmp_path / "mnt")}) as daemon:
        yield daemon


def test_events_and_the_options_of_run(daemon: Daemon) -> None:
    command = f"{shlex.quote(sys.executable)} -m fdfs"
    done = daemon.run(
        f"{command} run -d --pull=never --name c --restart on-failure:3 --health-cmd 'x y' --health-interval 1m nix:1"
    )
    assert done.returncode == 1  # there is no such image, and so no container is left
    daemon.refused(f"{command} run --no-healthcheck --health-cmd x nix:1", "exclude each other")
    daemon.sh("mkdir containers/c; echo on-failure:3 > containers/c/config/restart")
    written = next(
        json.loads(line)
        for line in daemon.sh("cat events").splitlines()
        if '"containerConfigured"' in line and "healthcheck" in line
    )
    assert {"healthcheck", "image", "restart"} <= set(written["fields"])
    lines = daemon.sh(f"{command} events").splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))
    since = daemon.sh(f"{command} events --since {len(lines) - 2}").splitlines()
    assert since == lines[-2:]
    mine = [json.loads(line) for line in daemon.sh(f"{command} events c").splitlines()]
    assert mine[0]["type"] == "containerCreated" and mine[-1]["fields"] == ["restart"]
    daemon.refused(f"{command} events nobody", "nobody")
