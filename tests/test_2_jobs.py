"""Jobs: states, progress people can read, cancelling, and what a dead daemon leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import Busy, Damaged, InvalidArgument, NotFound
from engine.events import Journal, acting
from engine.jobs import MAX_RESUMES, MAX_WAITING, Job, Jobs, State, Task
from engine.store.meta import Meta


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    opened = Meta(tmp_path / "db.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def jobs(meta: Meta) -> Iterator[Jobs]:
    made = Jobs(meta, Journal(meta))
    yield made
    made.close()


def test_a_job_that_ends_well(meta: Meta, jobs: Jobs) -> None:
    def work(task: Task) -> str:
        task.log("went there")
        task.advance("sha256:abc", 5, 10, "downloading")
        task.advance("sha256:abc", 10, 10, "done")
        task.advance("sha256:def", 0, 30, "waiting")
        return "sha256:result"

    number = jobs.start("pull x", work)
    job = jobs.wait(number, 10)
    assert (job.state, job.verb, job.error) == (State.DONE, "pull x", "")
    assert job.progress == "sha256:result\nsha256:abc 10/10 done\nsha256:def 0/30 waiting\ntotal 10/40 25%\n"
    assert job.log == "went there\n"
    assert job.finished_ns is not None and job.finished_ns >= job.created_ns
    assert jobs.all() == [job]
    states = [event.data["to"] for event in Journal(meta).replay(0, 10) if event.object == f"job/{number}"]
    assert states == ["running", "done"]


def test_progress_is_seen_while_it_runs(jobs: Jobs) -> None:
    go, there = threading.Event(), threading.Event()

    def work(task: Task) -> None:
        task.progress("resolving")
        there.set()
        go.wait(10)

    number = jobs.start("pull x", work)
    assert there.wait(10)
    assert (jobs.get(number).state, jobs.get(number).progress) == (State.RUNNING, "resolving\n")
    assert jobs.wait(number, 0.05).state is State.RUNNING
    go.set()
    assert jobs.wait(number, 10).state is State.DONE


def test_a_failure_keeps_its_reason_and_is_told(meta: Meta) -> None:
    told: list[tuple[Job, str]] = []
    jobs = Jobs(meta, on_failure=lambda job, error: told.append((job, error.reason)))

    def work(task: Task) -> None:
        raise Damaged("the digest is wrong", at="sha256:abc", hint="pull again")

    job = jobs.wait(jobs.start("pull x", work), 10)
    assert (job.state, job.error) == (State.FAILED, "the digest is wrong: sha256:abc (pull again)")
    assert job.error in job.log
    assert [(entry.id, reason) for entry, reason in told] == [(job.id, "the digest is wrong")]

    def bug(task: Task) -> None:
        raise ZeroDivisionError("oops")

    job = jobs.wait(jobs.start("pull y", bug), 10)
    assert (job.state, job.error) == (State.FAILED, "ZeroDivisionError: oops")
    jobs.close()


def test_cancel(jobs: Jobs) -> None:
    def work(task: Task) -> None:
        while True:
            task.check()
            time.sleep(0.01)

    number = jobs.start("pull x", work)
    jobs.cancel(number)
    assert jobs.wait(number, 10).state is State.CANCELLED
    with pytest.raises(InvalidArgument, match="cancelled, not running"):
        jobs.cancel(number)
    with pytest.raises(NotFound):
        jobs.cancel(number + 1)


def test_only_so_many_run_and_a_waiting_one_can_be_cancelled(meta: Meta) -> None:
    jobs = Jobs(meta, workers=1)
    go = threading.Event()
    running: list[int] = []

    def work(task: Task) -> None:
        running.append(1)
        while not go.wait(0.01):
            task.check()
        running.pop()

    first, second, third = (jobs.start(f"pull {n}", work) for n in range(3))
    time.sleep(0.1)
    assert len(running) == 1
    jobs.cancel(third)
    assert jobs.wait(third, 10).state is State.CANCELLED
    go.set()
    assert [jobs.wait(number, 10).state for number in (first, second)] == [State.DONE, State.DONE]
    jobs.close()


def test_too_many_are_refused(meta: Meta) -> None:
    jobs = Jobs(meta, workers=1)
    go = threading.Event()

    def work(task: Task) -> None:
        go.wait(10)

    for number in range(MAX_WAITING):
        jobs.start(f"pull {number}", work)
    with pytest.raises(Busy, match="not finished"):
        jobs.start("one more", work)
    go.set()
    jobs.close(10)
    with pytest.raises(Busy, match="closing"):
        jobs.start("late", work)


def test_what_a_dead_daemon_left_running_is_failed(meta: Meta) -> None:
    with meta.tx() as tx:
        tx.execute("INSERT INTO jobs (verb, state, created_ns) VALUES ('pull x', 'running', 1)")
    journal = Journal(meta)
    (job,) = Jobs(meta, journal).all()
    assert job.state is State.FAILED and "daemon ended" in job.error and job.finished_ns
    assert journal.replay(0, 10)[-1].data["to"] == "failed"


def test_who_started_it_goes_on_into_its_events(meta: Meta) -> None:
    journal = Journal(meta)
    jobs = Jobs(meta, journal)
    with acting("uid=1000 pid=7"):
        number = jobs.start("pull x", lambda task: None)
    jobs.wait(number, 10)
    assert {event.who for event in journal.replay(0, 10)} == {"uid=1000 pid=7"}
    jobs.close()


def test_the_log_is_bounded(jobs: Jobs) -> None:
    def work(task: Task) -> None:
        for number in range(5000):
            task.log(f"{number} {'x' * 5000}")

    job = jobs.wait(jobs.start("pull x", work), 20)
    assert len(job.log.splitlines()) == 1000 and len(job.log) < 2_100_000


def test_a_pull_goes_on_in_the_next_daemon_under_its_number(meta: Meta) -> None:
    jobs = Jobs(meta)
    pull = jobs.start("pull x", lambda task: task.cancelled.wait(20) and task.check())
    load = jobs.start("load /x", lambda task: task.cancelled.wait(20) and task.check())
    gone = jobs.start("pull y", lambda task: task.cancelled.wait(20) and task.check())
    jobs.cancel(gone)
    assert jobs.wait(gone, 10).state is State.CANCELLED
    jobs.close(10)
    jobs = Jobs(meta, Journal(meta))
    assert jobs.get(load).state is State.CANCELLED
    assert jobs.resume(lambda verb: lambda task: f"again {verb}") == [pull]
    job = jobs.wait(pull, 10)
    assert (job.state, job.progress, job.error) == (State.DONE, "again pull x\n", "")
    assert jobs.resume(lambda verb: lambda task: None) == []
    jobs.close()


def test_a_job_that_ends_every_daemon_does_not_go_on_for_ever(meta: Meta) -> None:
    with meta.tx() as tx:
        tx.execute("INSERT INTO jobs (verb, state, created_ns) VALUES ('pull x', 'running', 1)")
    times = 0
    while Jobs(meta).resume(lambda verb: lambda task: task.cancelled.wait(60) and None):  # never closed: killed
        times += 1
    assert times == MAX_RESUMES
    (job,) = Jobs(meta).all()
    assert job.state is State.FAILED and "daemon ended" in job.error
