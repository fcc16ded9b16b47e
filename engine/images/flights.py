"""Questions to slow places: asked once, answered from memory, waited for a moment only. Floor 2.

Only here: how a caller that must not wait (a lookup in the mount) asks a registry. The question goes to a thread; the
caller waits up to PATIENCE for it and is then told DeadlineExceeded, while the thread goes on, so that the next caller
finds the answer. A place that let somebody wait in vain is not waited for again until it answers. Answers and
refusals are kept for a while; an answer that is too old is still given while a newer one is fetched.

Threading: all methods from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from engine.errors import Busy, DeadlineExceeded, EngineError, NotFound

log = logging.getLogger(__name__)

PATIENCE = 0.9  # seconds a caller waits for a place that has not yet failed to answer
HURRY = 0.02  # … and for one that has
SILENT = 15.0  # seconds a place is taken to be silent after somebody waited in vain
AT_ONCE = 4  # questions to one place at a time
MAX_FLIGHTS = 64  # questions under way altogether
KEPT = 2048  # answers
REFUSED = 5.0  # seconds an error is remembered


@dataclass(slots=True)
class _Answer:
    value: Any
    error: EngineError | None
    until: float


@dataclass(slots=True)
class _Flight:
    done: threading.Event = field(default_factory=threading.Event)
    value: Any = None
    error: EngineError | None = None


class Flights:
    """`ask` is all there is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[Hashable, _Answer] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}
        self._places: dict[str, threading.BoundedSemaphore] = {}
        self._silent: dict[str, float] = {}
        self._closed = False

    def known(self, key: Hashable) -> Any:
        """The last answer, of whatever age; None when there is none."""
        answer = self._answers.get(key)
        return answer.value if answer is not None else None

    def ask(self, place: str, key: Hashable, work: Callable[[], Any], seconds: float) -> Any:
        """What `work` returns, now or up to `seconds` ago. Raises what it raises, and DeadlineExceeded."""
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None:
                self._answers.move_to_end(key)
                if answer.until > time.monotonic():
                    return self._given(answer)
            flight = self._flights.get(key)
            if flight is None:
                flight = self._begin(place, key, work, seconds)
        if answer is not None and answer.error is None:
            return answer.value
        silent = self._silent.get(place, 0.0) > time.monotonic()
        if not flight.done.wait(HURRY if silent else PATIENCE):
            self._silent[place] = time.monotonic() + SILENT
            raise DeadlineExceeded(f"{place} has not answered yet", at=place, hint="try again in a while")
        if flight.error is not None:
            raise flight.error
        return flight.value

    @staticmethod
    def _given(answer: _Answer) -> Any:
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _begin(self, place: str, key: Hashable, work: Callable[[], Any], seconds: float) -> _Flight:
        if self._closed:
            raise Busy("the engine is closing")
        if len(self._flights) >= MAX_FLIGHTS:
            raise DeadlineExceeded("too many questions to registries are open", at=place, hint="try again in a while")
        flight = self._flights[key] = _Flight()
        turns = self._places.setdefault(place, threading.BoundedSemaphore(AT_ONCE))

        def fly() -> None:
            lasts = seconds
            try:
                with turns:
                    flight.value = work()
                self._silent.pop(place, None)
            except EngineError as error:
                flight.error, lasts = error, REFUSED
                if isinstance(error, NotFound):
                    self._silent.pop(place, None)
            except BaseException as error:
                if not self._closed:
                    log.exception("asking %s failed", place)
                flight.error, lasts = EngineError(f"{type(error).__name__}: {error}"), REFUSED
            with self._lock:
                old = self._answers.get(key)
                kept = old.value if flight.error is not None and old is not None and old.error is None else None
                answer = _Answer(flight.value, flight.error, time.monotonic() + lasts)
                if kept is not None and not isinstance(flight.error, NotFound):
                    answer = _Answer(kept, None, time.monotonic() + lasts)  # out of reach: what was known still stands
                self._answers[key] = answer
                while len(self._answers) > KEPT:
                    self._answers.popitem(last=False)
                self._flights.pop(key, None)
            flight.done.set()

        threading.Thread(target=fly, name=f"ask-{place[:20]}", daemon=True).start()
        return flight

    def close(self) -> None:
        self._closed = True
