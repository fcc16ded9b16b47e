"""`exec`: further processes in running containers, as numbered sessions. Floor 3.

Only here: what a session is to people, and its life: created (everything is ready, nothing executed yet), running, then
stopped with its exit code, or failed when it could not be executed (126 and 127 as Docker has them).

    containers/<id>/exec/<n>/   spec.json as asked for; end.json once it is over; the rest is the driver's

Numbers of a container only go up. Of the sessions that are over, the newest KEPT stay, until the container is started
again or removed. A daemon that finds a session with a spec and no end asks the driver what became of it. Thread-safe:
one lock guards the table of sessions; one per session is held around calls of the driver.
"""

from __future__ import annotations

import json
import logging
import shlex
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import host
from engine.console import turn
from engine.errors import Busy, EngineError, NoSpace, NotFound
from engine.events import Journal
from engine.execution import COULD_NOT_START, Execution, one_line, start_failure_code
from engine.failures import Failures
from engine.lifecycle import State
from engine.logs import ContainerLogs
from engine.logsopen import OpenLogs
from engine.records import Container, Records
from engine.runtimes import base
from engine.runtimes.base import Exit, parse_signal
from engine.runtimes.sessions import Sessions as Driver
from engine.runtimes.sessions import SessionSpec
from engine.session import OVER, Phase, Session, checked, load, plain, told
from engine.store.meta import Meta

log = logging.getLogger(__name__)

KEPT = 32  # sessions of a container that are over
MAX_RUNNING = 256  # of a container
ATTACH_PATIENCE = 30.0  # seconds a created session waits for its `start`


