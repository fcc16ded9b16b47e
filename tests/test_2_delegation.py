"""The cgroup a user may make groups in: which one is found, and what is made of it. On files that look like cgroups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import ContainerConfig
from engine.errors import RuntimeFailure, Unsupported
from engine.runtimes import cgroups, delegation, unprivileged
from engine.runtimes.cgroups import Cgroups

ALL = "cpuset cpu io memory hugetlb pids"


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(delegation, "ROOT", tmp_path)
    monkeypatch.setattr(delegation, "SYSTEMD", tmp_path / "no-systemd")
    monkeypatch.setattr(delegation.os, "access", lambda path, mode: "user.slice/u" in str(path) and Path(path).exists())
    (tmp_path / "cgroup.controllers").write_text(ALL)
    for name in ("user.slice", "user.slice/u", "user.slice/u/shell"):
        group(tmp_path / name)
    return tmp_path


def group(place: Path, controllers: str = ALL) -> None:
    place.mkdir(parents=True)
    (place / "cgroup.controllers").write_text(controllers)
    (place / "cgroup.procs").write_text("")
    (place / "cgroup.subtree_control").write_text("")


def within(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(delegation, "group_of", lambda pid="self": name)


def test_the_highest_group_that_is_the_users(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within(monkeypatch, "/user.slice/u/shell")
    assert delegation.find() == "/user.slice/u"
    within(monkeypatch, "/user.slice")
    assert delegation.find() is None
    assert delegation.lack() == (frozenset(), delegation.BY_HAND)
    within(monkeypatch, "/user.slice/u")
    assert delegation.lack() == (frozenset(delegation.CONTROLLERS), "")
    (top / "cgroup.controllers").unlink()  # version 1
    assert delegation.find() is None and delegation.lack() == (frozenset(), delegation.OLD)


def test_with_systemd_only_what_it_leaves_to_others(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "no-systemd").mkdir()
    group(top / "user.slice/u/user@7.service")
    group(top / "user.slice/u/user@7.service/mine.scope")
    within(monkeypatch, "/user.slice/u/user@7.service/mine.scope")
    monkeypatch.setattr(delegation, "_marked", lambda name: name.endswith("user@7.service"))
    assert delegation.find() is None, "what is directly below the user's systemd is that one's"
    monkeypatch.setattr(delegation, "_marked", lambda name: name.endswith((".service", ".scope")))
    assert delegation.find() == "/user.slice/u/user@7.service/mine.scope"


def test_processes_are_moved_down_and_controllers_handed_on(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []

    def write(path: Path, text: str) -> bool:
        moved.append((str(path.relative_to(top)), text))
        return True

    monkeypatch.setattr(delegation, "_write", write)
    (top / "user.slice/u/cgroup.procs").write_text("41\n42\n")
    group(top / "user.slice/u/dutchman", "cpu memory")
    assert delegation.make_ready("/user.slice/u") == "/user.slice/u/dutchman/daemon"
    assert (top / "user.slice/u/dutchman/daemon").is_dir()
    assert moved[:2] == [("user.slice/u/outside/cgroup.procs", pid) for pid in ("41", "42")]
    assert moved[2:] == [
        *(("user.slice/u/cgroup.subtree_control", f"+{name}") for name in delegation.CONTROLLERS),
        *(("user.slice/u/dutchman/cgroup.subtree_control", f"+{name}") for name in ("cpu", "memory")),
    ]


def test_limits_without_their_controller_are_refused_by_name() -> None:
    some, none = Cgroups(2, False, "/d", frozenset({"memory"})), Cgroups(2, False, None, frozenset())
    for config, here, what in (
        ({"cpus": 0.5}, some, "cpus: an engine without root has no cpu controller"),
        ({"memory": 64 << 20}, none, "memory: an engine without root has no cgroups"),
        ({"device_cgroup_rules": ("c 1:3 mr",)}, some, "device_cgroup_rules"),
    ):
        with pytest.raises(Unsupported, match=what):
            unprivileged.adapt(ContainerConfig(**config), {}, here)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="pause"):
        unprivileged.refuse("pause", none)
    unprivileged.refuse("pause", some)
    whole = {"memory": {"limit": 1}, "pids": {"limit": 2}, "cpu": {"cpus": "0", "quota": 3}}
    assert unprivileged.limits(whole, some) == {"memory": {"limit": 1}, "cpu": {}}
    assert json.dumps(unprivileged.limits(whole, Cgroups(2, True))) == json.dumps(whole)


def test_version_2_refuses_what_would_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    two = Cgroups(2, True)
    cgroups.make_room(two, "c", 1)  # no controller, no limit
    place = tmp_path / "dutchman" / "c"
    place.mkdir(parents=True)
    (place / "memory.current").write_text("5000\n")
    cgroups.make_room(two, "c", 5000)
    cgroups.make_room(two, "c", None)
    assert not (place / "memory.reclaim").exists()
    with pytest.raises(RuntimeFailure, match="memory: 5000 bytes are in use"):
        cgroups.make_room(two, "c", 4000)
    assert (place / "memory.reclaim").read_text() == "1000"
