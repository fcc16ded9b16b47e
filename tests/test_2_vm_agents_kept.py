"""Which built agents stay in the cache that all stores of a user share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.runtimes.vm import agentbuild
from engine.runtimes.vm.agentbuild import KEEP, build, build_id, prune

USES = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Of six releases, the newest has the highest number."""
    for number in range(6):
        for architecture in agentbuild.ARCHITECTURES:
            path = tmp_path / f"agent-{architecture}-{number:016x}-0.1"
            path.touch()
            os.utime(path, (1000 + number, 1000 + number))
    yield tmp_path
    for path in [path for path in agentbuild._held if path.parent == tmp_path]:
        os.close(agentbuild._held.pop(path))


def kept(cache: Path, architecture: str = "x86_64") -> set[int]:
    return {int(path.name.split("-")[2], 16) for path in cache.glob(f"agent-{architecture}-*")}


def test_the_last_few_stay_and_what_another_process_uses(cache: Path) -> None:
    ours = cache / f"agent-x86_64-{build_id()}-0.1"
    ours.touch()
    os.utime(ours, (1, 1))  # the oldest, until it is used
    own = int(build_id(), 16)
    command = [sys.executable, "-c", USES, str(cache / f"agent-x86_64-{0:016x}-0.1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None and user.stdout is not None
        assert user.stdout.readline() == b"held\n"
        assert build("x86_64", cache) == ours
        assert kept(cache) == {own, 5, 4, 3, 0} and len(kept(cache)) == KEEP + 1
        assert kept(cache, "aarch64") == {5, 4, 3, 2}
        user.stdin.close()
        user.wait()
    prune(cache)
    assert kept(cache) == {own, 5, 4, 3}
    os.utime(ours, (1, 1))
    (cache / f"agent-x86_64-{6:016x}-0.1").touch()
    prune(cache)
    assert kept(cache) == {own, 6, 5, 4, 3}  # ours is used here


def test_what_is_no_agent_stays_and_is_in_nobodys_way(cache: Path) -> None:
    (cache / "agent-x").touch()
    for number in range(8):
        (cache / f"agent-x86_64-{number}-directory").mkdir()
    prune(cache)
    assert len(list(cache.glob("agent-x*"))) == 9 + KEEP


def test_one_that_is_removed_as_it_is_found_is_looked_for_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = cache / f"agent-x86_64-{build_id()}-0.1"
    ours.touch()
    found = iter([cache / "agent-x86_64-gone-0.1", ours])
    monkeypatch.setattr(agentbuild, "check", lambda architecture, cache: None)
    monkeypatch.setattr(agentbuild, "built", lambda architecture, cache: next(found))
    assert build("x86_64", cache) == ours
