"""Health checks on the fake driver, with a clock that a test moves on: when it is asked, and what follows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clocks import ManualClock
from engines import add_image, events, eventually, reach

from engine.config import parse_config
from engine.engine import Engine
from engine.errors import DeadlineExceeded
from engine.lifecycle import State
from engine.upkeep import Health
from fdfs.tree.upkeep import health_log

IMAGE, CHECKED = "docker.io/library/small:1", "docker.io/library/checked:1"
CHECK = {"Test": ["CMD", "true"], "Interval": 10_000_000_000, "Retries": 2}


class Answers:
    """What probes answer, in place of the fake driver's own; counts them."""

    def __init__(self, engine: Engine) -> None:
        self.code, self.output, self.late = 0, b"", False
        self.count = 0
        self._lock = threading.Lock()
        engine.drivers.get().probe_exec = self  # type: ignore[method-assign, assignment]

    def __call__(self, id: str, argv: Any, *, deadline: float) -> tuple[int, bytes]:
        with self._lock:
            self.count += 1
        if self.late:
            raise DeadlineExceeded("too late")
        return self.code, self.output


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(tmp_path: Path, clock: ManualClock) -> Iterator[Engine]:
    with Engine(tmp_path / "store", runtime="fake", clock=clock) as engine:
        with engine.meta._lock:  # its threads have transactions of their own
            engine.meta._writer.execute("PRAGMA synchronous=OFF")
        add_image(engine, IMAGE)
        add_image(engine, CHECKED, Cmd=["sleep", "inf"], Healthcheck=CHECK)
        yield engine
        for container in engine.containers.all():
            engine.containers.remove(container.name, force=True)


def run(engine: Engine, name: str = "c", **check: Any) -> None:
    config = {"image": IMAGE, "command": "sleep inf", "healthcheck": {"test": "x", "interval": 10, **check}}
    engine.containers.create(name, parse_config(json.dumps(config)))
    engine.containers.start(name)
    reach(engine, name, State.RUNNING)
    eventually(lambda: health(engine, name) is Health.STARTING)
    scheduled(engine)


def scheduled(engine: Engine) -> None:
    """Until the next probe of every container is arranged: only then may a test move the clock."""
    scheduler = engine.containers.health._scheduler
    running = sum(c.state is State.RUNNING for c in engine.containers.all())
    eventually(lambda: sum(at > scheduler.clock.monotonic() for at, _, _ in list(scheduler._heap)) >= 1)
    assert running


def health(engine: Engine, name: str = "c") -> Health:
    return engine.containers.health.of(engine.containers.get(name))


def probe(engine: Engine, clock: ManualClock, answers: Answers, seconds: float) -> None:
    """Move on to the next probe and wait until it is counted and the one after it is arranged."""
    before, told = answers.count, len(engine.containers.health.probes(engine.containers.get("c").id))
    clock.advance(seconds)
    eventually(lambda: answers.count == before + 1)
    probes = engine.containers.health.probes
    eventually(lambda: len(probes(engine.containers.get("c").id)) == min(told + 1, 10) or told == 10)
    scheduled(engine)


def told(engine: Engine) -> list[tuple[str, str]]:
    return [(event["was"], event["health"]) for event in events(engine) if event["type"] == "healthStatus"]


