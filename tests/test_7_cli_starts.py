"""A start that takes longer than its write: the command waits for it. The mount is a plain directory, a fake."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdfs import cli_containers
from fdfs.cli_containers import await_start
from fdfs.cli_mount import Failure, Mount
from fdfs.cli_verbs import _await_restart


@pytest.fixture
def fake_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    monkeypatch.setattr(cli_containers, "POLL", (0.01, 0.01))
    (tmp_path / "containers" / "slow").mkdir(parents=True)
    (tmp_path / "containers/slow/state").write_text("starting\n")
    yield Mount(tmp_path)


def later(mount: Mount, **fields: str) -> threading.Timer:
    def write() -> None:
        for name, value in sorted(fields.items()):  # the state comes last
            mount.path("new").write_text(value + "\n")
            mount.path("new").replace(mount.path("containers", "slow", name))

    timer = threading.Timer(0.2, write)
    timer.start()
    return timer


def test_it_is_waited_for(fake_mount: Mount) -> None:
    timer = later(fake_mount, state="running")
    await_start(fake_mount, "slow", "run demo")
    assert fake_mount.field("containers", "slow", "state") == "running"
    timer.join()


def test_why_it_did_not_start_is_told(fake_mount: Mount) -> None:
    told = "2026-01-01T00:00:00Z EIO\nthe guest did not answer\nhint: look at the console"
    later(fake_mount, error=told, exit_code="125", state="stopped")
    with pytest.raises(Failure, match="run demo: the guest did not answer") as caught:
        await_start(fake_mount, "slow", "run demo")
    assert caught.value.more == ("hint: look at the console",)


def test_what_ended_soon_has_started(fake_mount: Mount) -> None:
    told = "2026-01-01T00:00:00Z EIO\nof earlier"
    later(fake_mount, error=told, exit_code="127", started_at="2026-01-01T00:00:01Z", state="stopped")
    await_start(fake_mount, "slow", "run demo")


def test_a_restart_that_is_counted_between_two_looks_is_waited_for(tmp_path: Path) -> None:
    looks = [
        ("state", "stopped"),
        ("restarts", "1"),
        *[("state", "starting"), ("state", "starting"), ("restarts", "1")],
    ]
    told = iter([*looks, ("state", "starting"), ("state", "running"), ("restarts", "1"), ("state", "running")])

    class Told(Mount):
        def field(self, *names: str) -> str:
            name, value = next(told)
            assert names == ("containers", "slow", name)
            return value

    _await_restart(Told(tmp_path), "slow", "0")
    assert next(told, None) is None
