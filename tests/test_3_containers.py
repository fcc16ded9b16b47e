"""Containers on the fake driver: every verb, its errors, its events, and what is left behind."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import add_image, events, eventually, reach

from engine.config import parse_config
from engine.engine import Engine
from engine.errors import AlreadyExists, Busy, Gone, InvalidArgument, NotFound, RuntimeFailure
from engine.events import acting
from engine.lifecycle import State

IMAGE = "docker.io/library/small:1"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "store", runtime="fake")
    add_image(engine, IMAGE)
    yield engine
    engine.close(unmount=True)


def make(engine: Engine, name: str, *argv: str) -> str:
    engine.containers.create(name, parse_config(f"image: {IMAGE}"))
    if argv:
        engine.containers.set_field(name, "command", "\n".join(argv) + "\n" if len(argv) > 1 else argv[0])
    return engine.containers.get(name).id


def states(engine: Engine, id: str) -> list[str]:
    return [event["to"] for event in events(engine, f"container/{id}") if event["type"] == "stateChanged"]


def test_a_life_from_created_to_removed_is_all_in_the_journal(engine: Engine) -> None:
    id = make(engine, "web", "sleep", "inf")
    containers = engine.containers
    with acting("uid=0 pid=1"):
        containers.start("web")
    running = containers.get("web")
    assert running.state is State.RUNNING and running.pid and running.started_ns and running.image
    containers.pause("web")
    containers.resume("web")
    containers.stop("web")
    stopped = containers.get("web")
    assert (stopped.state, stopped.exit_code, stopped.pid) == (State.STOPPED, 128 + 15, None)
    assert stopped.finished_ns and stopped.started_ns and stopped.finished_ns >= stopped.started_ns
    containers.remove("web")
    assert states(engine, id) == [
        "starting", "running", "paused", "running", "stopping", "stopped", "removing", "removed",
    ]  # fmt: skip
    mine = events(engine, f"container/{id}")
    assert mine[0]["type"] == "containerCreated" and mine[-1]["type"] == "containerRemoved"
    assert next(event for event in mine if event.get("to") == "starting")["who"] == "uid=0 pid=1"
    assert not (engine.store / "containers" / id).exists()
    with pytest.raises(NotFound):
        containers.get("web")


def test_illegal_verbs_are_refused_by_name_and_change_nothing(engine: Engine) -> None:
    id = make(engine, "web")
    before = events(engine)
    for verb in ("stop", "restart", "kill", "pause", "resume"):
        with pytest.raises(Busy, match=f"cannot {verb}: the container is created; legal now: start, remove"):
            getattr(engine.containers, verb)("web")
    assert events(engine) == before and engine.containers.get("web").id == id
    engine.containers.start("web")
    for verb in ("start", "resume", "remove"):
        with pytest.raises(Busy, match="is running"):
            getattr(engine.containers, verb)("web")
    assert engine.containers.verbs("web") == ["stop", "restart", "kill", "pause"]


def test_what_ends_by_itself_is_stopped_with_its_exit_code(engine: Engine) -> None:
    id = make(engine, "job", "exit", "7")
    engine.containers.start("job")
    assert engine.containers.wait("job", 40) == 7
    assert states(engine, id) == ["starting", "running", "stopped"]
    engine.containers.set_field("job", "command", "oom")
    engine.containers.start("job")
    job = reach(engine, "job", State.STOPPED)
    assert (job.exit_code, job.oom, job.reason) == (137, True, "out of memory")
    engine.containers.set_field("job", "command", "true")
    engine.containers.start("job")
    job = reach(engine, "job", State.STOPPED)
    assert (job.exit_code, job.oom, job.reason) == (0, False, "")


def test_a_start_that_fails_leaves_it_stopped_with_the_reason_and_dockers_exit_code(engine: Engine) -> None:
    id = make(engine, "bad", "no-such-program")
    with pytest.raises(RuntimeFailure, match="no-such-program"):
        engine.containers.start("bad")
    bad = engine.containers.get("bad")
    assert (bad.state, bad.exit_code) == (State.STOPPED, 127) and "no-such-program" in bad.reason
    assert states(engine, id) == ["starting", "stopped"]
    engine.containers.set_field("bad", "command", "true")
    engine.containers.start("bad")
    assert engine.containers.wait("bad", 40) == 0


def test_names_images_and_fields_are_checked(engine: Engine) -> None:
    containers = engine.containers
    make(engine, "web")
    with pytest.raises(AlreadyExists):
        containers.create("web")
    with pytest.raises(InvalidArgument):
        containers.create("../up")
    with pytest.raises(NotFound) as caught:
        containers.run("missing:1", "x")
    assert caught.value.hint and "pull" in caught.value.hint
    assert containers.names() == ["web"]
    containers.create("bare")
    with pytest.raises(InvalidArgument, match="image"):
        containers.start("bare")
    for field, text in {
        "image": "UPPER//bad", "stop_signal": "NOPE", "runtime": "vmware", "cap_add": "FLY", "memory": "much",
        "volumes": "- a:/x\n- b:/x\n", "env": "novalue", "tty": "maybe", "workdir": "relative",
    }.items():  # fmt: skip
        before = containers.get("bare").config
        with pytest.raises(InvalidArgument, match=field if field != "cap_add" else "FLY"):
            containers.set_field("bare", field, text)
        assert containers.get("bare").config == before
    with pytest.raises(NotFound, match="no config field"):
        containers.set_field("bare", "colour", "red")


def test_config_changes_while_running_only_where_that_means_something(engine: Engine) -> None:
    id = make(engine, "web")
    engine.containers.start("web")
    with pytest.raises(Busy, match="command"):
        engine.containers.set_field("web", "command", "true")
    engine.containers.set_field("web", "labels", "tier=front\n")
    assert engine.containers.field_text("web", "labels") == "tier=front\n"
    configured = [event for event in events(engine, f"container/{id}") if event["type"] == "containerConfigured"]
    assert configured[-1]["fields"] == ["labels"]
    seen = engine.journal.last
    engine.containers.set_field("web", "labels", "tier=front\n")  # the same again is no change
    assert engine.journal.last == seen


def test_run_without_a_name_chooses_one_and_argv_replaces_the_command(engine: Engine) -> None:
    container = engine.containers.run(IMAGE, None, ["exit", "3"])
    adjective, _, noun = container.name.partition("_")
    assert adjective and noun
    assert engine.containers.wait(container.name, 40) == 3


def test_stop_escalates_to_sigkill_and_the_caller_does_not_wait_for_a_long_grace(engine: Engine) -> None:
    for name, grace in (("stubborn", 100.0), ("short", 1.5)):
        make(engine, name, "trap", "inf")
        engine.containers.start(name)
        engine.containers.stop(name, grace)
    assert engine.containers.get("stubborn").state is State.STOPPING
    assert engine.containers.verbs("stubborn") == ["kill"]
    assert reach(engine, "short", State.STOPPED).exit_code == 137


def test_a_slow_stop_of_one_delays_no_other_and_kill_hurries_it(engine: Engine) -> None:
    make(engine, "slow", "trap", "inf")
    make(engine, "other")
    engine.containers.start("slow")
    thread = threading.Thread(target=engine.containers.stop, args=("slow", 100))
    thread.start()
    reach(engine, "slow", State.STOPPING)
    engine.containers.start("other")
    engine.containers.stop("other")
    assert engine.containers.get("slow").state is State.STOPPING
    engine.containers.kill("slow")
    assert engine.containers.get("slow").state is State.STOPPED
    thread.join()


def test_a_paused_container_can_be_stopped_killed_and_removed_by_force(engine: Engine) -> None:
    for number, end in enumerate(("stop", "kill")):
        name = f"p{number}"
        make(engine, name)
        engine.containers.start(name)
        engine.containers.pause(name)
        getattr(engine.containers, end)(name)
        assert reach(engine, name, State.STOPPED).exit_code == (143 if end == "stop" else 137)
    make(engine, "p3", "trap", "inf")
    engine.containers.start("p3")
    engine.containers.pause("p3")
    engine.containers.remove("p3", force=True)
    assert "p3" not in engine.containers.names()


def test_restart_counts_and_starts_a_stopped_one_too(engine: Engine) -> None:
    make(engine, "web")
    engine.containers.start("web")
    first = engine.containers.get("web").pid
    engine.containers.restart("web")
    again = reach(engine, "web", State.RUNNING)
    assert again.restarts == 1 and again.pid != first
    engine.containers.stop("web")
    engine.containers.restart("web")
    assert engine.containers.get("web").restarts == 2


def test_a_failure_after_the_caller_left_is_kept_in_error(engine: Engine) -> None:
    id = make(engine, "web", "trap", "inf")
    engine.containers.start("web")
    engine.containers.restart("web", 1.3)  # returns while stopping; meanwhile its command goes
    with engine.meta.tx() as db:
        db.execute("UPDATE containers SET config = replace(config, 'trap', 'gone')")
    reach(engine, "web", State.STOPPED, seconds=5)
    assert "executable file not found" in eventually(lambda: engine.failures.text(f"container/{id}"))


def test_wait_ends_when_it_stops_times_out_before_and_fails_when_it_is_removed(engine: Engine) -> None:
    make(engine, "web")
    assert engine.containers.wait("web", 0.05) is None
    engine.containers.start("web")
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(engine.containers.wait("web", 40)))
    thread.start()
    engine.containers.stop("web")
    thread.join(5)
    assert results == [143]
    make(engine, "other")

    def gone() -> None:
        with pytest.raises(Gone):
            engine.containers.wait("other", 40)
        results.append("gone")

    thread = threading.Thread(target=gone)
    thread.start()
    time.sleep(0.1)
    engine.containers.remove("other")
    thread.join(5)
    assert results == [143, "gone"]


def test_output_is_told_of_in_ranges_without_gaps_and_before_the_end(engine: Engine) -> None:
    id = make(engine, "talk", "lines", "500")
    for _ in range(2):
        engine.containers.start("talk")
        engine.containers.wait("talk", 40)
    mine = events(engine, f"container/{id}")
    told = [event["stdout"] for event in mine if event["type"] == "logOutput"]
    size = engine.containers.logs("talk").size("stdout")
    assert size == 2 * sum(len(f"line {n}\n") for n in range(500))
    assert told[0][0] == 0 and told[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(told))
    stops = [index for index, event in enumerate(mine) if event.get("to") == "stopped"]
    assert mine[stops[0] - 1]["type"] == "logOutput"


def test_volumes_in_use_cannot_go_and_missing_ones_are_made_by_the_start(engine: Engine) -> None:
    make(engine, "db")
    engine.containers.set_field("db", "volumes", "- data:/var/lib/db\n")
    engine.containers.start("db")
    assert engine.volumes.users("data") == ["db"]
    assert engine.volumes.path("data").is_dir()
    with pytest.raises(Busy, match="db"):
        engine.volumes.remove("data")
    engine.containers.remove("db", force=True)
    engine.volumes.remove("data")
    assert engine.volumes.all() == []


def test_many_threads_writing_verbs_keep_every_invariant(engine: Engine) -> None:
    names = [f"c{number}" for number in range(4)]
    for name in names:
        make(engine, name)
    verbs = ["start", "stop", "kill", "pause", "resume", "restart"]
    surprises: list[BaseException] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(40):
            name, verb = choose.choice(names), choose.choice(verbs)
            try:
                getattr(engine.containers, verb)(name)
            except (Busy, RuntimeFailure, NotFound):
                pass
            except BaseException as error:
                surprises.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not surprises
    for name in names:
        reach(engine, name, State.RUNNING, State.PAUSED, State.STOPPED, State.CREATED)
    everything = events(engine)
    assert [event["seq"] for event in everything] == list(range(1, len(everything) + 1))
    for name in names:
        now = engine.containers.get(name)
        moves = [event for event in everything if event["type"] == "stateChanged" and event["name"] == name]
        assert all(before["to"] == after["from"] for before, after in itertools.pairwise(moves))
        assert moves[-1]["to"] == now.state
