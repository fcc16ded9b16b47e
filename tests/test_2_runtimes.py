"""The contract of runtime drivers, kept by `fake`, `oci` (runc under conmon; needs root on Linux) and `vm`.

A machine that is emulated takes seconds to boot, so by default `vm` is put to the tests of IN_A_VM alone; with
DUTCHMAN_SLOW_TESTS=1 to all of them.
"""

from __future__ import annotations

import queue
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import OWN, REAL, SLOW, Bench, bench_of

from engine.errors import Busy, DeadlineExceeded, InvalidArgument, NotFound, RuntimeFailure
from engine.logs import ContainerLogs
from engine.runtimes.base import Exit, State
from engine.runtimes.fake import FakeRuntime
from engine.runtimes.resources import Resources
from engine.runtimes.select import host_report, open_runtime
from engine.stats import resources

IN_A_VM = {
    "test_pause_and_resume",
    "test_oom_is_recorded",
    "test_logs_go_on_after_a_restart_of_the_container",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames:
        in_a_vm = SLOW or metafunc.function.__name__ in IN_A_VM
        metafunc.parametrize("bench", ["fake", *REAL, *OWN] if in_a_vm else ["fake", "oci"], indirect=True)


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of(request.param, tmp_path)
    yield bench
    bench.close()


# --- the contract ---------------------------------------------------------------------------------------------------


def test_probe_says_which_and_why(bench: Bench) -> None:
    probe = bench.runtime.probe()
    assert probe.ok and probe.reason and probe.version


def test_create_then_start_then_end(bench: Bench) -> None:
    run = bench.spec("exit 3")
    assert bench.runtime.status(run.id).state is State.ABSENT
    pid = bench.runtime.create(run)
    status = bench.runtime.status(run.id)
    assert (status.state, status.pid, status.exit_code) == (State.CREATED, pid, None)
    bench.watch(run.id)
    with pytest.raises(queue.Empty):
        bench.end(0.05)
    before = time.time_ns()
    bench.runtime.start(run.id)
    end = bench.end()
    assert (end.exit_code, end.oom, end.reason) == (3, False, "")
    assert before - 10**9 < end.finished_ns < time.time_ns() + 10**9
    status = bench.runtime.status(run.id)
    assert (status.state, status.pid, status.exit_code, status.finished_ns) == (State.STOPPED, None, 3, end.finished_ns)
    bench.runtime.delete(run.id)
    assert bench.runtime.status(run.id).state is State.ABSENT


def test_argv_is_not_executed_before_start(bench: Bench) -> None:
    run = bench.spec("hello")
    bench.runtime.create(run)
    time.sleep(0.1)
    assert bench.output(run.id) == b""
    bench.watch(run.id)
    bench.runtime.start(run.id)
    assert bench.end().exit_code == 0
    assert bench.output(run.id) == b"hello\n"


def test_streams_are_told_apart(bench: Bench) -> None:
    id = bench.run("warn")
    bench.end()
    assert (bench.output(id), bench.output(id, "stderr")) == (b"", b"careful\n")


def test_signals_end_it_with_128_and_their_number(bench: Bench) -> None:
    id = bench.run("trap")
    if bench.kind in REAL:  # until the shell has its trap: process 1 ignores a signal it has no handler for
        bench.until(lambda: bench.output(id) == b"ready\n")
    assert bench.runtime.status(id).state is State.RUNNING
    bench.runtime.signal(id, signal.SIGTERM)
    assert bench.end().exit_code == 143
    with pytest.raises(Busy):
        bench.runtime.signal(id, signal.SIGTERM)


def test_sigkill_works_where_sigterm_is_ignored(bench: Bench) -> None:
    id = bench.run("deaf")
    time.sleep(0.2)
    bench.runtime.signal(id, signal.SIGTERM)
    with pytest.raises(queue.Empty):
        bench.end(0.3)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    assert bench.runtime.status(id).exit_code == 137


def test_created_can_be_killed_and_deleted(bench: Bench) -> None:
    run = bench.spec("sleep")
    bench.runtime.create(run)
    bench.watch(run.id)
    bench.runtime.signal(run.id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    assert bench.runtime.status(run.id).state is State.STOPPED


def test_pause_and_resume(bench: Bench) -> None:
    id = bench.run("sleep")
    with pytest.raises(Busy):
        bench.runtime.resume(id)
    bench.runtime.pause(id)
    assert bench.runtime.status(id).state is State.PAUSED
    with pytest.raises(Busy):
        bench.runtime.pause(id)
    bench.runtime.resume(id)
    assert bench.runtime.status(id).state is State.RUNNING
    bench.runtime.pause(id)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137


def in_force(bench: Bench, id: str) -> tuple[int | None, float | None, int | None]:
    """Memory in bytes, CPUs and processes a container may use, from where its driver keeps them."""
    if isinstance(bench.runtime, FakeRuntime):
        limits = bench.runtime.limits(id)
        return limits.memory, limits.cpus, limits.pids
    if bench.kind == "vm":
        pytest.skip("what is in force is known to the guest alone: test_2_runtimes_vm.py")
    found = resources(id)
    quota = found.get("cpu_limit_percent")
    return found.get("memory_limit_bytes"), None if quota is None else quota / 100, found.get("pids_limit")


def test_limits_change_while_it_runs_and_while_it_is_paused(bench: Bench) -> None:
    id = bench.run("sleep", memory="64m", cpus=0.5)
    assert in_force(bench, id) == (64 << 20, 0.5, None)
    for memory in (256 << 20, 32 << 20):  # up and down: with swap accounted, each has its own order of writes
        bench.runtime.update(id, Resources(memory=memory, pids=50))
        assert in_force(bench, id) == (memory, None, 50)
    bench.runtime.pause(id)
    bench.runtime.update(id, Resources(memory=48 << 20, memory_swap=-1, cpus=1.5, cpu_shares=512, cpuset="0"))
    assert in_force(bench, id) == (48 << 20, 1.5, None)
    assert bench.runtime.status(id).state is State.PAUSED
    bench.runtime.resume(id)
    bench.runtime.update(id, Resources())
    assert in_force(bench, id) == (None, None, None)


def test_limits_that_cannot_be_change_nothing(bench: Bench) -> None:
    id = bench.run("sleep", memory="64m", cpus=0.5, pids=20)
    for wrong in (Resources(memory=1000, pids=5), Resources(cpuset="8000"), Resources(memory_swap=1 << 30)):
        with pytest.raises(InvalidArgument):
            bench.runtime.update(id, wrong)
    assert in_force(bench, id) == (64 << 20, 0.5, 20)
    with pytest.raises(NotFound):
        bench.runtime.update("unknown", Resources())
    run = bench.spec("true")
    bench.runtime.create(run)
    with pytest.raises(Busy):
        bench.runtime.update(run.id, Resources(memory=64 << 20))


def test_oom_is_recorded(bench: Bench) -> None:
    id = bench.run("oom", memory="16m")
    end = bench.end()
    assert (end.exit_code, end.oom) == (137, True) and "memory" in end.reason, end
    assert bench.runtime.status(id).oom


def test_no_such_executable(bench: Bench) -> None:
    run = bench.spec(("no-such-program",))
    with pytest.raises(RuntimeFailure, match=r"no-such-program.*executable file not found"):
        bench.runtime.create(run)
        bench.runtime.start(run.id)  # a guest looks for it when it is executed
    if bench.kind == "vm":
        bench.watch(run.id)
        bench.end()
        bench.runtime.delete(run.id)
    assert bench.runtime.status(run.id).state is State.ABSENT
    run = bench.spec("true", id=run.id)  # nothing is in the way of the next attempt
    bench.runtime.create(run)


def test_wrong_states_are_busy_and_unknown_ids_not_found(bench: Bench) -> None:
    id = bench.run("sleep")
    with pytest.raises(Busy):
        bench.runtime.start(id)
    with pytest.raises(Busy):
        bench.runtime.create(bench.spec("true", id=id))
    for call in (bench.runtime.start, bench.runtime.pause, bench.runtime.resume, bench.runtime.reopen_log):
        with pytest.raises(NotFound):
            call("unknown")
    with pytest.raises(NotFound):
        bench.runtime.signal("unknown", 15)
    assert bench.runtime.status("unknown").state is State.ABSENT


def test_watch_calls_once_also_when_it_has_ended_already(bench: Bench) -> None:
    id = bench.run("exit 3")
    assert bench.end().exit_code == 3
    bench.watch(id)
    assert bench.end().exit_code == 3
    with pytest.raises(queue.Empty):
        bench.end(0.2)
    bench.watch("unknown")
    end = bench.end()
    assert end.exit_code == 255 and end.reason


def test_a_later_watch_replaces_the_earlier(bench: Bench) -> None:
    id = bench.run("sleep")
    calls: list[int] = []
    bench.runtime.watch(id, lambda id, end: calls.append(1))
    bench.watch(id)
    bench.runtime.signal(id, signal.SIGKILL)
    assert bench.end().exit_code == 137
    time.sleep(0.1)
    assert calls == []


def test_a_callback_that_raises_does_not_end_the_watching(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fail(id: str, end: Exit) -> None:
        raise ValueError("a bug in the caller")

    first = bench.run("sleep")
    bench.runtime.watch(first, fail)
    bench.runtime.signal(first, signal.SIGKILL)
    bench.until(lambda: "a bug in the caller" in caplog.text)
    bench.run("exit 3")
    assert bench.end().exit_code == 3


def test_delete_kills_is_idempotent_and_calls_nobody(bench: Bench) -> None:
    id = bench.run("sleep")
    bench.runtime.delete(id)
    bench.runtime.delete(id)
    assert bench.runtime.status(id).state is State.ABSENT
    with pytest.raises(queue.Empty):
        bench.end(0.2)
    bench.runtime.delete("unknown")


def test_logs_go_on_after_a_restart_of_the_container(bench: Bench) -> None:
    id = bench.run("hello")
    bench.end()
    bench.run("hello", id=id)
    bench.end()
    bench.runtime.delete(id)
    assert bench.output(id) == b"hello\nhello\n"


def test_a_torn_record_does_not_harm_the_next_run(bench: Bench) -> None:
    run = bench.spec("hello")
    run.log.parent.mkdir(parents=True)
    run.log.write_bytes(b"2026-03-25T13:20:42.000000000+00:00 stdout F tor")
    bench.runtime.create(run)
    bench.watch(run.id)
    bench.runtime.start(run.id)
    bench.end()
    assert bench.output(run.id) == b"tor\nhello\n"


def test_rotation_while_it_writes_loses_no_line(bench: Bench) -> None:
    run = bench.spec("lines")
    bench.runtime.create(run)
    logs = ContainerLogs(run.log.parent)
    bench.watch(run.id)
    bench.runtime.start(run.id)
    rotations = 0
    while bench.runtime.status(run.id).state is not State.STOPPED:
        rotations += logs.maybe_rotate(5000, None, lambda: bench.runtime.reopen_log(run.id))
        time.sleep(0.002)
    bench.end()
    rotations += logs.maybe_rotate(1, None, lambda: bench.runtime.reopen_log(run.id))
    assert logs.caught_up("stdout", 40)
    assert logs.read("stdout", 0, 1 << 30) == b"".join(b"line %d\n" % n for n in range(2000))
    assert rotations >= 1
    logs.close()


def test_a_probe_gives_output_and_exit_code(bench: Bench) -> None:
    id = bench.run("sleep")
    hello = ("echo", "hello") if bench.kind == "fake" else ("/bin/sh", "-c", "echo hel; echo lo >&2")
    code, output = bench.runtime.probe_exec(id, hello, deadline=20)
    assert (code, output.replace(b"\n", b"")) in ((0, b"hello"), (0, b"lohel"))  # two pipes: which comes first is open
    assert bench.runtime.probe_exec(id, ("/bin/sh", "-c", "exit 3"), deadline=20)[0] == 3
    code, output = bench.runtime.probe_exec(id, ("/no/such/program",), deadline=20)
    assert code != 0 and b"/no/such/program" in output
    assert bench.runtime.status(id).state is State.RUNNING


def test_a_probe_ends_at_its_deadline(bench: Bench) -> None:
    id = bench.run("sleep")
    with pytest.raises(DeadlineExceeded):
        bench.runtime.probe_exec(id, ("sleep", "1000"), deadline=0.7)
    assert bench.runtime.status(id).state is State.RUNNING


def test_who_does_not_run_is_not_asked(bench: Bench) -> None:
    id = bench.run("sleep")
    bench.runtime.pause(id)
    with pytest.raises(Busy):
        bench.runtime.probe_exec(id, ("true",), deadline=20)
    bench.runtime.resume(id)
    bench.runtime.signal(id, signal.SIGKILL)
    bench.end()
    with pytest.raises((Busy, NotFound)):
        bench.runtime.probe_exec(id, ("true",), deadline=20)


def test_many_at_once(bench: Bench) -> None:
    ids = {bench.run("exit 3") for _ in range(6)}
    ended = {bench.ends.get(timeout=15)[0] for _ in ids}
    assert ended == ids


# --- fake -----------------------------------------------------------------------------------------------------------


def test_fake_sleeps_only_while_it_runs(tmp_path: Path) -> None:
    bench = Bench("fake", tmp_path)
    id = bench.run(("sleep", "0.2"))
    bench.runtime.pause(id)
    with pytest.raises(queue.Empty):
        bench.end(0.4)
    bench.runtime.signal(id, signal.SIGTERM)  # waits until it is resumed
    assert bench.runtime.status(id).state is State.PAUSED
    bench.runtime.resume(id)
    assert bench.end().exit_code == 143
    assert bench.run(("sleep", "0.05")) and bench.end().exit_code == 0
    with pytest.raises(InvalidArgument):
        bench.runtime.create(bench.spec(("exit", "x")))
    bench.close()


def test_choosing_a_driver(tmp_path: Path) -> None:
    assert open_runtime("fake", tmp_path).name == "fake"
    with pytest.raises(InvalidArgument, match="vm2"):
        open_runtime("vm2", tmp_path)
    if sys.platform.startswith("linux"):
        assert open_runtime("auto", tmp_path).name == open_runtime("oci", tmp_path).name == "oci"
    for name, ok, detail, hint in host_report():
        assert name and detail and (ok or hint)


def test_the_report_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        assert [row[1] for row in host_report()] == [False]
        return
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    monkeypatch.setattr("engine.runtimes.seccomp.PROFILES", ())
    rows = {name: (ok, detail, hint) for name, ok, detail, hint in host_report()}
    for name in ("runc", "crun", "conmon"):
        assert rows[name] == (False, "not installed", f"apt-get install {name}")
    assert not rows["runtime oci"][0] and "apt-get install" in rows["runtime oci"][2]
    assert not rows["seccomp profile"][0] and "apt-get install" in rows["seccomp profile"][2]
