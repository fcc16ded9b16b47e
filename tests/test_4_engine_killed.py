"""`kill -9` of the engine at each point of a container's life: the next one finds out what is true, and loses nothing.

A child process opens the engine, brings a container into a state, and is killed there; `point` names where: at a call
of the driver (just before or after it) or when all is quiet. The children are forks of one process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import add_busybox, add_image, events, eventually, reach

from engine import host, hostmounts
from engine.config import parse_config
from engine.engine import Engine
from engine.lifecycle import State
from engine.runtimes.oci import OciRuntime
from engine.session import OVER

IMAGE = "docker.io/library/busybox:latest"
CHILDREN = """
import json, os, signal, subprocess, sys, threading, time, traceback
from pathlib import Path
from engine.engine import Engine
from engine.runtimes import fake, oci

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def live(store, runtime, point, steps):
    engine = Engine(store, runtime=runtime)
    containers, driver = engine.containers, engine.drivers.get()
    when, _, method = point.partition(" ")
    if method:
        place = {"driver": driver, "mounts": engine.mounts, "records": containers.records,
                 "restarts": containers.restarts, "sessions": getattr(driver, "sessions", None), "os": os,
                 "process": subprocess}
        holder, _, call = method.partition(".")
        real = getattr(place[holder], call)
        def hooked(*args, **kwargs):
            if when == "before":
                die()
            result = real(*args, **kwargs)
            die()
            return result
        arm = lambda: setattr(place[holder], call, hooked)
    else:
        arm = lambda: None
    for step in steps.split(";"):
        verb, _, rest = step.strip().partition(" ")
        if verb == "arm":
            arm()
        elif verb == "keep":  # a monitor too slow to clear what an ended run leaves
            containers.monitor._clear = lambda container: None
        elif verb == "sleep":
            time.sleep(float(rest))
        elif verb == "exec":
            engine.containers.sessions.run("c", ["sleep", "1000"])
        elif verb == "late":  # killed so many seconds from now, wherever it is then
            threading.Timer(float(rest), die).start()
        elif verb in ("running", "stopped"):
            assert containers.wait_for("c", lambda now: now.state == verb, 40)
        elif verb == "ready":  # it has its trap: process 1 ignores a signal it has no handler for
            logs, until = containers.logs("c"), time.monotonic() + 40
            while logs.read("stdout", 0, 100) != b"ready\\n":
                assert time.monotonic() < until
                time.sleep(0.01)
        else:
            getattr(containers, verb)("c", *([float(rest)] if rest else []))
    die()

for line in sys.stdin:
    store, *how, errors = json.loads(line)
    child = os.fork()  # there is one thread only
    if not child:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        try:
            live(Path(store), *how)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def supported(runtime: str, base: Path) -> None:
    if runtime == "oci":
        if not (host.LINUX and host.is_root()):
            pytest.skip("containers need root on Linux")
        probe = OciRuntime(base).probe()
        if not probe.ok:
            pytest.skip(f"no OCI runtime: {probe.reason}")


Crash = Callable[..., Engine]


