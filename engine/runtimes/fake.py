"""The `fake` driver: containers in memory, deterministic, on any host. It ships: for trying things out and for tests.

Floor 2. What argv means (nothing is executed):
    true | false            exit 0, exit 1
    exit N                  exit N
    echo WORD…              one line on stdout, exit 0        (`warn WORD…`: on stderr)
    sleep SECONDS|inf       exit 0 after that time
    lines N                 N numbered lines, exit 0
    oom                     as if killed by the kernel for memory: 137, oom
    trap SECONDS            as `sleep inf`, but SIGTERM and SIGINT are ignored
Anything else is an executable that is not there. Input (`stdin: true`) is taken and means nothing. SIGTERM, SIGINT,
SIGKILL … end it with 128 + signal. Output goes to the log in conmon's format. One timer thread while anything sleeps;
a restarted daemon finds nothing of it (`absent`).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import Busy, DeadlineExceeded, InvalidArgument, NotFound, RuntimeFailure
from engine.logformat import log_line
from engine.logs import mend
from engine.runtimes.base import Exit, Joined, Probe, RunSpec, State, Status
from engine.runtimes.fake_sessions import FakeSessions
from engine.runtimes.resources import Resources
from engine.upkeep import MAX_OUTPUT

log = logging.getLogger(__name__)

WORDS = ("true", "false", "exit", "echo", "warn", "sleep", "lines", "oom", "trap")
IGNORED = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}  # their default action is nothing
FIRST_PID = 1 << 22  # above any real pid, so that nobody kills a real process by mistake


@dataclass(slots=True)
class _Run:
    spec: RunSpec
    pid: int
    state: State = State.CREATED
    exit: Exit | None = None
    left: float | None = None  # seconds to sleep from `since` on; None: for ever
    since: float = 0.0
    pending: list[int] = field(default_factory=list)  # signals that wait until it is resumed
    callback: Callable[[str, Exit], None] | None = None
    file: int = -1
    resources: Resources = field(default_factory=Resources)
    input_ended: bool = False


class FakeRuntime(Joined):
    name = "fake"

    def __init__(self) -> None:
        self.sessions = FakeSessions()
        self._changed = threading.Condition()  # guards everything below
        self._runs: dict[str, _Run] = {}
        self._pids = itertools.count(FIRST_PID)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._due: list[tuple[str, Exit, Callable[[str, Exit], None]]] = []  # callbacks to call

    @property
    def console(self) -> FakeRuntime:
        return self

    def probe(self) -> Probe:
        return Probe(True, "in memory; nothing is really executed", "1")

    def create(self, spec: RunSpec) -> int:
        word = Path(spec.argv[0]).name
        if word not in WORDS:
            raise RuntimeFailure(f'exec: "{spec.argv[0]}": executable file not found in $PATH')
        if word in ("exit", "lines") and not (len(spec.argv) == 2 and spec.argv[1].isdecimal()):
            raise InvalidArgument(f"command: {word} takes one number", at=word)
        if word in ("sleep", "trap") and spec.argv[1:] and not re.fullmatch(r"inf|\d+(\.\d+)?", spec.argv[1]):
            raise InvalidArgument(f"command: {word} takes seconds or inf", at=spec.argv[1][:80])
        limits = Resources.of(spec.config)
        limits.check()
        with self._changed:
            old = self._runs.get(spec.id)
            if old is not None and old.state is not State.STOPPED:
                raise Busy(f"the container is {old.state}")
            if old is not None:
                self._drop(spec.id)
            spec.log.parent.mkdir(parents=True, exist_ok=True)
            run = _Run(spec, next(self._pids), resources=limits)
            mend(spec.log)
            run.file = _open_log(spec.log)
            self._runs[spec.id] = run
            return run.pid

    def start(self, id: str) -> None:
        with self._changed:
            run = self._expect(id, State.CREATED)
            run.state, run.since = State.RUNNING, time.monotonic()
            word, *args = (Path(run.spec.argv[0]).name, *run.spec.argv[1:])
            if word in ("echo", "warn"):
                os.write(run.file, log_line("stdout" if word == "echo" else "stderr", " ".join(args)))
            elif word == "lines":
                os.write(run.file, b"".join(log_line("stdout", f"line {n}") for n in range(int(args[0]))))
            if word == "sleep":
                run.left = None if args[:1] == ["inf"] else float(args[0]) if args else 0.0
            elif word == "trap":
                run.left = float(args[0]) if args and args[0] != "inf" else None
            elif word == "oom":
                self._end(run, 137, oom=True, reason="out of memory")
            else:
                self._end(run, int(args[0]) & 255 if word == "exit" else int(word == "false"))
            self._wake()

    def signal(self, id: str, signum: int) -> None:
        with self._changed:
            run = self._expect(id, State.CREATED, State.RUNNING, State.PAUSED)
            if run.state is State.PAUSED and signum != signal.SIGKILL:
                run.pending.append(signum)
            else:
                self._deliver(run, signum)
            self._wake()

    def pause(self, id: str) -> None:
        with self._changed:
            run = self._expect(id, State.RUNNING)
            run.state = State.PAUSED
            if run.left is not None:
                run.left -= time.monotonic() - run.since

    def resume(self, id: str) -> None:
        with self._changed:
            run = self._expect(id, State.PAUSED)
            run.state, run.since = State.RUNNING, time.monotonic()
            for signum in run.pending:
                self._deliver(run, signum)
            run.pending.clear()
            self._wake()

    def update(self, id: str, resources: Resources) -> None:
        resources.check()
        with self._changed:
            self._expect(id, State.RUNNING, State.PAUSED).resources = resources

    def limits(self, id: str) -> Resources:
        """Those in force."""
        with self._changed:
            return self._expect(id, *State).resources

    def status(self, id: str) -> Status:
        with self._changed:
            run = self._runs.get(id)
            if run is None:
                return Status(State.ABSENT)
            if run.exit is None:
                return Status(run.state, run.pid)
            return Status(run.state, None, run.exit.exit_code, run.exit.oom, run.exit.finished_ns)

    def watch(self, id: str, on_exit: Callable[[str, Exit], None]) -> None:
        with self._changed:
            if self._closed:
                raise Busy("the driver is closed")
            run = self._runs.get(id)
            if run is None:
                unknown = Exit(255, False, time.time_ns(), "the runtime knows nothing of this container")
                self._due.append((id, unknown, on_exit))
            elif run.exit is not None:
                self._due.append((id, run.exit, on_exit))
            else:
                run.callback = on_exit
            self._wake()

    def reopen_log(self, id: str) -> None:
        with self._changed:
            run = self._runs.get(id)
            if run is None or run.exit is not None:
                raise NotFound("the container has no log writer: it is not running")
            os.close(run.file)
            run.file = _open_log(run.spec.log)

    def send(self, id: str, data: bytes) -> int:
        with self._changed:
            run = self._expect(id, State.CREATED, State.RUNNING, State.PAUSED)
            if not run.spec.config.stdin or run.input_ended:
                raise BrokenPipeError(errno.EPIPE, "its input has ended")
            return len(data)

    def end_input(self, id: str) -> None:
        with self._changed:
            run = self._expect(id, State.CREATED, State.RUNNING, State.PAUSED)
            if run.input_ended:
                raise BrokenPipeError(errno.EPIPE, "its input has ended")
            run.input_ended = True

    def resize(self, id: str, columns: int, rows: int) -> None:
        with self._changed:
            self._expect(id, State.CREATED, State.RUNNING, State.PAUSED)

    def attach_path(self, id: str) -> Path | None:
        return None

    def delete(self, id: str) -> None:
        with self._changed:
            self._drop(id)

    def probe_exec(self, id: str, argv: Sequence[str], *, deadline: float) -> tuple[int, bytes]:
        """true, false, exit N, echo WORD…, and sleep SECONDS, which is the only one that takes time."""
        with self._changed:
            self._expect(id, State.RUNNING)
            if list(argv[:2]) == ["/bin/sh", "-c"]:
                argv = argv[2].split()
            word, *args = (Path(argv[0]).name, *argv[1:])
            if word == "sleep":
                wanted = float(args[0]) if args and args[0] != "inf" else deadline + 1
                until = time.monotonic() + min(wanted, deadline)
                while (left := until - time.monotonic()) > 0:
                    self._expect(id, State.RUNNING)
                    self._changed.wait(left)
                if wanted > deadline:
                    raise DeadlineExceeded(f"{word} took longer than {deadline:g} s")
                return 0, b""
        if word == "exit" and args and args[0].isdecimal():
            return int(args[0]) & 255, b""
        if word not in ("true", "false", "echo"):
            return 127, f'exec: "{argv[0]}": executable file not found in $PATH\n'.encode()
        return int(word == "false"), f"{' '.join(args)}\n".encode()[:MAX_OUTPUT] if word == "echo" else b""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- the lock is held in all of these -------------------------------------------------------------------------

    def _expect(self, id: str, *states: State) -> _Run:
        run = self._runs.get(id)
        if run is None:
            raise NotFound("the runtime has no such container")
        if run.state not in states:
            raise Busy(f"the container is {run.state}")
        return run

    def _drop(self, id: str) -> None:
        run = self._runs.pop(id, None)
        self._due = [item for item in self._due if item[0] != id]
        if run is not None and run.file >= 0:
            os.close(run.file)

    def _deliver(self, run: _Run, signum: int) -> None:
        trapped = Path(run.spec.argv[0]).name == "trap" and signum in (signal.SIGTERM, signal.SIGINT)
        if run.exit is None and signum not in IGNORED and not (trapped and run.state is not State.CREATED):
            self._end(run, 128 + signum)

    def _end(self, run: _Run, code: int, oom: bool = False, reason: str = "") -> None:
        run.state, run.exit = State.STOPPED, Exit(code, oom, time.time_ns(), reason)
        os.close(run.file)
        run.file = -1
        self.sessions.container_ended(run.spec.id)
        if run.callback is not None:
            self._due.append((run.spec.id, run.exit, run.callback))
            run.callback = None

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._timer, name="fake-runtime", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _timer(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    self._thread = None
                    return
                now, nearest = time.monotonic(), None
                for run in list(self._runs.values()):
                    if run.state is State.RUNNING and run.left is not None:
                        rest = run.since + run.left - now
                        if rest <= 0:
                            self._end(run, 0)
                        else:
                            nearest = rest if nearest is None else min(rest, nearest)
                due, self._due = self._due, []
                if not due:
                    self._changed.wait(nearest)
                    continue
            for id, result, callback in due:
                try:
                    callback(id, result)
                except Exception:
                    log.exception("reporting the end of container %s failed", id)


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
