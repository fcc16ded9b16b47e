"""Limits that change while a container runs, and names: applied and recorded, or neither."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import add_image, events, reach

from engine.config import parse_config
from engine.engine import Engine
from engine.errors import AlreadyExists, Busy, InvalidArgument, NoSpace, NotFound, RuntimeFailure
from engine.lifecycle import State
from engine.records import PINNED
from engine.runtimes.fake import FakeRuntime
from engine.runtimes.resources import Resources

IMAGE = "docker.io/library/small:1"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "store", runtime="fake")
    add_image(engine, IMAGE)
    yield engine
    engine.close(unmount=True)


def running(engine: Engine, name: str = "web", command: str = "[sleep, inf]") -> str:
    text = f"image: {IMAGE}\ncommand: {command}\nmemory: 64m\nstop_grace_period: 60"
    id = engine.containers.create(name, parse_config(text)).id
    engine.containers.start(name)
    return id


def driver(engine: Engine, name: str = "web") -> FakeRuntime:
    found = engine.containers.execution.driver_of(engine.containers.get(name))
    assert isinstance(found, FakeRuntime)
    return found


def test_limits_reach_what_runs_and_what_is_paused(engine: Engine) -> None:
    id = running(engine)
    engine.containers.set_field("web", "cpus", "0.5\n")
    assert driver(engine).limits(id) == Resources(memory=64 << 20, cpus=0.5)
    engine.containers.pause("web")
    now = engine.containers.get("web").config
    engine.containers.configure("web", now.model_copy(update={"memory": 128 << 20, "pids": 9, "labels": {"a": "b"}}))
    assert driver(engine).limits(id) == Resources(memory=128 << 20, cpus=0.5, pids=9)
    changed = [event["fields"] for event in events(engine, f"container/{id}") if event["type"] == "containerConfigured"]
    assert changed == [["cpus"], ["labels", "memory", "pids"]]


def test_what_the_driver_refuses_is_not_recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    id = running(engine)
    before = engine.containers.get("web").config

    def refuse(*_: Any) -> None:
        raise RuntimeFailure("the kernel says no")

    with monkeypatch.context() as patched:
        patched.setattr(FakeRuntime, "update", refuse)
        with pytest.raises(RuntimeFailure, match="says no"):
            engine.containers.set_field("web", "memory", "32m")
    with pytest.raises(InvalidArgument, match="memory: at least"):
        engine.containers.set_field("web", "memory", "1m")
    with pytest.raises(Busy, match=r"^read_only: cannot change while the container is running"):
        engine.containers.configure("web", before.model_copy(update={"memory": 32 << 20, "read_only": True}))
    assert engine.containers.get("web").config == before
    assert driver(engine).limits(id) == Resources(memory=64 << 20)


def test_what_cannot_be_recorded_is_undone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    id = running(engine)

    def full(*_: Any, **__: Any) -> None:
        raise NoSpace("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(engine.containers.records, "configure", full)
        with pytest.raises(NoSpace):
            engine.containers.set_field("web", "memory", "32m")
    assert driver(engine).limits(id) == Resources(memory=64 << 20)
    assert engine.containers.get("web").config.memory == 64 << 20


def test_at_rest_limits_are_config_and_in_between_they_wait(engine: Engine) -> None:
    id = running(engine, command="[trap, inf]")
    engine.containers.stop("web")
    assert engine.containers.get("web").state is State.STOPPING
    with pytest.raises(Busy, match="memory: cannot change while the container is stopping"):
        engine.containers.set_field("web", "memory", "32m")
    engine.containers.kill("web")
    reach(engine, "web", State.STOPPED)
    engine.containers.set_field("web", "memory", "32m")
    engine.containers.start("web")
    assert driver(engine).limits(id) == Resources(memory=32 << 20)


def test_many_updates_at_once_end_as_recorded(engine: Engine) -> None:
    id = running(engine)
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(5):
                field, value = (("pids", 10 * number + step + 1), ("cpu_shares", 100 * number + step + 2))[number % 2]
                engine.containers.set_field("web", field, str(value))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert driver(engine).limits(id) == Resources.of(engine.containers.get("web").config)


# --- names ------------------------------------------------------------------------------------------------------------


def test_another_name_is_the_same_container(engine: Engine, tmp_path: Path) -> None:
    id = running(engine)
    engine.containers.create("taken")
    assert engine.containers.rename("web", "site").id == id
    with pytest.raises(NotFound):
        engine.containers.get("web")
    assert engine.containers.get(PINNED + id).name == "site"
    for name in ("taken", "site"):
        with pytest.raises(AlreadyExists):
            engine.containers.rename("site", name)
    for name in ("", "-x", "a/b", "a b", "x" * 129, PINNED + id):
        with pytest.raises(InvalidArgument):
            engine.containers.rename("site", name)
    engine.containers.create("web")  # the name is free again
    assert engine.containers.get(PINNED + id).name == "site"
    renamed = [event for event in events(engine, f"container/{id}") if event["type"] == "containerRenamed"]
    assert [(event["from"], event["name"]) for event in renamed] == [("web", "site")]
    engine.containers.stop("site")
    reach(engine, "site", State.STOPPED)
    engine.close()
    again = Engine(tmp_path / "store", runtime="fake")
    try:
        assert again.containers.get("site").id == id
    finally:
        again.close(unmount=True)


def test_what_is_being_removed_keeps_its_name(engine: Engine) -> None:
    id = engine.containers.create("web").id
    engine.containers.records.move(id, State.REMOVING)
    with pytest.raises(Busy, match="being removed"):
        engine.containers.rename("web", "site")