@pytest.fixture(params=["oci", "fake"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    supported(request.param, tmp_path)
    return str(request.param)


@pytest.fixture(scope="module")
def children() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILDREN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def crash(tmp_path: Path, children: subprocess.Popen[str]) -> Iterator[Crash]:
    opened: list[Engine] = []

    def run(
        runtime: str,
        command: list[str],
        point: str,
        steps: str,
        pause: float = 0.0,
        restart: str = "no",
        grace: int = 10,
    ) -> Engine:
        store = tmp_path / "store"
        engine = Engine(store, runtime=runtime)
        if runtime == "oci":
            add_busybox(engine)
        else:
            add_image(engine, IMAGE)
        text = f"image: {IMAGE}\ncommand: {command!r}\nrestart: {restart}\nstop_grace_period: {grace}"
        engine.containers.create("c", parse_config(text))
        engine.close()
        assert children.stdin is not None and children.stdout is not None
        errors = tmp_path / "errors"
        children.stdin.write(json.dumps([str(store), runtime, point, steps, str(errors)]) + "\n")
        assert select.select([children.stdout], [], [], 100)[0], "it was not killed"
        assert int(children.stdout.readline()) == -signal.SIGKILL, errors.read_text()
        time.sleep(pause)
        opened.append(Engine(store, runtime=runtime))
        return opened[-1]

    yield run
    for engine in opened:
        for container in engine.containers.all():
            engine.containers.remove(container.name, force=True)
        engine.close(unmount=True)
        assert not [point for point, _, _ in hostmounts.mounts() if point.startswith(str(engine.store))]
        assert os.listdir(engine.store / "tmp") == []


def stdout(engine: Engine) -> bytes:
    logs = engine.containers.logs("c")
    assert logs.caught_up("stdout", 40)
    return logs.read("stdout", 0, 1 << 24)


def check_journal(engine: Engine) -> None:
    """Gapless, and each container's moves follow each other."""
    found = events(engine)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    moves = [event for event in found if event["type"] == "stateChanged" and event["object"].startswith("container/")]
    for before, after in zip(moves, moves[1:]):  # noqa: B905, RUF007
        assert before["to"] == after["from"]
    assert moves[-1]["to"] == engine.containers.get("c").state


SLEEP = {"oci": ["sleep", "1000"], "fake": ["sleep", "inf"]}


def test_running_is_found_again_or_told_to_be_lost(runtime: str, crash: Crash) -> None:
    engine = crash(runtime, SLEEP[runtime], "", "start;running")
    now = engine.containers.get("c")
    if runtime == "oci":
        assert now.state is State.RUNNING and now.pid and os.path.exists(f"/proc/{now.pid}")
        engine.containers.stop("c", 0)
        assert reach(engine, "c", State.STOPPED).exit_code == 137
    else:  # in memory: it went with its daemon
        assert (now.state, now.exit_code) == (State.STOPPED, 255) and now.reason
    check_journal(engine)


def test_paused_is_found_paused(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    engine = crash("oci", SLEEP["oci"], "", "start;running;pause")
    assert engine.containers.get("c").state is State.PAUSED
    engine.containers.resume("c")
    engine.containers.kill("c")
    assert reach(engine, "c", State.STOPPED).exit_code == 137
    check_journal(engine)


@pytest.mark.parametrize("point", ["after driver.pause"])
def test_a_pause_cut_in_two_is_what_really_is(point: str, crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    engine = crash("oci", SLEEP["oci"], point, "start;running;arm;pause")
    assert engine.containers.get("c").state is State.PAUSED
    check_journal(engine)


@pytest.mark.parametrize("point", ["after mounts.ensure", "after driver.create"])
def test_a_start_cut_short_before_anything_ran_is_rolled_back(runtime: str, point: str, crash: Crash) -> None:
    engine = crash(runtime, SLEEP[runtime], point, "arm;start")
    now = engine.containers.get("c")
    assert now.state is State.STOPPED and "while it was starting" in now.reason
    check_journal(engine)
    engine.containers.start("c")
    assert engine.containers.get("c").state is State.RUNNING


def test_a_start_that_succeeded_unnoted_is_noted(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    engine = crash("oci", ["sh", "-c", "echo once; sleep 1000"], "after driver.start", "arm;start")
    now = engine.containers.get("c")
    assert now.state is State.RUNNING and now.pid and now.image
    eventually(lambda: stdout(engine) == b"once\n")
    check_journal(engine)


def test_a_run_that_ended_while_no_daemon_looked_keeps_its_exit_code_and_every_line(
    crash: Crash, tmp_path: Path
) -> None:
    supported("oci", tmp_path)
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; sleep 0.5; echo last; exit 42"
    engine = crash("oci", ["sh", "-c", script], "", "start;running", pause=1.5)
    now = reach(engine, "c", State.STOPPED)
    assert now.exit_code == 42 and now.finished_ns and now.finished_ns < time.time_ns()
    assert stdout(engine) == b"".join(b"line %d\n" % n for n in range(2000)) + b"last\n"
    told = [event for event in events(engine, f"container/{now.id}") if event["type"] == "logOutput"]
    assert told[0]["stdout"][0] == 0 and told[-1]["stdout_end"] == len(stdout(engine))
    check_journal(engine)


def test_a_short_run_whose_start_was_not_noted_is_not_lost(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    engine = crash("oci", ["sh", "-c", "echo hello; exit 9"], "after driver.start", "arm;start", pause=0.5)
    now = reach(engine, "c", State.STOPPED)
    assert now.exit_code == 9 and stdout(engine) == b"hello\n"
    check_journal(engine)


def test_a_burst_of_output_across_a_killed_daemon_loses_nothing(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    script = "i=0; while [ $i -lt 60 ]; do yes 0123456789 | head -n 500; i=$((i+1)); sleep 0.02; done"
    engine = crash("oci", ["sh", "-c", script], "", "start;running;sleep 0.4")
    assert engine.containers.wait("c", 60) == 0
    assert stdout(engine) == b"0123456789\n" * 30000


@pytest.mark.parametrize("point", ["before driver.signal", "after driver.signal"])
def test_a_stop_cut_short_is_taken_up_again(point: str, crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    script = "trap 'echo bye; exit 6' TERM; echo ready; while :; do sleep 0.05; done"
    engine = crash("oci", ["sh", "-c", script], point, "start;running;ready;arm;stop")
    now = reach(engine, "c", State.STOPPED)
    assert now.exit_code == 6 and stdout(engine) == b"ready\nbye\n"
    check_journal(engine)


def test_a_stop_that_was_asked_for_is_not_asked_for_again_and_keeps_its_deadline(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    script = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"
    engine = crash("oci", ["sh", "-c", script], "after records.note_stop", "start;running;ready;arm;stop 2", grace=1000)
    now = reach(engine, "c", State.STOPPED)  # and not the thousand seconds of its config
    assert now.exit_code == 137 and stdout(engine) == b"ready\nasked\n"
    check_journal(engine)


@pytest.mark.parametrize("point", ["after records.note_stop", "before mounts.ensure"])
def test_a_restart_cut_short_is_taken_up_again(point: str, runtime: str, crash: Crash) -> None:
    """Killed while it stops, and once it has stopped but does not run again."""
    steps = "start;running;keep;arm;restart 0;sleep 60"
    command = ["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done"] if runtime == "oci" else SLEEP[runtime]
    engine = crash(runtime, command, point, steps)
    now = engine.containers.wait_for("c", lambda now: now.restarts and now.state is State.RUNNING, 40)
    assert now is not None, engine.containers.get("c")
    assert not engine.containers.records.restart_noted(now.id)
    check_journal(engine)


COUNT = ["sh", "-c", "echo run >> /runs; [ $(wc -l < /runs) -lt 3 ] && exit 7; exec sleep 1000"]


@pytest.mark.parametrize("restart", ["on-failure", "always"])
def test_one_that_ended_while_no_daemon_looked_starts_again_as_its_policy_says(
    restart: str, crash: Crash, tmp_path: Path
) -> None:
    supported("oci", tmp_path)
    script = "echo run >> /runs; [ $(wc -l < /runs) -lt 2 ] && sleep 0.7 && exit 7; exec sleep 1000"
    engine = crash("oci", ["sh", "-c", script], "", "start;running", pause=1.2, restart=restart)
    now = engine.containers.wait_for("c", lambda now: now.restarts == 1 and now.state is State.RUNNING, 40)
    assert now is not None, engine.containers.get("c")
    assert any(event["type"] == "restartScheduled" and event["exit_code"] == 7 for event in events(engine))
    check_journal(engine)


def test_one_that_waits_for_its_restart_goes_on_to_wait_after_kill_9(crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    engine = crash("oci", COUNT, "before restarts._fire", "arm;start;sleep 60", restart="on-failure:5")
    now = engine.containers.wait_for("c", lambda now: now.restarts == 2 and now.state is State.RUNNING, 40)
    assert now is not None, engine.containers.get("c")
    check_journal(engine)


@pytest.mark.parametrize(("restart", "up"), [("unless-stopped", False), ("on-failure", False), ("always", True)])
def test_one_that_a_person_stopped_stays_down_unless_its_policy_is_always(
    restart: str, up: bool, runtime: str, crash: Crash
) -> None:
    engine = crash(runtime, SLEEP[runtime], "", "start;running;stop 0;stopped", restart=restart)
    if up:
        reach(engine, "c", State.RUNNING)
    else:
        assert engine.containers.get("c").state is State.STOPPED
        assert engine.containers.restarts.due(engine.containers.get("c").id) is None


@pytest.mark.parametrize("point", ["before driver.delete", "after mounts.forget"])
def test_a_removal_cut_short_is_finished(runtime: str, point: str, crash: Crash) -> None:
    engine = crash(runtime, SLEEP[runtime], point, "start;running;keep;kill;stopped;arm;remove")
    eventually(lambda: engine.containers.names() == [])
    assert os.listdir(engine.store / "containers") == []
    assert not [name for name, _, _ in hostmounts.mounts() if name.startswith(str(engine.store))]
    assert events(engine)[-1]["type"] == "containerRemoved"


def test_a_creation_cut_short_leaves_no_directory(tmp_path: Path) -> None:
    store = tmp_path / "store"
    Engine(store, runtime="fake").close()
    orphan = store / "containers" / ("ab" * 32)
    (orphan / "upper").mkdir(parents=True)
    (store / "tmp" / "removed-x").mkdir()
    (store / "tmp" / "partial-0").write_bytes(b"kept for Range")
    with Engine(store, runtime="fake") as engine:
        assert os.listdir(store / "containers") == [] and engine.containers.names() == []
        assert os.listdir(store / "tmp") == ["partial-0"]


def processes_of(engine: Engine) -> list[str]:
    """What runs with the store in its command line, and is not this test."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if entry.name.isdigit() and int(entry.name) != os.getpid() and str(engine.store) in words:
            found.append(f"{entry.name} {words}")
    return found


WINDOWS = ["before sessions.create", "after process.Popen", "after sessions.create", "before sessions.start",
           "after os.write", "after sessions.start"]  # fmt: skip
SLOW = bool(os.environ.get("DUTCHMAN_SLOW_TESTS"))


@pytest.mark.parametrize("point", WINDOWS if SLOW else WINDOWS[1::2])
def test_a_session_cut_short_leaves_nothing_that_waits(point: str, crash: Crash, tmp_path: Path) -> None:
    supported("oci", tmp_path)
    no_session_leaks(crash("oci", SLEEP["oci"], point, "start;running;arm;exec"))


if SLOW:

    @pytest.mark.parametrize("late", [number * 0.01 for number in range(1, 31)])
    def test_a_session_cut_short_at_any_time_leaves_nothing_that_waits(
        late: float, crash: Crash, tmp_path: Path
    ) -> None:
        supported("oci", tmp_path)
        no_session_leaks(crash("oci", SLEEP["oci"], "", f"start;running;late {late};exec;sleep 60"))


def no_session_leaks(engine: Engine) -> None:
    """Every conmon is of something that is shown, and all end with their container."""
    assert engine.containers.get("c").state is State.RUNNING
    shown = [session for session in engine.containers.sessions.of("c") if session.state not in OVER]
    directory = engine.store / "containers" / engine.containers.get("c").id
    eventually(lambda: len(processes_of(engine)) <= 1 + len(shown))
    engine.containers.remove("c", force=True)
    eventually(lambda: not processes_of(engine) or None)
    assert not directory.exists() and not list((host.runtime_dir() / "oci" / "exits").glob(f"{directory.name}*"))
