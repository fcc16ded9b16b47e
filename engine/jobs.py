"""Long-running work: one thread per job, a row in `jobs`, progress and log in memory.

Only here: the life of a job (running -> done, failed or cancelled). At most `workers` run at a time, others wait their
turn in state running with the progress `waiting`. Progress is flat text people can read, one line per thing in the
making and a `total` line; it is kept in memory while the job runs and written to the row when it ends. A job the
daemon did not live to finish is found on the next start and becomes failed, or goes on (`resume`) under its number.

Threading: every method from any thread; readers (`all`, `get`) never wait for a job's work. Floor 2.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from engine.errors import Busy, EngineError, InvalidArgument, NotFound
from engine.store.meta import Meta

log = logging.getLogger(__name__)

WORKERS = 4  # jobs at work at a time
MAX_WAITING = 64  # jobs not finished; more are refused with Busy
LOG_LINES = 1000  # kept of a job's log
LOG_LINE = 2000  # characters of one line
KEPT = 1000  # finished jobs whose rows are kept
KEPT_LOGS = 100  # finished jobs whose logs are kept
LASTING = frozenset({"pull"})  # verbs whose jobs go on in the next daemon
MAX_RESUMES = 3  # times a job goes on: it may be what ends the daemon
MAX_RESUMED = 16  # jobs that go on at one start
RESUMED = "resumed "  # stands in the row's progress while such a job runs, before how often
DEAD = "the daemon ended before the job did; start it again (finished parts are kept)"


class State(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Cancelled(Exception):
    """Raised by `Task.check` in a cancelled job; the job ends as cancelled, which is no failure."""


class Events(Protocol):
    """What jobs need of the journal (engine/events.py)."""

    def append(self, type: str, object: str, data: dict[str, Any], *, who: str = "") -> int: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was when asked for. Times are ns since the epoch; `finished_ns` is None while it runs."""

    id: int
    verb: str
    state: State
    progress: str  # lines, each with its newline
    error: str  # the reason, one line with its newline-free text; '' unless failed
    log: str
    created_ns: int
    finished_ns: int | None


@dataclass(slots=True)
class _Line:
    done: int = 0
    total: int = 0
    note: str = ""


@dataclass
class Task:
    """What a job's work holds in its hands. All methods from any thread of the work."""

    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._text = ""
        self._lines: dict[str, _Line] = {}
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._on_cancel: list[Callable[[], None]] = []

    def progress(self, text: str) -> None:
        """Say what is going on, above the lines of `advance`."""
        with self._lock:
            self._text = text.rstrip("\n")

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        """Set the line of `label`: bytes done of bytes in total (0: not known), and a word such as downloading."""
        with self._lock:
            line = self._lines.get(label)
            if line is None:
                line = self._lines[label] = _Line()
            line.done, line.total = done, total
            line.note = note or line.note

    def log(self, text: str) -> None:
        """Add a line to the job's log (the last 1000 are kept)."""
        with self._lock:
            self._log.append(text.replace("\n", " ")[:LOG_LINE])

    def check(self) -> None:
        """Raises Cancelled once somebody has cancelled the job."""
        if self.cancelled.is_set():
            raise Cancelled

    def on_cancel(self, call: Callable[[], None]) -> None:
        """Run `call` when the job is cancelled (at once when it already is), from the thread that cancels."""
        with self._lock:
            self._on_cancel.append(call)
            late = self.cancelled.is_set()
        if late:
            call()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            calls = list(self._on_cancel)
        for call in calls:
            call()

    def render(self) -> str:
        """The progress file: text, `label done/total note` lines, `total done/total percent%`."""
        with self._lock:
            lines = [self._text] if self._text else []
            done = total = 0
            for label, line in self._lines.items():
                lines.append(f"{label} {line.done}/{line.total or '?'} {line.note}".rstrip())
                done += line.done
                total += max(line.total, line.done)
            if self._lines:
                lines.append(f"total {done}/{total} {100 * done // total if total else 100}%")
        return "".join(line + "\n" for line in lines)

    def log_text(self) -> str:
        with self._lock:
            return "".join(line + "\n" for line in self._log)


