"""Sessions of the `fake` driver: in memory, nothing is executed.

Floor 2. argv means what it means for fake's containers (true, false, exit N, echo, warn, sleep, trap), and `cat`: what
is sent to it comes out of it, until its input ends. A timer thread per sleeping session.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import Busy, InvalidArgument, NotFound, RuntimeFailure
from engine.logformat import log_line
from engine.runtimes.base import Exit, State, Status
from engine.runtimes.sessions import SessionSpec

WORDS = ("true", "false", "exit", "echo", "warn", "sleep", "trap", "cat")
IGNORED = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}  # their default action is nothing
FIRST_PID = 1 << 23


@dataclass(slots=True)
class _Session:
    spec: SessionSpec
    pid: int
    state: State = State.CREATED
    exit: Exit | None = None
    rest: bytes = b""  # an unfinished line of cat's
    callbacks: list[Callable[[Exit], None]] = field(default_factory=list)


class FakeSessions:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sessions: dict[tuple[str, int], _Session] = {}
        self._pid = FIRST_PID

    def create(self, spec: SessionSpec) -> None:
        with self._lock:
            self._pid += 1
            (spec.directory / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sessions[spec.id, spec.number] = _Session(spec, self._pid)

    def start(self, id: str, number: int) -> int:
        with self._lock:
            session = self._expect(id, number)
            if session.state is not State.CREATED:
                raise Busy("the session has been started already")
            word, *args = (Path(session.spec.argv[0]).name, *session.spec.argv[1:])
            try:
                if word not in WORDS:
                    raise RuntimeFailure(f'exec: "{session.spec.argv[0]}": executable file not found in $PATH')
                number_of = float(args[0]) if word in ("exit", "sleep", "trap") and args else 0.0
            except ValueError:
                self.delete(id, number)
                raise InvalidArgument(f"exec: {word} takes a number", at=args[0][:80]) from None
            except RuntimeFailure:
                self.delete(id, number)
                raise
            session.state = State.RUNNING
            if word in ("echo", "warn"):
                self._print(session, "stdout" if word == "echo" else "stderr", " ".join(args).encode())
            if word in ("sleep", "trap"):
                if number_of != float("inf"):
                    timer = threading.Timer(number_of, self._end, (session, 0))
                    timer.daemon = True
                    timer.start()
            elif word != "cat":
                self._end(session, int(number_of) & 255 if word == "exit" else int(word == "false"))
            elif not session.spec.stdin:
                self._end(session, 0)
            return session.pid

    def status(self, id: str, number: int) -> Status:
        with self._lock:
            session = self._sessions.get((id, number))
            if session is None:
                return Status(State.ABSENT)
            if session.exit is None:
                return Status(session.state, session.pid if session.state is State.RUNNING else None)
            return Status(State.STOPPED, None, session.exit.exit_code, False, session.exit.finished_ns)

    def watch(self, id: str, number: int, on_exit: Callable[[Exit], None]) -> None:
        with self._lock:
            session = self._sessions.get((id, number))
            end = Exit(255, False, time.time_ns(), "the runtime knows nothing of it") if session is None else None
            if session is not None:
                end = session.exit
                if end is None:
                    session.callbacks.append(on_exit)
        if end is not None:
            _tell([on_exit], end)

    def signal(self, id: str, number: int, signum: int) -> None:
        with self._lock:
            session = self._expect(id, number)
            if session.state is not State.RUNNING:
                raise Busy("the session's process has ended")
            trapped = session.spec.argv[0] == "trap" and signum in (signal.SIGTERM, signal.SIGINT)
            if signum not in IGNORED and not trapped:
                self._end(session, 128 + signum)

    def send(self, id: str, number: int, data: bytes) -> int:
        with self._lock:
            session = self._expect(id, number)
            if session.exit is not None or not session.spec.stdin:
                raise BrokenPipeError(errno.EPIPE, "its input has ended")
            if session.spec.argv[0] == "cat":
                *lines, session.rest = (session.rest + data).split(b"\n")
                for line in lines:
                    self._print(session, "stdout", line)
            return len(data)

    def end_input(self, id: str, number: int) -> None:
        with self._lock:
            session = self._expect(id, number)
            if session.exit is not None:
                raise BrokenPipeError(errno.EPIPE, "its input has ended")
            if session.spec.argv[0] == "cat":
                if session.rest:
                    self._print(session, "stdout", session.rest)
                self._end(session, 0)

    def resize(self, id: str, number: int, columns: int, rows: int) -> None:
        self._expect(id, number)

    def attach_path(self, id: str, number: int) -> Path | None:
        return None

    def delete(self, id: str, number: int) -> None:
        with self._lock:
            session = self._sessions.pop((id, number), None)
            if session is not None and session.exit is None:
                self._end(session, 137)

    def container_ended(self, id: str) -> None:
        """Sessions do not outlive their container."""
        with self._lock:
            for (container, _), session in list(self._sessions.items()):
                if container == id and session.exit is None:
                    self._end(session, 137)

    def close(self) -> None: ...

    # --- the lock is held in these --------------------------------------------------------------------------------

    def _expect(self, id: str, number: int) -> _Session:
        with self._lock:
            session = self._sessions.get((id, number))
        if session is None:
            raise NotFound("the runtime has no such session")
        return session

    def _print(self, session: _Session, stream: str, text: bytes) -> None:
        path = session.spec.directory / "logs" / "ctr.log"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, log_line(stream, text.decode(errors="surrogateescape")))
        finally:
            os.close(fd)

    def _end(self, session: _Session, code: int) -> None:
        with self._lock:
            if session.exit is not None:
                return
            session.state, session.exit = State.STOPPED, Exit(code, False, time.time_ns())
            callbacks, session.callbacks = session.callbacks, []
        _tell(callbacks, session.exit)


def _tell(callbacks: list[Callable[[Exit], None]], end: Exit) -> None:
    """On a thread of the driver: the caller may hold locks the callback takes."""
    for callback in callbacks:
        threading.Thread(target=callback, args=(end,), name="fake-exec", daemon=True).start()
