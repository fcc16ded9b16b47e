"""Many requests to the agent of a guest on their way at once, for who knows beforehand what to ask. Floor 2.

Only here: which requests nobody has taken the answer of. A round trip costs an emulated guest as much as eight requests
that come together. The agent's workers take them in order and may end in another: what depends on an answer is asked
once that has come. Not thread-safe. Errors: as of guestfiles.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from engine.errors import Busy, DeadlineExceeded, EngineError, Unreachable
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.guestfiles import DEADLINE, PIPELINES, GuestFiles
from engine.runtimes.vm.protocol import ProtocolError, Values, Words
from engine.runtimes.vm.streams import Pending

MOST = 48  # requests; each of the agent's workers has some waiting, and its socket room for all
LEAVE_SECONDS = 1.0  # for answers nobody wants any more


class Asked(NamedTuple):
    number: int
    pending: Pending


class Pipeline:
    def __init__(self, files: GuestFiles, client: AgentClient, root: str) -> None:
        self._files, self._client, self._root = files, client, root
        self._asked: dict[int, Asked] = {}

    def ask(self, verb: str, words: Words) -> Asked:
        pending = Pending(verb)
        with _failures():
            number = self._client.request(pending, {"root": self._root, **words}, time.monotonic() + DEADLINE)
        asked = self._asked[number] = Asked(number, pending)
        return asked

    def answer(self, asked: Asked, seconds: float = DEADLINE) -> Values:
        """Once for each; GuestError where the agent refused."""
        del self._asked[asked.number]
        with _failures():
            return self._client.answer(asked.number, asked.pending, time.monotonic() + seconds)

    def close(self) -> None:
        """What is under way is waited for, a moment: it may bring handles, which are given back."""
        until = time.monotonic() + LEAVE_SECONDS
        for asked in list(self._asked.values()):
            with suppress(OSError, EngineError):
                values = self.answer(asked, max(0.0, until - time.monotonic()))
                if values.get("handle") is not None:
                    self._files.done(values.number("handle"))


@contextmanager
def pipeline(files: GuestFiles, root: str) -> Iterator[Pipeline]:
    """While it lasts it counts as one call. DeadlineExceeded at once of a guest that is mute; Busy when there are so
    many that other calls would have to wait for who reads or writes slowly."""
    files.call("STAT", {"root": root, "path": b""})
    if not files.pipelines.acquire(blocking=False):
        raise Busy(f"{PIPELINES} archives of its files are under way", hint="each ends with who has it open")
    try:
        with files.slot(DEADLINE), files.awake():
            made = Pipeline(files, files.connected(), root)
            try:
                yield made
            finally:
                made.close()
    finally:
        files.pipelines.release()


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (DeadlineExceeded, Unreachable, ProtocolError):
        raise
    except EngineError as error:
        raise Unreachable(error.reason, hint=error.hint) from error
