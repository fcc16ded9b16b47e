"""history/<seq>/: what a container was, as long as the journal has the event."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import add_image, events, reach

from engine.config import parse_config
from engine.engine import Engine
from engine.errors import NotFound
from engine.lifecycle import State

IMAGE = "docker.io/library/small:1"


def test_state_and_config_after_each_event(tmp_path: Path) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        engine.containers.create("c", parse_config(f"image: {IMAGE}\ncommand: sleep inf"))
        engine.containers.set_field("c", "labels", "a=1")
        engine.containers.start("c")
        reach(engine, "c", State.RUNNING)
        engine.containers.set_field("c", "labels", "a=2")
        engine.containers.kill("c")
        reach(engine, "c", State.STOPPED)
        container = engine.containers.get("c")
        found = events(engine, container.object)
        numbers = engine.history.numbers(container.id)
        changes = [
            event for event in found if event["type"] in ("containerCreated", "containerConfigured", "stateChanged")
        ]
        assert numbers == [event["seq"] for event in changes]
        seen = []
        for seq in numbers:
            entry = engine.history.at(container.id, seq)
            assert json.loads(entry.event)["seq"] == seq and entry.time == json.loads(entry.event)["time"]
            seen.append((entry.state, parse_config(entry.config).labels))
        assert seen == [
            ("created", {}),
            ("created", {"a": "1"}),
            ("starting", {"a": "1"}),
            ("running", {"a": "1"}),
            ("running", {"a": "2"}),
            ("stopped", {"a": "2"}),
        ]
        assert changes[1]["config"].startswith("sha256:") and changes[1]["config"] != changes[0]["config"]
        engine.policy.write(b"events_max: 2\nevents_max_age: max\n")
        engine.retention.prune()
        kept = engine.history.numbers(container.id)
        assert kept and set(kept) < set(numbers)
        assert engine.history.at(container.id, kept[-1]).state is State.STOPPED
        with pytest.raises(NotFound):
            engine.history.at(container.id, numbers[0])
        assert not engine.history.has(container.id, numbers[0])
        assert engine.meta.query("SELECT count(*) AS n FROM configs")[0]["n"] == 1
        assert engine.containers.records.last_output(container.id) == {}
        engine.containers.remove("c")
        for table in ("history", "configs", "restarts"):
            assert engine.meta.row(f"SELECT * FROM {table}") is None


def test_what_was_told_of_the_output_is_known_after_its_event_is_gone(tmp_path: Path) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        engine.containers.run(IMAGE, "c", ["lines", "10"])
        id = engine.containers.get("c").id
        reach(engine, "c", State.STOPPED)
        before = engine.containers.records.last_output(id)
        assert before["stdout"] > 0
        for _ in range(5):
            engine.containers.create("x")
            engine.containers.remove("x")
        engine.policy.write(b"events_max: 1\n")
        engine.retention.prune()
        assert engine.containers.records.last_output(id) == before
