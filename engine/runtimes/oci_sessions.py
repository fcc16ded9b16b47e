"""Sessions of the `oci` driver: `runc exec` under a conmon of its own.

Floor 2. What a session runs as is taken from the container's own config.json, as it really runs: user, capabilities,
environment, working directory, no_new_privs, limits; the spec of the session replaces what it names. conmon is told to
wait (--exec-attach, pipes of conmon's src/conmon.c): it makes its socket, says so, and executes the runtime when told
to; it holds both ends of those pipes, so that it waits on when the daemon dies. What a later daemon needs is in files,
as for containers (conmon.py):

    found later                  is
    exit file                    stopped, with its code
    pid file, process alive      running
    conmon alive, no pid file    created: it waits; running when `start` had been asked for
    nothing                      absent, or stopped with 255 when it had run

Threads: one per watched session, which waits for its conmon to end.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine import host
from engine.errors import Busy, DeadlineExceeded, NotFound, RuntimeFailure
from engine.runtimes import cgroups, conmon, pids, selinux, stdio
from engine.runtimes.base import Exit, State, Status
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.conmon import Facts, Files
from engine.runtimes.sessions import LOG_LIMIT, SessionSpec
from engine.runtimes.users import identify, with_extra_groups

log = logging.getLogger(__name__)

DEADLINE = 20.0  # seconds for conmon, and for the runtime to execute the process
LAST_WORDS = 5.0  # seconds for a killed process and its conmon to end
UNKNOWN = 255

Key = tuple[str, int]


class OciSessions:
    def __init__(
        self,
        state: Path,
        exits: Path,
        directory: Callable[[str], Path],
        tools: Callable[[], tuple[str, str, tuple[str, ...]]],
        cgroups_: Cgroups,
    ) -> None:
        """`directory(id)` is a container's; `tools()` gives the paths of runtime and conmon, and conmon's flags."""
        self._state, self._exits = state, exits
        self._directory = directory
        self._tools = tools
        self._cgroups = cgroups_
        self.before: Callable[[str], object] = lambda id: None  # called with the container's id; may refuse a session
        self._lock = threading.Lock()  # guards what follows and the files of ended sessions; never held over a wait
        self._waiting: dict[Key, tuple[int, int]] = {}  # created: pipe to start it, pipe that tells its pid
        self._over, self._ending = os.pipe()  # closing the latter says so

    # --- the protocol -------------------------------------------------------------------------------------------

    def create(self, spec: SessionSpec) -> None:
        self.before(spec.id)
        files = self._files(spec.id, spec.number)
        for directory in (files.bundle, files.run, files.kept_exit.parent, files.spare, files.log.parent):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            process = self._process(spec)
            stdio.note_terminal(files, spec.tty)
            (files.run / "process.json").write_text(json.dumps(process))  # in a directory of mode 0700
            self._launch(spec, files)
        except BaseException:
            self.delete(spec.id, spec.number)
            raise

    def start(self, id: str, number: int) -> int:
        files = self._files(id, number)
        with self._lock:
            pipes = self._waiting.pop((id, number), None)
        if pipes is None:
            raise Busy("the session has been started already")
        starting, telling = pipes
        try:
            with os.fdopen(telling, "rb", buffering=0) as sync:
                try:
                    _begun(files).touch()
                    os.write(starting, b"1")
                    line = conmon.read_line(sync, time.monotonic() + DEADLINE)
                except BrokenPipeError as error:
                    raise RuntimeFailure("its conmon was killed") from error
                except TimeoutError as error:
                    raise DeadlineExceeded(f"the runtime did not execute it within {DEADLINE:.0f} s") from error
                finally:
                    os.close(starting)
            pid = conmon.reported(line, files, None)
            facts = conmon.found(self._tools()[0], files, pid)
            facts.save(files.facts)
        except BaseException:
            self.delete(id, number)
            raise
        move = threading.Thread(target=cgroups.adopt_monitor, args=(self._cgroups, facts.conmon), daemon=True)
        move.start()
        return pid

    def status(self, id: str, number: int) -> Status:
        files = self._files(id, number)
        finished = conmon.exit_code(files)
        if finished is not None:
            return Status(State.STOPPED, None, finished[0], False, finished[1])
        facts = self._facts(files)
        if facts is None:
            waits = State.RUNNING if _begun(files).exists() else State.CREATED
            return Status(waits if _monitor(files) else State.ABSENT)
        if facts.boot == pids.boot_id():
            if pids.start_time(facts.pid) == facts.pid_start:
                return Status(State.RUNNING, facts.pid)
            if pids.start_time(facts.conmon) == facts.conmon_start:
                return Status(State.RUNNING, facts.pid)  # it has ended, and conmon is about to say how
        finished = conmon.exit_code(files)  # it may have come between the two looks
        code, when = finished if finished is not None else (UNKNOWN, None)
        return Status(State.STOPPED, None, code, False, when)

    def watch(self, id: str, number: int, on_exit: Callable[[Exit], None]) -> None:
        files = self._files(id, number)
        pidfd = _monitor_fd(files)
        threading.Thread(target=self._watch, args=(files, pidfd, on_exit), name=f"exec-{number}", daemon=True).start()

    def signal(self, id: str, number: int, signum: int) -> None:
        facts = self._facts(self._files(id, number))
        if facts is None:
            raise NotFound("the runtime has no such session")
        conmon.send_signal(facts.pid, facts.pid_start, signum, "session")

    def send(self, id: str, number: int, data: bytes) -> int:
        return stdio.send(self._files(id, number), data)

    def end_input(self, id: str, number: int) -> None:
        stdio.end_input(self._files(id, number))

    def resize(self, id: str, number: int, columns: int, rows: int) -> None:
        stdio.resize(self._files(id, number), columns, rows)

    def attach_path(self, id: str, number: int) -> Path | None:
        return stdio.attach_path(self._files(id, number))

    def delete(self, id: str, number: int) -> None:
        files = self._files(id, number)
        with self._lock:
            pipes = self._waiting.pop((id, number), ())
        monitor = _monitor_fd(files)
        try:
            facts = self._facts(files)
            process = pids.open_process(facts.pid, facts.pid_start) if facts is not None else None
            if process is not None:
                try:
                    pids.send(process, signal.SIGKILL)
                    if monitor is not None:
                        pids.ended(monitor, LAST_WORDS)  # it notes the last output
                except ProcessLookupError:
                    pass
                finally:
                    os.close(process)
            if monitor is None or not pids.ended(monitor, 0):
                conmon.kill_conmon(files)  # before its pipe is closed, which would have it execute the process
            if monitor is not None:
                pids.ended(monitor, LAST_WORDS)
        finally:
            for fd in (*pipes, *(() if monitor is None else (monitor,))):
                os.close(fd)
        with self._lock:  # not while its watcher writes down how it ended
            for place in (files.spare, files.run, files.bundle):
                host.remove_tree(place)

    def close(self) -> None:
        with self._lock:
            ending, self._ending = self._ending, -1
        if ending >= 0:
            os.close(ending)

    # --- pieces -------------------------------------------------------------------------------------------------

    def _files(self, id: str, number: int) -> Files:
        return Files(self._directory(id) / "exec" / str(number), id, self._exits, number)

    def _process(self, spec: SessionSpec) -> dict[str, object]:
        """The process of `runtime exec --process`: the container's own, with what the session replaces."""
        try:
            config = json.loads((self._directory(spec.id) / "bundle" / "config.json").read_bytes())
            process: dict[str, object] = dict(config["process"])
            rootfs = Path(config["root"]["path"])
            environment = [str(item) for item in config["process"].get("env", [])]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise RuntimeFailure("the container's own config.json is gone") from error
        process["args"] = list(spec.argv)
        process["terminal"] = spec.tty
        process.pop("consoleSize", None)
        if spec.tty and spec.size is not None:
            process["consoleSize"] = {"width": spec.size[0], "height": spec.size[1]}
        if spec.cwd:
            process["cwd"] = spec.cwd
        variables = dict(item.partition("=")[::2] for item in environment)
        if spec.user is not None:
            who = identify(rootfs, spec.user)
            groups = with_extra_groups(rootfs, who, spec.groups)
            process["user"] = {"uid": who.uid, "gid": who.gid, "additionalGids": groups}
            if spec.own_home:
                variables["HOME"] = who.home
        if spec.tty:
            variables.setdefault("TERM", "xterm")
        variables.update(item.partition("=")[::2] for item in spec.env)
        process["env"] = [f"{key}={value}" for key, value in variables.items()]
        return process

    def _launch(self, spec: SessionSpec, files: Files) -> None:
        runtime, monitor, flags = self._tools()
        arguments = ["--root", str(self._state)]
        argv = conmon.command(
            monitor, runtime, arguments, files, terminal=spec.tty, stdin=spec.stdin or spec.tty, flags=flags
        )
        argv += ["-e", "--exec-attach", "--exec-process-spec", str(files.run / "process.json")]
        argv += ["--log-global-size-max", str(LOG_LIMIT)]
        telling, told = os.pipe()
        ready, readying = os.pipe()
        started, starting = os.pipe()
        try:
            try:
                with (files.run / "conmon.log").open("ab") as words, selinux.lowered():
                    process = subprocess.Popen(
                        argv,
                        cwd=files.run,
                        env=conmon.surroundings(_OCI_SYNCPIPE=told, _OCI_ATTACHPIPE=readying, _OCI_STARTPIPE=started),
                        stdin=subprocess.DEVNULL,
                        stdout=words,
                        stderr=words,
                        # with the other ends: killing this daemon must neither have it go on nor make it stumble
                        pass_fds=[told, readying, started, telling, starting],
                        start_new_session=True,
                    )
            except OSError as error:
                raise RuntimeFailure(f"cannot start conmon: {error}") from error
            finally:
                for fd in (told, readying, started):
                    os.close(fd)
            until = time.monotonic() + DEADLINE
            with os.fdopen(ready, "rb", buffering=0) as pipe:
                try:
                    os.write(starting, b"1")  # it may fork; the second one has it execute the process
                    line = conmon.read_line(pipe, until)
                    process.wait(max(0.1, until - time.monotonic()))
                except BrokenPipeError:
                    line = b""
                except (TimeoutError, subprocess.TimeoutExpired) as error:
                    raise DeadlineExceeded(f"conmon was not ready within {DEADLINE:.0f} s") from error
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
            if not line:
                conmon.reported(b"", files, process.returncode)  # raises with conmon's own words
        except BaseException:
            os.close(telling)
            os.close(starting)
            raise
        with self._lock:
            self._waiting[spec.id, spec.number] = (starting, telling)

    def _facts(self, files: Files) -> Facts | None:
        """facts.json, or the same from the pid files when the daemon died before it wrote that."""
        facts = Facts.load(files.facts)
        if facts is not None:
            return facts
        monitor = _monitor(files)
        try:
            pid = int(files.pid.read_text())
        except (OSError, ValueError):
            return None
        started = pids.start_time(pid)
        if not monitor or started is None:
            return None
        return Facts("", monitor, pids.start_time(monitor) or 0, pid, started, pids.boot_id())

    def _watch(self, files: Files, monitor: int | None, on_exit: Callable[[Exit], None]) -> None:
        try:
            if monitor is not None:
                poll = select.poll()
                poll.register(monitor, select.POLLIN)
                poll.register(self._over, select.POLLIN)
                try:
                    if all(fd != monitor for fd, _ in poll.poll()):
                        return  # the driver is closed
                finally:
                    os.close(monitor)
            with self._lock:
                end = self._finish(files)
            on_exit(end)
        except Exception:
            log.exception("how session %s of container %s ended was not found out", files.session, files.id)

    def _finish(self, files: Files) -> Exit:
        """conmon has ended: what became of the process. Writes down what would be lost."""
        reason = ""
        if not files.run.exists():
            return Exit(UNKNOWN, False, time.time_ns(), "the runtime knows nothing of this session")
        if conmon.exit_code(files) is None:
            facts = Facts.load(files.facts)
            code, reason = UNKNOWN, "it ended while nobody looked, and nothing tells how"
            if facts is not None and facts.boot != pids.boot_id():
                reason = "the host was restarted"
            elif facts is not None:
                code, reason = 137, "its conmon was killed; the process was killed with it"
                process = pids.open_process(facts.pid, facts.pid_start)
                if process is not None:
                    pids.send(process, signal.SIGKILL)
                    os.close(process)
            conmon.note_exit(files, code, reason)
        try:
            reason = files.reason.read_text()[:500]
        except FileNotFoundError:
            pass
        code, when = conmon.exit_code(files) or (UNKNOWN, time.time_ns())
        return Exit(code, False, when, reason)


def _begun(files: Files) -> Path:
    """Is there once it has been told to start."""
    return files.run / "begun"


def _monitor(files: Files) -> int:
    """The pid of this session's conmon while it lives; 0 otherwise."""
    try:
        pid = int(files.conmon_pid.read_text())
    except (OSError, ValueError):
        return 0
    return pid if os.fsencode(files.bundle) in pids.words(pid) else 0


def _monitor_fd(files: Files) -> pids.Held | None:
    """A descriptor of it; None when it has ended."""
    pid = _monitor(files)
    started = pids.start_time(pid) if pid else None
    return None if started is None else pids.open_process(pid, started)
