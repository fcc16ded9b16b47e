"""Any sequence of verbs, on several containers, with daemons coming and going: the engine agrees with a small model."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from engines import add_image, events, reach
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from engine import lifecycle
from engine.config import parse_config
from engine.engine import Engine
from engine.errors import AlreadyExists, Busy, NotFound, RuntimeFailure
from engine.lifecycle import ALIVE, State, Verb

IMAGE = "docker.io/library/small:1"
NAMES = st.sampled_from(["a", "b", "c"])
COMMANDS = st.sampled_from(["sleep inf", "true", "exit 3", "oom", "nothing", "trap inf"])
ENDS = {"true": 0, "exit 3": 3, "oom": 137}
SETTLED = (State.CREATED, State.RUNNING, State.PAUSED, State.STOPPED)


class Model:
    def __init__(self, command: str) -> None:
        self.command, self.state = command, State.CREATED
        self.exit_code: int | None = None
        self.restarts = 0

    def run(self) -> None:
        self.state, self.exit_code = State.RUNNING, None
        if self.command == "nothing":
            self.end(127)
        elif self.command in ENDS:
            self.end(ENDS[self.command])

    def end(self, code: int) -> None:
        self.state, self.exit_code = State.STOPPED, code


def machine(base: Path) -> type[RuleBasedStateMachine]:
    numbers = itertools.count()

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.store = base / str(next(numbers))
            self.model: dict[str, Model] = {}
            self.open()
            add_image(self.engine, IMAGE)
            for name, command in (("a", "sleep inf"), ("b", "exit 3")):  # so that most verbs find something to do
                self.create_one(name, command)

        def create_one(self, name: str, command: str) -> None:
            config = parse_config(json.dumps({"image": IMAGE, "command": command}))
            self.engine.containers.create(name, config)
            self.model[name] = Model(command)

        def open(self) -> None:
            self.engine = Engine(self.store, runtime="fake")
            with self.engine.meta._lock:  # its threads have transactions of their own
                self.engine.meta._writer.execute("PRAGMA synchronous=OFF")

        def expect(self, name: str, verb: Verb) -> Model | None:
            """The model when `verb` is legal; else check that it is refused the right way."""
            one = self.model.get(name)
            call = getattr(self.engine.containers, verb)
            if one is None:
                with pytest.raises(NotFound):
                    call(name)
                return None
            if verb not in lifecycle.legal_verbs(one.state):
                last = self.committed()
                with pytest.raises(Busy, match=f"is {one.state}"):
                    call(name)
                moved = [event for event in self.engine.journal.replay(last) if event.type == "stateChanged"]
                assert not moved
                return None
            return one

        def committed(self) -> int:
            """The newest event that the catalog has. The journal's own count follows a moment after the commit."""
            row = self.engine.meta.row("SELECT max(seq) AS seq FROM events")
            assert row is not None
            return int(row["seq"])

        def begin_run(self, name: str, verb: Verb, one: Model) -> None:
            call = getattr(self.engine.containers, verb)
            one.run()
            if one.command == "nothing":
                with pytest.raises(RuntimeFailure):
                    call(name)
            else:
                call(name)

        @rule(name=NAMES, command=COMMANDS)
        def create(self, name: str, command: str) -> None:
            if name in self.model:
                with pytest.raises(AlreadyExists):
                    self.engine.containers.create(name)
            else:
                self.create_one(name, command)

        @rule(name=NAMES, command=COMMANDS)
        def configure(self, name: str, command: str) -> None:
            one = self.model.get(name)
            if one is None:
                return
            if one.state in (State.CREATED, State.STOPPED) or command == one.command:
                self.engine.containers.set_field(name, "command", command)
                one.command = command
            else:
                with pytest.raises(Busy):
                    self.engine.containers.set_field(name, "command", command)

        @rule(name=NAMES)
        def start(self, name: str) -> None:
            if (one := self.expect(name, Verb.START)) is not None:
                self.begin_run(name, Verb.START, one)

        @rule(name=NAMES, grace=st.sampled_from([0.0, 0.05]))
        def stop(self, name: str, grace: float) -> None:
            if (one := self.expect(name, Verb.STOP)) is not None:
                self.engine.containers.stop(name, grace)
                reach(self.engine, name, State.STOPPED)
                code = self.engine.containers.get(name).exit_code
                assert code == 137 if one.command == "trap inf" else code in (143, 137)
                one.end(code or 0)

        @rule(name=NAMES)
        def restart(self, name: str) -> None:
            one = self.expect(name, Verb.RESTART)
            if one is None:
                return
            one.restarts += 1
            if one.state is State.STOPPED:
                self.begin_run(name, Verb.RESTART, one)
            else:  # only what runs on and on is found running
                self.engine.containers.restart(name, 0)
                one.run()
                again = one.restarts  # on a slow machine the caller is back before it has stopped and started
                back = lambda now: now.state is State.RUNNING and now.restarts == again  # noqa: E731
                assert self.engine.containers.wait_for(name, back, 10.0), name

        @rule(name=NAMES, signal=st.sampled_from(["KILL", "TERM", "URG"]))
        def kill(self, name: str, signal: str) -> None:
            one = self.expect(name, Verb.KILL)
            if one is None:
                return
            paused = one.state is State.PAUSED
            if signal == "TERM" and (paused or one.command == "trap inf"):
                return  # waits until it is resumed, or is ignored: the model does not follow that
            self.engine.containers.kill(name, signal)
            if signal != "URG":
                reach(self.engine, name, State.STOPPED)
                one.end(137 if signal == "KILL" else 143)

        @rule(name=NAMES)
        def pause(self, name: str) -> None:
            if (one := self.expect(name, Verb.PAUSE)) is not None:
                self.engine.containers.pause(name)
                one.state = State.PAUSED

        @rule(name=NAMES)
        def resume(self, name: str) -> None:
            if (one := self.expect(name, Verb.RESUME)) is not None:
                self.engine.containers.resume(name)
                one.state = State.RUNNING

        @rule(name=NAMES, force=st.booleans())
        def remove(self, name: str, force: bool) -> None:
            one = self.model.get(name)
            if one is not None and force and one.state in ALIVE:
                self.engine.containers.remove(name, force=True)
            elif self.expect(name, Verb.REMOVE) is None:
                return
            else:
                self.engine.containers.remove(name)
            del self.model[name]

        @rule()
        def daemon_restarts(self) -> None:
            """The fake driver's containers go with their daemon: what ran is told to be lost."""
            self.engine.close()
            self.open()
            for one in self.model.values():
                if one.state in ALIVE:
                    one.end(255)

        @invariant()
        def agrees(self) -> None:
            if not hasattr(self, "engine"):
                return
            assert set(self.engine.containers.names()) == set(self.model)
            for name, one in self.model.items():
                now = reach(self.engine, name, *SETTLED)
                if one.state is State.STOPPED:
                    now = reach(self.engine, name, State.STOPPED)
                assert (now.state, now.exit_code, now.restarts) == (one.state, one.exit_code, one.restarts), name
                assert (now.pid is not None) == (now.state in ALIVE)
                assert self.engine.containers.verbs(name) == lifecycle.legal_verbs(one.state)

        def teardown(self) -> None:
            if not hasattr(self, "engine"):
                return
            found = events(self.engine)
            assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
            moves: dict[str, str] = {}
            for event in found:
                if event["type"] == "stateChanged" and event["object"].startswith("container/"):
                    assert event["from"] == moves.get(event["object"], "created")
                    assert State(event["to"]) in lifecycle.TRANSITIONS[State(event["from"])]
                    moves[event["object"]] = event["to"]
            self.engine.close(unmount=True)
            self.engine.mounts.release_all()

    return Machine


EXAMPLES = 50 if os.environ.get("DUTCHMAN_SLOW_TESTS") else 15


def test_any_sequence_of_verbs_agrees_with_the_model(tmp_path: Path) -> None:
    run_state_machine_as_test(
        machine(tmp_path),
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
