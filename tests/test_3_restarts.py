"""Restart policies on the fake driver, with a clock that a test moves on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clocks import ManualClock
from engines import add_image, events, eventually, reach

from engine.config import parse_config
from engine.engine import Engine
from engine.errors import Busy, RuntimeFailure
from engine.lifecycle import State
from engine.records import Container

IMAGE = "docker.io/library/small:1"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def opened(tmp_path: Path, clock: ManualClock) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def open() -> Engine:
        for engine in engines:
            engine.close()
        engine = Engine(tmp_path / "store", runtime="fake", clock=clock)
        with engine.meta._lock:  # its threads have transactions of their own
            engine.meta._writer.execute("PRAGMA synchronous=OFF")
        engines.append(engine)
        return engine

    add_image(open(), IMAGE)
    yield lambda: engines[0] if len(engines) == 1 and not engines[0]._closed else open()
    for engine in engines:
        engine.close(unmount=True)


def create(engine: Engine, name: str, command: str, restart: str) -> None:
    engine.containers.create(name, parse_config(json.dumps({"image": IMAGE, "command": command, "restart": restart})))


def restarted(engine: Engine, name: str, times: int) -> Container:
    found = engine.containers.wait_for(name, lambda now: now.restarts == times and now.state is State.STOPPED, 40)
    assert found is not None, engine.containers.get(name)
    return found


def due(engine: Engine, name: str) -> float | None:
    return engine.containers.restarts.due(engine.containers.get(name).id)


def test_it_starts_again_with_a_growing_pause(opened: Callable[[], Engine], clock: ManualClock) -> None:
    engine = opened()
    create(engine, "c", "exit 3", "on-failure:3")
    engine.containers.start("c")
    for times, delay in ((0, 0.1), (1, 0.2), (2, 0.4)):
        restarted(engine, "c", times)
        assert due(engine, "c") == pytest.approx(delay)
        assert "stop" in engine.containers.verbs("c")
        assert engine.containers.wait("c", 0) is None  # it has not stopped for good
        clock.advance(delay)
    restarted(engine, "c", 3)
    assert due(engine, "c") is None and engine.containers.wait("c", 5) == 3
    assert engine.containers.verbs("c") == ["start", "restart", "remove"]
    told = [event for event in events(engine) if event["type"] == "restartScheduled"]
    assert [(event["attempt"], event["seconds"], event["exit_code"]) for event in told] == [
        (1, 0.1, 3),
        (2, 0.2, 3),
        (3, 0.4, 3),
    ]
    engine.containers.start("c")  # a person: it counts from the beginning
    restarted(engine, "c", 3)
    assert due(engine, "c") == pytest.approx(0.1)


def test_stop_ends_the_waiting(opened: Callable[[], Engine], clock: ManualClock) -> None:
    engine = opened()
    create(engine, "c", "true", "always")
    engine.containers.start("c")
    reach(engine, "c", State.STOPPED)
    engine.containers.stop("c")
    assert due(engine, "c") is None and engine.containers.wait("c", 5) == 0
    with pytest.raises(Busy, match="cannot stop: the container is stopped"):
        engine.containers.stop("c")
    clock.advance(100)
    assert events(engine)[-1]["type"] == "restartCancelled"
    assert engine.containers.get("c").state is State.STOPPED


@pytest.mark.parametrize("how", ["stop", "kill", "signal"])
def test_one_that_a_person_ends_stays_down(opened: Callable[[], Engine], how: str) -> None:
    engine = opened()
    create(engine, "c", "sleep inf", "always")
    engine.containers.start("c")
    if how == "stop":
        engine.containers.stop("c")
    else:
        engine.containers.kill("c", "KILL" if how == "kill" else "TERM")
    reach(engine, "c", State.STOPPED)
    assert due(engine, "c") is None


def test_another_signal_is_no_stop_and_removal_is_possible_while_it_waits(opened: Callable[[], Engine]) -> None:
    engine = opened()
    create(engine, "c", "sleep inf", "on-failure")
    engine.containers.start("c")
    engine.containers.kill("c", "HUP")
    reach(engine, "c", State.STOPPED)
    assert due(engine, "c") is not None
    engine.containers.remove("c")
    assert engine.containers.names() == []
    assert engine.meta.row("SELECT * FROM restarts") is None


def test_a_policy_may_change_while_it_waits(opened: Callable[[], Engine], clock: ManualClock) -> None:
    engine = opened()
    create(engine, "c", "true", "always")
    engine.containers.start("c")
    reach(engine, "c", State.STOPPED)
    engine.containers.set_field("c", "restart", "no")
    clock.advance(1)
    assert engine.containers.wait("c", 40) == 0
    assert engine.containers.get("c").restarts == 0


def test_a_start_by_a_person_that_fails_is_theirs_and_one_by_policy_is_tried_again(
    opened: Callable[[], Engine], clock: ManualClock
) -> None:
    engine = opened()
    create(engine, "bad", "nothing", "always")
    with pytest.raises(RuntimeFailure):
        engine.containers.start("bad")
    assert due(engine, "bad") is None
    create(engine, "c", "exit 1", "always")
    engine.containers.start("c")
    reach(engine, "c", State.STOPPED)
    engine.containers.set_field("c", "command", "nothing")
    clock.advance(0.1)
    assert restarted(engine, "c", 1).exit_code == 127
    assert due(engine, "c") == pytest.approx(0.2)


def test_what_starts_with_the_engine(opened: Callable[[], Engine], clock: ManualClock) -> None:
    engine = opened()
    kinds = ("no", "always", "unless-stopped", "on-failure")
    for kind in kinds:
        for name in (f"{kind}-ran", f"{kind}-stopped", f"{kind}-halted"):
            create(engine, name, "sleep inf", kind)
            engine.containers.start(name)
        engine.containers.stop(f"{kind}-stopped", 0)
        create(engine, f"{kind}-never", "sleep inf", kind)
    for name in (f"{kind}-halted" for kind in kinds):
        container = engine.containers.get(name)
        engine.containers.records.move(container.id, State.STOPPING)  # as `halt` does to all
        engine.drivers.get().signal(container.id, 15)
        reach(engine, name, State.STOPPED)
    engine.close()
    engine = opened()  # the fake driver forgets what ran: as after a restart of the host
    up = [
        "always-halted",
        "always-ran",
        "always-stopped",
        "on-failure-ran",
        "unless-stopped-halted",
        "unless-stopped-ran",
    ]
    clock.advance(1)
    for name in up:
        reach(engine, name, State.RUNNING)
    running = [item.name for item in engine.containers.all() if item.state is State.RUNNING]
    assert running == up


def test_what_is_due_survives_the_daemon(opened: Callable[[], Engine], clock: ManualClock) -> None:
    engine = opened()
    create(engine, "c", "exit 1", "on-failure")
    engine.containers.start("c")
    for times in range(3):
        restarted(engine, "c", times)
        clock.advance(due(engine, "c") or 0)
    restarted(engine, "c", 3)
    engine.close()
    engine = opened()
    assert due(engine, "c") == pytest.approx(0.8)
    engine.containers.set_field("c", "command", "sleep inf")
    clock.advance(0.8)
    assert reach(engine, "c", State.RUNNING).restarts == 4


def test_halt_stops_all_and_keeps_nobody_down(opened: Callable[[], Engine]) -> None:
    engine = opened()
    for name, restart in (("a", "unless-stopped"), ("b", "no")):
        create(engine, name, "sleep inf", restart)
        engine.containers.start(name)
    engine.containers.pause("b")
    engine.halt()
    for name in ("a", "b"):
        reach(engine, name, State.STOPPED)
        assert due(engine, name) is None
    engine.close()
    engine = opened()
    eventually(lambda: engine.containers.get("a").state is State.RUNNING)
    assert engine.containers.get("b").state is State.STOPPED
