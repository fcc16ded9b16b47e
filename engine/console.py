"""A container's own input and terminal, while it runs. Floor 3, thread-safe.

Only here: that writers to one input take turns. Not by the container's lock: a process that does not read its input
would keep that from `kill`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from engine.errors import Busy, DeadlineExceeded, NotFound
from engine.execution import Execution
from engine.lifecycle import ALIVE
from engine.records import Container, Records
from engine.runtimes.sessions import INPUT_PATIENCE
from engine.runtimes.sessions import Console as Driver


@contextmanager
def turn(lock: threading.RLock) -> Iterator[None]:
    """That of one of several writers; none waits longer than a write to a process that does not read."""
    if not lock.acquire(timeout=INPUT_PATIENCE):
        raise DeadlineExceeded("somebody else writes to its input", hint="try again when it has read that")
    try:
        yield
    finally:
        lock.release()


class Console:
    def __init__(self, records: Records, execution: Execution) -> None:
        self._records = records
        self._execution = execution
        self._turns = tuple(threading.RLock() for _ in range(64))  # by id; two containers may share one

    def send(self, name: str, data: bytes) -> int:
        """Feed the input of its process (`stdin: true`); how many bytes it took. See the driver's `send`."""
        container = self._with_input(name)
        with self._turn(container.id):
            return self._driver(container).send(container.id, data)

    def end_input(self, name: str) -> None:
        """Its input ends after what was sent (on a terminal: as if ^D were typed)."""
        container = self._with_input(name)
        with self._turn(container.id):
            self._driver(container).end_input(container.id)

    def resize(self, name: str, columns: int, rows: int) -> None:
        """Set the size of its terminal (`tty: true`)."""
        container = self._alive(name)
        if not container.config.tty:
            raise Busy("it has no terminal", at="tty", hint="echo true > config/tty, then start it again")
        self._driver(container).resize(container.id, columns, rows)

    def attach_path(self, name: str) -> Path | None:
        """A socket with its input and output; None while it does not run, or where its driver has none."""
        container = self._records.get(name)
        try:
            return self._driver(container).attach_path(container.id) if container.state in ALIVE else None
        except (Busy, NotFound):
            return None  # it has just ended

    def _turn(self, id: str) -> AbstractContextManager[None]:
        return turn(self._turns[hash(id) % len(self._turns)])

    def _driver(self, container: Container) -> Driver:
        return self._execution.driver_of(container).console

    def _alive(self, name: str) -> Container:
        container = self._records.get(name)
        if container.state not in ALIVE:
            raise Busy(f"the container is {container.state}")
        return container

    def _with_input(self, name: str) -> Container:
        container = self._alive(name)
        if not container.config.stdin:
            raise Busy("its input is not open", at="stdin", hint="echo true > config/stdin, then start it again")
        return container
