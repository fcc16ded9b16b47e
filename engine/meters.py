"""What containers use, whoever counts it: cgroups of this host, or the agent of a virtual machine. Floor 3.

Only here: the latest answer of each machine's agent, and for how long it has given none. An agent is asked in the
background, on a bounded pool, with a deadline; who reads waits PATIENCE at most, so a mute machine costs nobody more.
The monitor asks each every two seconds (`watch`); one that has not answered for MUTE seconds, or does again, is told of
by `on_change`. Thread-safe; no lock is held while an agent is asked.

Errors of reading: DeadlineExceeded (ETIMEDOUT) of a mute machine, Unreachable where nobody is at its socket.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import DeadlineExceeded, EngineError, Gone, Unreachable
from engine.guests import Guests
from engine.lifecycle import ALIVE, State
from engine.processes import Process, guest_processes, processes
from engine.records import Container
from engine.runtimes.users import user_names
from engine.samples import EVERY
from engine.scheduler import Scheduler
from engine.stats import guest_resources, quick, resources

log = logging.getLogger(__name__)

PATIENCE = 1.0  # seconds a reader waits
DEADLINE = 5.0  # seconds an agent has
FRESH = 10.0  # seconds: an older answer is given to nobody
MUTE = 20.0  # seconds without an answer after which a machine counts as mute
WORKERS = 16
HINT = "it may hang, or its host may be overloaded: echo kill > ctl, then start"

Change = Callable[[str, str], None]  # id; for how long it has been mute, in words, or empty: it answers again


@dataclass(slots=True)
class Known:
    """Of one run of a machine. Guarded by the condition of Meters."""

    run: int | None  # started_ns
    since: float  # monotonic: the last answer, or when it was first asked
    asking: bool = False
    asked: float = 0.0
    turn: int = 0  # questions that are over
    values: dict[str, int] = field(default_factory=dict)
    error: EngineError | None = None  # of the last question
    mute: bool = False


class Meters:
    def __init__(self, root: Path, guests: Guests, merged: Callable[[str], Path]) -> None:
        """`root` has the containers' directories; `merged(id)` is a root file system, for the names of users."""
        self._root, self._guests, self._merged = root, guests, merged
        self._scheduler = Scheduler("meters", WORKERS)
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._known: dict[str, Known] = {}
        self.on_change: Change = lambda id, mute: None

    def close(self) -> None:
        self._scheduler.close()

    def forget(self, id: str) -> None:
        with self._condition:
            self._known.pop(id, None)

    # --- reading ------------------------------------------------------------------------------------------------

    def stats(self, container: Container) -> dict[str, int]:
        """What it uses now, within PATIENCE; empty when it does not run or its driver does not count."""
        if container.state not in ALIVE:
            return {}
        if container.runtime == "oci":
            return resources(container.id, container.pid)
        return self._of_guest(container) if container.runtime == "vm" else {}

    def latest(self, container: Container) -> dict[str, int]:
        """The same without waiting; empty where there is no fresh answer."""
        if container.runtime != "vm":
            return self.stats(container)
        with self._condition:
            known = self._known.get(container.id)
            return dict(known.values) if known is not None and time.monotonic() - known.since < FRESH else {}

    def quick(self, container: Container) -> tuple[float, int, int] | None:
        """For pictures: when (monotonic), CPU time used in µs, bytes of memory. None where that is not known."""
        if container.runtime == "oci":
            found = quick(container.id, container.pid)
            return None if found is None else (time.monotonic(), *found)
        with self._condition:
            known = self._known.get(container.id)
            if known is None or not {"cpu_usec", "memory_bytes"} <= known.values.keys():
                return None
            return known.since, known.values["cpu_usec"], known.values["memory_bytes"]

    def processes(self, container: Container) -> list[tuple[Process, str]]:
        """Those that run in it, each with its user's name in the container."""
        if container.state not in ALIVE or container.runtime not in ("oci", "vm"):
            return []
        if container.runtime == "oci":
            names = user_names(self._merged(container.id))
            found = processes(container.id, container.pid)
        else:
            names = user_names(self._root / container.id / "vm" / "names")  # as it started: the guest has the disk
            found = self._processes_of_guest(container)
        return [(process, names.get(process.uid, str(process.uid))) for process in found]

    def _of_guest(self, container: Container) -> dict[str, int]:
        if container.state is State.PAUSED:
            return self._last(container.id)  # nothing changes meanwhile
        self._ask(container)
        with self._condition:
            known = self._known[container.id]
            turn = known.turn
            self._condition.wait_for(lambda: known.turn > turn or not known.asking, PATIENCE)
            if known.values and time.monotonic() - known.since < FRESH:
                return dict(known.values)
            error = known.error
        if container.state is State.STOPPING:
            return {}
        raise error or DeadlineExceeded(f"its virtual machine did not answer within {PATIENCE:g} s", hint=HINT)

    def _last(self, id: str) -> dict[str, int]:
        with self._condition:
            known = self._known.get(id)
            return dict(known.values) if known is not None else {}

    def _processes_of_guest(self, container: Container) -> list[Process]:
        files = self._guests.files(container)
        if files is None:
            return []
        answer: Future[list[Process]] = Future()

        def work() -> None:
            try:
                answer.set_result(guest_processes(files.call("PS", {}, DEADLINE)))
            except BaseException as error:
                answer.set_exception(error)

        self._scheduler.after(f"top/{next(self._numbers)}", 0, work)
        try:
            return answer.result(PATIENCE)
        except TimeoutError:
            raise DeadlineExceeded(f"its virtual machine did not answer within {PATIENCE:g} s", hint=HINT) from None
        except OSError as error:
            raise Unreachable(f"the agent of its virtual machine: {error}") from error

    # --- asking -------------------------------------------------------------------------------------------------

    def watch(self, containers: list[Container]) -> None:
        """Ask those in virtual machines anew, each every two seconds. Waits for nothing; to be called every second."""
        now = time.monotonic()
        for container in containers:
            if container.runtime != "vm":
                continue
            if container.state is not State.RUNNING:
                with self._condition:
                    if (known := self._known.get(container.id)) is not None:
                        known.since = now  # paused, or stopping: it is not expected to answer
                continue
            with self._condition:
                known = self._known.get(container.id)
                if known is None or known.run != container.started_ns:  # at first it has other things to do
                    known = self._known[container.id] = Known(container.started_ns, now, asked=now)
                due = now - known.asked >= EVERY
            if due:
                self._ask(container)

    def _ask(self, container: Container) -> None:
        """Have a question under way."""
        now = time.monotonic()
        with self._condition:
            known = self._known.get(container.id)
            if known is None or known.run != container.started_ns:
                known = self._known[container.id] = Known(container.started_ns, now)
            if known.asking:
                return
            known.asking, known.asked = True, now
        self._scheduler.after(container.id, 0, lambda: self._question(container, known))

    def _question(self, container: Container, known: Known) -> None:
        values: dict[str, int] = {}
        error: EngineError | None = None
        try:
            if (files := self._guests.files(container)) is not None:
                values = guest_resources(files.call("STATS", {}, DEADLINE))
        except EngineError as failed:
            error = failed
        except OSError as failed:
            error = Unreachable(f"the agent of its virtual machine: {failed}")
        now = time.monotonic()
        with self._condition:
            known.asking, known.error = False, error
            known.turn += 1
            was = known.mute
            if values:
                known.values, known.since, known.mute = values, now, False
            elif error is not None and now - known.since >= MUTE:
                known.mute = True
            silent = now - known.since
            changed = known.mute != was and self._known.get(container.id) is known
            self._condition.notify_all()
        if not changed:
            return
        try:
            self.on_change(container.id, f"{silent:.0f} s" if known.mute else "")
        except Gone:
            log.debug("container %s is gone", container.id)