def test_it_turns_unhealthy_and_healthy_again(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    run(engine, retries=3)
    assert answers.count == 0  # nothing is asked before the first interval has passed
    probe(engine, clock, answers, 10)
    eventually(lambda: health(engine) is Health.HEALTHY)
    answers.code, answers.output = 1, b"no luck\n" + b"x" * 10_000
    for _ in range(2):
        probe(engine, clock, answers, 10)
        assert health(engine) is Health.HEALTHY
    probe(engine, clock, answers, 10)
    eventually(lambda: health(engine) is Health.UNHEALTHY)
    answers.code = 0
    probe(engine, clock, answers, 10)
    eventually(lambda: health(engine) is Health.HEALTHY)
    expected = [("none", "starting"), ("starting", "healthy"), ("healthy", "unhealthy"), ("unhealthy", "healthy")]
    eventually(lambda: told(engine) == expected)
    bad = next(event for event in events(engine) if event.get("health") == "unhealthy")
    assert (bad["streak"], bad["exit_code"], len(bad["output"])) == (3, 1, 4096) and bad["output"].startswith("no luck")
    lines = [json.loads(line) for line in health_log(engine, "c").splitlines()]
    assert [line["exit_code"] for line in lines] == [0, 1, 1, 1, 0]
    assert lines[0].keys() == {"start", "end", "exit_code", "output"}


def test_the_start_period(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    answers.code = 1
    run(engine, start_period=20, start_interval=2, retries=1)
    for _ in range(3):
        probe(engine, clock, answers, 2)
        assert health(engine) is Health.STARTING
    answers.code = 0
    probe(engine, clock, answers, 2)  # one success ends it
    eventually(lambda: health(engine) is Health.HEALTHY)
    answers.code = 1
    clock.advance(9)
    probe(engine, clock, answers, 1)  # and then the interval is the ordinary one
    eventually(lambda: health(engine) is Health.UNHEALTHY)


def test_a_deadline_counts_as_failure_and_says_so(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    answers.late = True
    run(engine, retries=1, timeout=3)
    probe(engine, clock, answers, 10)
    eventually(lambda: health(engine) is Health.UNHEALTHY)
    line = json.loads(health_log(engine, "c"))
    assert line["exit_code"] == -1 and line["output"] == "Health check exceeded timeout (3s)"


def test_who_is_paused_or_has_stopped_is_not_asked(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    run(engine)
    probe(engine, clock, answers, 10)
    engine.containers.pause("c")
    clock.advance(100)
    assert health(engine) is Health.HEALTHY
    engine.containers.resume("c")
    scheduled(engine)
    assert answers.count == 1
    probe(engine, clock, answers, 10)
    engine.containers.stop("c")
    reach(engine, "c", State.STOPPED)
    assert health(engine) is Health.NONE and health_log(engine, "c") == ""
    clock.advance(100)
    engine.containers.start("c")
    eventually(lambda: health(engine) is Health.STARTING)
    assert answers.count == 2


def test_the_image_says_what_to_ask_unless_the_config_does(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    engine.containers.run(CHECKED, "c")
    eventually(lambda: health(engine) is Health.STARTING)
    scheduled(engine)
    answers.code = 1
    probe(engine, clock, answers, 10)
    probe(engine, clock, answers, 10)
    eventually(lambda: health(engine) is Health.UNHEALTHY)
    engine.containers.run(CHECKED, "off", healthcheck={"disable": True})
    engine.containers.run(IMAGE, "without", ["sleep", "inf"])
    for name in ("off", "without"):
        eventually(lambda name=name: engine.containers.health._watches[engine.containers.get(name).id].known)  # type: ignore[misc]
        assert health(engine, name) is Health.NONE


def test_two_hundred_containers_need_few_threads(engine: Engine, clock: ManualClock) -> None:
    answers = Answers(engine)
    before = threading.active_count()
    config = parse_config(
        json.dumps({"image": IMAGE, "command": "sleep inf", "healthcheck": {"test": "x", "interval": 10}})
    )
    for number in range(200):
        with engine.meta.tx():  # only rows: what is asked is the health
            container = engine.containers.records.create(f"c{number}", config, lambda id: None)
            engine.containers.records.move(container.id, State.STARTING)
            engine.containers.records.move(container.id, State.RUNNING, runtime="fake", started_ns=clock.time_ns())
    watches = engine.containers.health._watches
    eventually(lambda: len(watches) == 200 and all(watch.known for watch in watches.values()), 30)
    eventually(lambda: len(engine.containers.health._scheduler._due) == 200, 30)
    clock.advance(10)
    eventually(lambda: answers.count == 200, 30)
    eventually(lambda: all(watch.health is Health.HEALTHY for watch in watches.values()), 30)
    assert threading.active_count() - before <= 33
    with engine.meta.tx():
        for number in range(200):
            container = engine.containers.get(f"c{number}")
            engine.containers.records.move(container.id, State.STOPPED)
    assert not watches and not engine.containers.health._scheduler._due