class Jobs:
    """All jobs of a store. `on_failure` is told of each failed job and its error (for the `error` files)."""

    def __init__(
        self,
        meta: Meta,
        journal: Events | None = None,
        *,
        workers: int = WORKERS,
        on_failure: Callable[[Job, EngineError], None] | None = None,
    ) -> None:
        self._meta = meta
        self._journal = journal
        self._on_failure = on_failure
        self._turns = threading.Semaphore(workers)
        self._changed = threading.Condition()
        self._running: dict[int, Task] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._logs: dict[int, str] = {}
        self._left: set[int] = set()  # lasting jobs interrupted by `close`
        self._dead: list[tuple[int, str, int]] = []  # number, verb, how often it went on, of what `resume` may take up
        self._closed = False
        self._bury()

    def _bury(self) -> None:
        """Jobs of a daemon that died are failed; old ones are forgotten."""
        with self._meta.tx() as tx:
            rows = tx.execute("SELECT id, verb, progress FROM jobs WHERE state = 'running' ORDER BY id").fetchall()
            dead = [int(row["id"]) for row in rows]
            self._dead = [
                (int(row["id"]), row["verb"], int(times) if times.isdigit() else 0)
                for row in rows
                for times in [row["progress"].removeprefix(RESUMED)]
            ]
            tx.execute(
                "UPDATE jobs SET state = 'failed', error = ?, finished_ns = ? WHERE state = 'running'",
                (DEAD, time.time_ns()),
            )
            for number in dead:
                self._event(number, State.FAILED, DEAD)
            tx.execute("DELETE FROM jobs WHERE id <= (SELECT max(id) FROM jobs) - ?", (KEPT,))

    def resume(self, find: Callable[[str], Callable[[Task], str | None] | None]) -> list[int]:
        """Let jobs go on that the last daemon did not finish: those for whose verb `find` gives work. Their numbers."""
        dead, self._dead = self._dead, []
        out: list[int] = []
        for number, verb, times in dead:
            work = find(verb) if times < MAX_RESUMES and len(out) < MAX_RESUMED else None
            if work is None:
                continue
            with self._changed:
                with self._meta.tx() as tx:
                    tx.execute(
                        "UPDATE jobs SET state = 'running', error = '', finished_ns = NULL, progress = ? WHERE id = ?",
                        (f"{RESUMED}{times + 1}", number),
                    )
                    self._event(number, State.RUNNING, before="failed")
                thread = self._launch(number, verb, work)
            thread.start()
            out.append(number)
        return out

    def _event(self, number: int, state: State, reason: str = "", before: str = "") -> None:
        if self._journal is not None:
            data = {"from": before if state is State.RUNNING else "running", "to": str(state)}
            if reason:
                data["reason"] = reason
            self._journal.append("stateChanged", f"job/{number}", data)

    def start(self, verb: str, work: Callable[[Task], str | None]) -> int:
        """Begin `work` in a thread of its own; returns the job's number at once. Busy when too many wait.

        `verb` is the command line as written. What `work` returns becomes the last word of the progress. An
        EngineError fails the job with its reason; any other exception is a bug, logged, and fails it too.
        """
        with self._changed:
            if self._closed:
                raise Busy("the engine is closing")
            if len(self._running) >= MAX_WAITING:
                raise Busy(f"{len(self._running)} jobs are not finished", hint="wait for some, or cancel them")
            with self._meta.tx() as tx:
                row = tx.execute("INSERT INTO jobs (verb, state, created_ns) VALUES (?, 'running', ?)",
                                 (verb, time.time_ns()))  # fmt: skip
                number = int(row.lastrowid or 0)
                self._event(number, State.RUNNING)
            thread = self._launch(number, verb, work)
        thread.start()
        return number

    def _launch(self, number: int, verb: str, work: Callable[[Task], str | None]) -> threading.Thread:
        """The thread of a job, not started yet; the lock is held."""
        task = self._running[number] = Task()
        task.progress("waiting")
        context = contextvars.copy_context()  # who started it goes on into its events
        thread = threading.Thread(
            target=context.run, args=(self._work, number, verb, task, work), name=f"job-{number}", daemon=True
        )
        self._threads[number] = thread
        return thread

    def _work(self, number: int, verb: str, task: Task, work: Callable[[Task], str | None]) -> None:
        state, reason, failure = State.DONE, "", None
        try:
            while not self._turns.acquire(timeout=0.2):
                task.check()
            try:
                task.check()
                task.progress("")
                result = work(task)
                if result:
                    task.progress(result)
            finally:
                self._turns.release()
        except Cancelled:
            state = State.CANCELLED
        except EngineError as error:
            state, failure = (State.CANCELLED, None) if task.cancelled.is_set() else (State.FAILED, error)
            reason = "" if failure is None else one_line(error)
        except BaseException as error:
            log.exception("job %d failed by a bug or the system", number)
            state, failure = State.FAILED, EngineError(f"{type(error).__name__}: {error}")
            reason = failure.reason
        lasting = state is State.CANCELLED and number in self._left and verb.split(" ")[0] in LASTING
        self._finish(number, task, State.RUNNING if lasting else state, reason, failure)

    def _finish(self, number: int, task: Task, state: State, reason: str, failure: EngineError | None) -> None:
        if reason:
            task.log(reason)
        try:
            if state is State.RUNNING:
                return  # the row stays as it is: the next daemon finds it
            with self._meta.tx() as tx:
                tx.execute(
                    "UPDATE jobs SET state = ?, progress = ?, error = ?, finished_ns = ? WHERE id = ?",
                    (str(state), task.render(), reason, time.time_ns(), number),
                )
                self._event(number, state, reason)
            if failure is not None and self._on_failure is not None:
                self._on_failure(self.get(number), failure)
        except Exception:
            if not self._closed:
                log.exception("job %d: its end could not be recorded", number)
        finally:
            with self._changed:
                self._logs[number] = task.log_text()
                while len(self._logs) > KEPT_LOGS:
                    del self._logs[next(iter(self._logs))]
                del self._running[number]
                del self._threads[number]
                self._changed.notify_all()

    def _job(self, row: Any) -> Job:
        number = int(row["id"])
        state, progress, text = State(row["state"]), row["progress"], self._logs.get(number, "")
        task = self._running.get(number)
        if state is State.RUNNING and task is not None:
            progress, text = task.render(), task.log_text()
        if not text and row["error"]:
            text = row["error"] + "\n"
        return Job(number, row["verb"], state, progress, row["error"], text, row["created_ns"], row["finished_ns"])

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        return [self._job(row) for row in self._meta.query("SELECT * FROM jobs ORDER BY id")]

    def get(self, number: int) -> Job:
        """NotFound."""
        row = self._meta.row("SELECT * FROM jobs WHERE id = ?", (number,))
        if row is None:
            raise NotFound("no such job", at=str(number))
        return self._job(row)

    def cancel(self, number: int) -> None:
        """Ask a running job to end; it does so at its next check. NotFound; InvalidArgument when it has ended."""
        job = self.get(number)
        with self._changed:
            task = self._running.get(number)
        if task is None:
            raise InvalidArgument(f"the job is {job.state}, not running", at="cancel")
        task.cancel()

    def wait(self, number: int, timeout: float | None = None) -> Job:
        """The job once it has ended, or as it is after `timeout` seconds. NotFound."""
        with self._changed:
            self._changed.wait_for(lambda: number not in self._running, timeout)
        return self.get(number)

    def close(self, timeout: float = 1.0) -> None:
        """End what runs and wait a moment for it: pulls are interrupted, the rest cancelled.

        What does not end in time is failed on the next start.
        """
        with self._changed:
            self._closed = True
            tasks = list(self._running.values())
            self._left = {number for number, task in self._running.items() if not task.cancelled.is_set()}
        for task in tasks:
            task.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout)


def one_line(error: EngineError) -> str:
    """Reason, what it is about, and the hint, in one line."""
    at = f": {error.at}" if error.at and error.at not in error.reason else ""
    hint = f" ({error.hint})" if error.hint else ""
    return " ".join(f"{error.reason}{at}{hint}".split())


def remove_each(task: Task, names: Iterable[str], remove: Callable[[str], object], kind: str) -> str:
    """The work of a prune: remove what has these names. What is gone already counts as nothing, what is in use since or
    cannot be removed stays, and the log says why."""
    done = failed = 0
    for name in names:
        task.check()
        try:
            remove(name)
            done += 1
            task.log(f"removed {name}")
        except NotFound:
            pass
        except (EngineError, OSError) as error:
            failed += 1
            task.log(f"{name} stays: {error}")
    return f"{done} {kind} removed" + (f", {failed} stay: see the job's log" if failed else "")
