"""Further processes in a running container: what a session is, what it reports, and the protocol of drivers.

Floor 2. Only here: what crosses the boundary between the engine and a driver for `exec`. `tests/test_2_sessions.py` is
the contract both drivers keep. Everything here is immutable and free of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.runtimes.base import Exit, Status

LOG_LIMIT = 64 << 20  # bytes of a session's log; what it prints beyond that goes to attached terminals only
INPUT_PATIENCE = 1.0  # seconds a write to a process that does not read waits


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """One more process in the container `id`. What is not said here is as the container's own process has it."""

    id: str
    number: int  # the driver knows the session by the two
    directory: Path  # containers/<id>/exec/<number>; the driver keeps bundle/, run/ and logs/ in it
    argv: tuple[str, ...]  # never empty
    env: tuple[str, ...] = ()  # KEY=VALUE, added to the container's
    cwd: str = ""
    user: str | None = None  # user[:group], names or numbers, looked up in the container
    groups: tuple[str, ...] = ()  # further groups of `user`, names or numbers, looked up in the container
    own_home: bool = False  # HOME of `user` instead of the container's
    tty: bool = False
    stdin: bool = False
    size: tuple[int, int] | None = None  # columns and rows of its terminal at first


class Console(Protocol):
    """The part of a driver that reaches a container's own process. NotFound or Busy when it does not run."""

    def send(self, id: str, data: bytes) -> int:
        """Feed its standard input, open with `stdin: true`; how many bytes were taken, after about a second at most.

        DeadlineExceeded when none were; BrokenPipeError when its input has ended.
        """
        ...

    def end_input(self, id: str) -> None:
        """Its standard input ends after what was sent (on a terminal: as if ^D were typed)."""
        ...

    def resize(self, id: str, columns: int, rows: int) -> None:
        """The size of its terminal."""
        ...

    def attach_path(self, id: str) -> Path | None:
        """A socket that carries its input and output (conmon's protocol); None where the driver has none."""
        ...


class Sessions(Protocol):
    """The part of a driver that runs sessions. Thread-safe; calls for one session are serialised by the caller.

    Errors: RuntimeFailure with the runtime's own words, NotFound for an unknown session, Busy for a wrong state.
    A session ends at the latest with its container.
    """

    def create(self, spec: SessionSpec) -> None:
        """Everything is ready, `attach_path` included; argv is not yet executed. Failing leaves nothing behind."""
        ...

    def start(self, id: str, number: int) -> int:
        """Execute argv; its host pid. RuntimeFailure when it cannot be executed; then the session is gone."""
        ...

    def status(self, id: str, number: int) -> Status:
        """What really runs. An unknown session is `absent`, never an error."""
        ...

    def watch(self, id: str, number: int, on_exit: Callable[[Exit], None]) -> None:
        """Call `on_exit` once, from a thread of the driver, when it has ended. Also after a restart of the daemon."""
        ...

    def signal(self, id: str, number: int, signum: int) -> None:
        """To the session's first process. Busy when it has ended."""
        ...

    def send(self, id: str, number: int, data: bytes) -> int:
        """Feed its standard input; how many bytes were taken, after about a second at most.

        DeadlineExceeded when none were; BrokenPipeError when the process or its input has ended.
        """
        ...

    def end_input(self, id: str, number: int) -> None:
        """Its standard input ends after what was sent (on a terminal: as if ^D were typed)."""
        ...

    def resize(self, id: str, number: int, columns: int, rows: int) -> None: ...

    def attach_path(self, id: str, number: int) -> Path | None:
        """A socket that carries its input and output (conmon's protocol); None where the driver has none."""
        ...

    def delete(self, id: str, number: int) -> None:
        """Idempotent: kill what is left and forget it. The log stays."""
        ...

    def close(self) -> None:
        """Stop watching. Sessions go on."""
        ...