class Sessions:
    def __init__(
        self, store: Path, meta: Meta, journal: Journal, failures: Failures, records: Records, execution: Execution
    ) -> None:
        self._root = store / "containers"
        self._meta = meta
        self._journal = journal
        self._failures = failures
        self._records = records
        self._execution = execution
        self._changed = threading.Condition()  # guards what is below
        self._table: dict[str, dict[int, Session]] = {}
        self._logs = OpenLogs[tuple[str, int]]()  # by container and number
        self._locks: dict[tuple[str, int], threading.RLock] = {}
        self._timers: dict[tuple[str, int], threading.Timer] = {}  # of those that wait for their `start`
        self._closing = False
        execution.before_start = self.forget_ended

    # --- reading ------------------------------------------------------------------------------------------------

    def of(self, name: str) -> list[Session]:
        """A container's sessions, oldest first."""
        id = self._records.get(name).id
        with self._changed:
            return [session for _, session in sorted(self._table.get(id, {}).items())]

    def get(self, name: str, number: int) -> Session:
        return self._get(self._records.get(name).id, number)

    def _get(self, id: str, number: int) -> Session:
        with self._changed:
            session = self._table.get(id, {}).get(number)
        if session is None:
            raise NotFound(f"no session {number}", at=str(number))
        return session

    def wait(self, name: str, number: int, timeout: float) -> Session:
        """The session once it is over, or after `timeout` seconds as it is then."""
        id = self._records.get(name).id
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._over(id, number), timeout)
        return self._get(id, number)

    def _over(self, id: str, number: int) -> bool:
        session = self._table.get(id, {}).get(number)
        return session is None or session.state in OVER

    def logs(self, name: str, number: int) -> ContainerLogs:
        """What it printed: at most sessions.LOG_LIMIT bytes of log, from the start on."""
        session = self.get(name, number)
        key = session.container, number
        if (known := self._logs.known(key)) is not None:
            return known
        directory = self._directory(*key) / "logs"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._logs.open(key, directory)

    def attach_path(self, name: str, number: int) -> Path | None:
        """Where its input and output can be had at once; None when it is over or its driver has no such thing."""
        session = self.get(name, number)
        return None if session.state in OVER else self._driver(session).attach_path(session.container, number)

    # --- verbs --------------------------------------------------------------------------------------------------

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        user: str | None = None,
        workdir: str = "",
        env: Sequence[str] = (),
        tty: bool = False,
        stdin: bool = False,
        size: tuple[int, int] | None = None,
        wait: bool = False,
    ) -> Session:
        """A process in a running container. `wait`: it is only created, and executed by `start`.

        Busy when the container does not run. A process that cannot be executed is a failed session, and raises.
        """
        container = self._records.get(name)
        variables = checked(argv, workdir, env)
        self._permit(container)
        number = self._next(container.id)
        directory = self._directory(container.id, number)
        spec = SessionSpec(
            container.id,
            number,
            directory,
            tuple(argv),
            env=tuple(f"{key}={value}" for key, value in variables.items()),
            cwd=workdir,
            user=user,
            groups=container.config.group_add,
            own_home=user is not None and not self._has_home(container),
            tty=tty,
            stdin=stdin,
            size=size,
        )
        session = Session(container.id, number, spec.argv, user or "", workdir, tty, stdin)
        with self._lock(session):
            try:
                directory.parent.mkdir(mode=0o700, exist_ok=True)  # no parents: the container may be removed meanwhile
                directory.mkdir(mode=0o700)
            except FileNotFoundError as error:
                raise NotFound("the container has been removed", at=name) from error
            host.write_atomic(directory / "spec.json", json.dumps(plain(session)).encode(), 0o600)
            self._put(session)
            try:
                self._driver(session).create(spec)
                if not wait:
                    session = self._start(session)
            except BaseException as error:
                self._failed(session, error)
                raise
        if wait:
            timer = threading.Timer(ATTACH_PATIENCE, self._give_up, (session,))
            timer.daemon = True
            with self._changed:
                self._timers[container.id, number] = timer
            timer.start()
        return session

    def start(self, name: str, number: int) -> Session:
        """Execute a session that was only created."""
        session = self.get(name, number)
        with self._lock(session):
            session = self._get(session.container, number)
            if session.state is not Phase.CREATED:
                raise Busy(f"the session is {session.state}")
            try:
                return self._start(session)
            except BaseException as error:
                self._failed(session, error)
                raise

    def signal(self, name: str, number: int, signal: str = "KILL") -> None:
        signum = parse_signal(signal)
        session = self._alive(name, number)
        self._driver(session).signal(session.container, number, signum)

    def send(self, name: str, number: int, data: bytes) -> int:
        """Feed its input; see the driver's `send`."""
        session = self._alive(name, number)
        if not (session.stdin or session.tty):
            raise Busy("its input is not open", hint="run … stdin=true")
        with turn(self._lock(session)):
            return self._driver(session).send(session.container, number, data)

    def end_input(self, name: str, number: int) -> None:
        session = self._alive(name, number)
        if not (session.stdin or session.tty):
            raise Busy("its input is not open", hint="run … stdin=true")
        with turn(self._lock(session)):
            self._driver(session).end_input(session.container, number)

    def resize(self, name: str, number: int, columns: int, rows: int) -> None:
        session = self._alive(name, number)
        if not session.tty:
            raise Busy("it has no terminal", hint="run … tty=true")
        self._driver(session).resize(session.container, number, columns, rows)

    def remove(self, name: str, number: int) -> None:
        """Forget a session that is over. Busy while it runs."""
        session = self.get(name, number)
        if session.state not in OVER:
            raise Busy(f"the session is {session.state}", hint="kill it first")
        self._drop(session)

    # --- its life -----------------------------------------------------------------------------------------------

    def _start(self, session: Session) -> Session:
        """Its lock is held."""
        driver = self._driver(session)
        began = time.time_ns()
        pid = driver.start(session.container, session.number)
        session = self._put(replace(session, state=Phase.RUNNING, pid=pid, started_ns=began))
        self._tell("execStarted", session, {"argv": told(session.argv), "pid": pid})
        driver.watch(session.container, session.number, lambda end: self._ended(session, end))
        return session

    def _ended(self, session: Session, end: Exit) -> None:
        """On a thread of the driver."""
        with self._changed:
            now = self._table.get(session.container, {}).get(session.number)
            if now is None or now.state in OVER or self._closing:  # the next daemon asks the driver, and tells of it
                return
        over = replace(
            session,
            state=Phase.STOPPED,
            pid=None,
            exit_code=end.exit_code,
            finished_ns=end.finished_ns or time.time_ns(),
            reason=one_line(end.reason),
        )
        self._finish(over)

    def _failed(self, session: Session, error: BaseException) -> None:
        reason = error.reason if isinstance(error, EngineError) else str(error) or type(error).__name__
        code = start_failure_code(reason)
        over = replace(
            session,
            state=Phase.FAILED,
            pid=None,
            exit_code=126 if code == COULD_NOT_START else code,  # as `docker exec`: 125 and 128 are not its own
            finished_ns=time.time_ns(),
            reason=one_line(reason),
        )
        if isinstance(error, EngineError):
            self._failures.record(over.object, shlex.join(over.argv), error)
        self._finish(over)

    def _finish(self, over: Session) -> None:
        """Write down how it ended; a full disk is no reason to forget it while this daemon lives."""
        directory = self._directory(over.container, over.number)
        try:
            if directory.is_dir():
                host.write_atomic(directory / "end.json", json.dumps(plain(over)).encode(), 0o600)
        except OSError as error:
            log.warning("%s: its end was not noted: %s", over.object, error)
        try:
            self._driver(over).delete(over.container, over.number)
        except (EngineError, OSError) as error:
            log.warning("%s was not cleared: %s", over.object, error)
        self._put(over)  # from here on another thread may drop it
        data: dict[str, Any] = {"exit_code": over.exit_code}
        if over.reason:
            data["reason"] = over.reason
        self._tell("execEnded", over, data)
        self._drop_oldest(over.container)

    def _give_up(self, session: Session) -> None:
        """Nobody came to start a session that was created for somebody."""
        with self._lock(session):
            with self._changed:
                now = self._table.get(session.container, {}).get(session.number)
            if now is not None and now.state is Phase.CREATED and not self._closing:
                self._failed(now, Busy(f"it was not started within {ATTACH_PATIENCE:.0f} s"))

    # --- for reconcile.py and containers.py -----------------------------------------------------------------------

    def reconcile(self, container: Container) -> None:
        """Take up the sessions an earlier daemon left, running ones included."""
        root = self._root / container.id / "exec"
        for directory in sorted(root.iterdir() if root.is_dir() else ()):
            if not directory.name.isdigit():
                continue
            number = int(directory.name)
            session = load(directory / "end.json", container.id, number)
            if session is not None:
                self._put(session)
                continue
            session = load(directory / "spec.json", container.id, number)
            if session is None:
                host.remove_tree(directory)  # the daemon ended before anything was asked of the driver
                continue
            self._take_up(session, directory)
        self._drop_oldest(container.id)

    def _take_up(self, session: Session, directory: Path) -> None:
        driver = self._driver(session)
        found = driver.status(session.container, session.number)
        if found.state in (base.State.ABSENT, base.State.CREATED):
            self._put(session)
            self._failed(session, Busy("the daemon ended while it was starting; nothing of it had run"))
            return
        began = int((directory / "spec.json").stat().st_mtime_ns)
        session = self._put(replace(session, state=Phase.RUNNING, pid=found.pid, started_ns=began))
        driver.watch(session.container, session.number, lambda end: self._ended(session, end))

    def forget_ended(self, id: str) -> None:
        """Drop what is over: the container is started anew."""
        with self._changed:
            sessions = list(self._table.get(id, {}).values())
        for session in sessions:
            if session.state in OVER:
                self._drop(session)

    def forget(self, id: str) -> None:
        """The container is removed, and its directory with it."""
        with self._changed:
            sessions = list(self._table.pop(id, {}).values())
        for session in sessions:
            try:
                self._driver(session).delete(id, session.number)
            except (EngineError, OSError) as error:
                log.warning("%s was not cleared: %s", session.object, error)
            self._logs.drop((id, session.number))
            self._failures.clear(session.object)
        self._failures.clear(f"container/{id}/exec")
        with self._meta.tx() as db:
            db.execute("DELETE FROM meta WHERE key = ?", (f"exec/{id}",))

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._logs.close()

    # --- pieces -------------------------------------------------------------------------------------------------

    def _directory(self, id: str, number: int) -> Path:
        return self._root / id / "exec" / str(number)

    def _driver(self, session: Session) -> Driver:
        return self._execution.driver_of(self._records.by_id(session.container)).sessions

    def _lock(self, session: Session) -> threading.RLock:
        with self._changed:
            return self._locks.setdefault((session.container, session.number), threading.RLock())

    def _put(self, session: Session) -> Session:
        with self._changed:
            self._table.setdefault(session.container, {})[session.number] = session
            timer = (
                None if session.state is Phase.CREATED else self._timers.pop((session.container, session.number), None)
            )
            if timer is not None:
                timer.cancel()
            self._changed.notify_all()
        return session

    def _drop(self, session: Session) -> None:
        key = session.container, session.number
        with self._changed:
            if self._table.get(session.container, {}).pop(session.number, None) is None:
                return  # another thread does
            self._locks.pop(key, None)
        self._logs.drop(key)
        self._failures.clear(session.object)
        host.remove_tree(self._directory(*key))

    def _drop_oldest(self, id: str) -> None:
        with self._changed:
            over = [session for _, session in sorted(self._table.get(id, {}).items()) if session.state in OVER]
        for session in over[:-KEPT]:
            self._drop(session)

    def _alive(self, name: str, number: int) -> Session:
        session = self.get(name, number)
        if session.state is not Phase.RUNNING:
            raise Busy(f"the session is {session.state}")
        return session

    def _permit(self, container: Container) -> None:
        """The container may stop meanwhile: then the driver says so, or the session ends with it."""
        if container.state is not State.RUNNING:
            hint = f"wait until it is no longer {container.state}"
            if container.state in (State.CREATED, State.STOPPED, State.PAUSED):
                hint = "echo resume > ctl" if container.state is State.PAUSED else "echo start > ctl"
            raise Busy(f"the container is {container.state}", at="run", hint=hint)
        with self._changed:
            running = sum(session.state not in OVER for session in self._table.get(container.id, {}).values())
        if running >= MAX_RUNNING:
            raise Busy(f"the container has {running} sessions already", at="run")

    def _next(self, id: str) -> int:
        with self._meta.tx() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (f"exec/{id}",)).fetchone()
            number = int(row["value"]) + 1 if row else 1
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (f"exec/{id}", str(number)))
        return number

    def _has_home(self, container: Container) -> bool:
        """Whether HOME is set on purpose: then it is every user's."""
        return "HOME" in container.config.env or any(
            item.startswith("HOME=") for item in self._execution.image_env(container)
        )

    def _tell(self, kind: str, session: Session, data: dict[str, Any]) -> None:
        """One event, of the container. On a full disk it is lost: the session's own files say the same."""
        try:
            name = self._records.by_id(session.container).name
            data = {"name": name, "exec": session.number, **data}
            self._journal.append(kind, f"container/{session.container}", data)
        except sqlite3.ProgrammingError:
            if not self._closing:  # the catalog is closed
                raise
            log.info("%s: %s came too late to be told of", session.object, kind)
        except (NoSpace, sqlite3.OperationalError) as error:
            log.warning("%s: %s was not told of: %s", session.object, kind, error)
        except EngineError as error:
            log.info("%s: %s was not told of: %s", session.object, kind, error)
