"""conmon's side of a container: how it is started, and the files it leaves. Verified against conmon 2.1.6.

Floor 2. conmon (one per container, in its own session) holds the container's stdio, writes the log in the CRI format,
waits for the process, writes the exit code (decimal) to `<persist-dir>/exit`, then to `<exit-dir>/<id>`, and ends. It
makes the fifo `ctl` in the bundle; the line `2 0 0` there makes it reopen its log by name. It writes `oom` into the
persist directory. It reports the pid of `create`, or the runtime's error, as one JSON line on the pipe $_OCI_SYNCPIPE.
Timestamps are in its local zone, so TZ=UTC. On a full disk it drops what it could not write and goes on.

`Files` is where everything is; the functions are stateless and thread-safe.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import signal
import stat
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import host
from engine.errors import Busy, DeadlineExceeded, NotFound, RuntimeFailure
from engine.runtimes import pids, selinux, signals

CREATE_DEADLINE = 30.0  # seconds for conmon and `create`
log = logging.getLogger(__name__)

# --full-attach: its sockets do not depend on how long the store's path is. --no-sync-log: an fsync of every segment
# would stop the container's output meanwhile, and guard only against a power cut. Left out where conmon is older.
FLAGS = ("--full-attach", "--no-sync-log")
MAX_MESSAGE = 64 << 10
REOPEN_LOG = b"2 0 0\n"  # conmon src/ctrl.c: REOPEN_LOGS_EVENT
END_INPUT = b"3 0 0\n"  # of monitor.py alone


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one container below its directory."""

    directory: Path
    id: str
    exits: Path  # a directory that is not on the store's disk: the exit code gets there even when that is full
    session: int = 0  # of a container's session: its number; `directory` is the session's then

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    @property
    def resources(self) -> Path:
        return self.bundle / "resources.json"  # the limits in force, as `runc update` takes them

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def log(self) -> Path:
        return self.directory / "logs" / "ctr.log"

    @property
    def pid(self) -> Path:
        return self.run / "pid"

    @property
    def conmon_pid(self) -> Path:
        return self.run / "conmon.pid"

    @property
    def exit(self) -> Path:
        return self.spare / "exit"

    @property
    def spare(self) -> Path:
        name = f"{self.id}.{self.session}" if self.session else self.id
        return self.exits / name  # conmon's persist directory; it writes there first

    @property
    def kept_exit(self) -> Path:
        return self.run / "exits" / self.id  # the same; survives a restart of the host

    @property
    def oom(self) -> Path:
        return self.spare / "oom"

    @property
    def facts(self) -> Path:
        return self.run / "facts.json"

    @property
    def reason(self) -> Path:
        return self.run / "reason"

    @property
    def ctl(self) -> Path:
        return self.bundle / "ctl"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a later daemon must know to find this run again. A pid counts only with its start time: pids are reused."""

    runtime: str  # path of runc or crun
    conmon: int
    conmon_start: int  # clock ticks since boot
    pid: int
    pid_start: int
    boot: str

    def save(self, path: Path) -> None:
        host.write_atomic(path, json.dumps(asdict(self)).encode(), 0o600)

    @staticmethod
    def load(path: Path) -> Facts | None:
        """None when absent or not written whole (then `create` never ended)."""
        try:
            data = json.loads(path.read_bytes()[:4096])
            return Facts(**{key: kind(data[key]) for key, kind in _FACTS.items()})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None


_FACTS: dict[str, Any] = {
    "runtime": str,
    "conmon": int,
    "conmon_start": int,
    "pid": int,
    "pid_start": int,
    "boot": str,
}


def send_signal(pid: int, started: int, signum: int, what: str) -> None:
    """Send exactly that process a signal, by Linux's number. Busy, saying `what` it is of, when it has ended."""
    process = pids.open_process(pid, started)
    if process is None:
        raise Busy(f"the {what}'s process has ended")
    try:
        pids.send(process, signals.of_host(signum))
    except ProcessLookupError as error:
        raise Busy(f"the {what}'s process has ended") from error
    finally:
        os.close(process)


def launch(
    conmon: str,
    runtime: str,
    runtime_args: list[str],
    files: Files,
    *,
    terminal: bool,
    stdin: bool = False,
    flags: Iterable[str] = FLAGS,
    deadline: float = CREATE_DEADLINE,
) -> Facts:
    """Start conmon, which runs `create`; returns when the container's process waits in `created`.

    RuntimeFailure carries the runtime's own message; DeadlineExceeded after `deadline` seconds. On failure conmon is
    gone; what the runtime left is the caller's to delete.
    """
    read_end, write_end = os.pipe()
    argv = command(conmon, runtime, runtime_args, files, terminal=terminal, stdin=stdin, flags=flags)
    environment = surroundings(_OCI_SYNCPIPE=write_end)
    until = time.monotonic() + deadline
    with os.fdopen(read_end, "rb", buffering=0) as sync:
        try:
            with (files.run / "conmon.log").open("ab") as words, selinux.lowered():
                process = subprocess.Popen(
                    argv,
                    cwd=files.run,  # conmon also writes `oom` where it stands
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    # with an end of its own to read from, conmon is not killed by its report when the daemon just was
                    pass_fds=[read_end, write_end],
                    start_new_session=True,
                )
        except OSError as error:
            raise RuntimeFailure(f"cannot start conmon: {error}") from error
        finally:
            os.close(write_end)
        try:
            line = read_line(sync, until)
            process.wait(max(0.1, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            kill_conmon(files)
            process.kill()
            process.wait()
            raise DeadlineExceeded(f"the runtime did not create the container within {deadline:.0f} s") from error
    return found(runtime, files, reported(line, files, process.returncode))


def command(
    conmon: str,
    runtime: str,
    runtime_args: list[str],
    files: Files,
    *,
    terminal: bool,
    stdin: bool,
    flags: Iterable[str] = FLAGS,
) -> list[str]:
    """conmon's command line, for a container or one of its sessions."""
    argv = [conmon, "--api-version", "1", "-c", files.id, "-u", files.id, "-n", files.id, "-r", runtime]
    argv += ["-b", str(files.bundle), "-p", str(files.pid), "-P", str(files.conmon_pid), *flags]
    argv += ["--exit-dir", str(files.kept_exit.parent), "--persist-dir", str(files.spare)]
    relative = os.path.relpath(files.log, files.run)  # conmon splits this option at colons, and stays where it is
    argv += ["-l", f"k8s-file:{relative}", "--log-level", "warning"]
    argv += [word for arg in runtime_args for word in ("--runtime-arg", arg)]
    if stdin:
        argv.append("-i")
    if terminal:
        argv += ["-t", "--leave-stdin-open"]  # else who detaches takes the terminal along
    return argv


def surroundings(**pipes: int) -> dict[str, str]:
    """conmon's environment: what it needs of ours, and the pipes it is given by number."""
    environment = {"PATH": os.environ.get("PATH") or os.defpath, "TZ": "UTC"}
    environment.update({name: str(number) for name, number in pipes.items()})
    if "XDG_RUNTIME_DIR" in os.environ:
        environment["XDG_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"]
    return environment


def reported(line: bytes, files: Files, status: int | None) -> int:
    """The pid in conmon's report. RuntimeFailure with the runtime's message, or when it is no report; conmon is gone
    then. `status` is how conmon ended, for want of better words."""
    try:
        report = json.loads(line) if line else {}
        pid = int(report.get("pid", report.get("data", -1)))
    except (ValueError, TypeError, AttributeError) as error:
        kill_conmon(files)
        raise RuntimeFailure(f"conmon reported {line[:200]!r} instead of a pid") from error
    if pid <= 0:
        message = str(report.get("message") or _tail(files.run / "conmon.log") or f"conmon exited {status}")
        kill_conmon(files)
        raise RuntimeFailure(clean(message))
    return pid


def found(runtime: str, files: Files, pid: int) -> Facts:
    """Facts of a run that conmon has reported."""
    conmon_pid = int(files.conmon_pid.read_text())
    # a start time of 0 stands for "already over": a process that waits for `start` can only have been killed
    return Facts(
        runtime=runtime,
        conmon=conmon_pid,
        conmon_start=pids.start_time(conmon_pid) or 0,
        pid=pid,
        pid_start=pids.start_time(pid) or 0,
        boot=pids.boot_id(),
    )


def read_line(pipe: Any, until: float) -> bytes:
    """A line conmon writes to a pipe; what there is of it when the pipe is closed. TimeoutError."""
    data = b""
    while b"\n" not in data and len(data) < MAX_MESSAGE:
        poll = select.poll()  # not select(2): its descriptors end at 1023
        poll.register(pipe, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError
        more = pipe.read(4096)
        if not more:
            break
        data += more
    return data.partition(b"\n")[0]


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            return file.read(2000).decode(errors="replace").strip()
    except OSError:
        return ""


def clean(message: str) -> str:
    """The runtime's words on one line: of runc's logfmt lines the last error's msg, without its own prefixes."""
    found = re.findall(r'level=(?:error|fatal) msg=("(?:[^"\\]|\\.)*"|\S+)', message)
    if found:
        try:
            message = str(json.loads(found[-1])) if found[-1].startswith('"') else found[-1]
        except ValueError:
            message = found[-1].strip('"')
    text = " ".join(message.split())
    for prefix in (
        "runc create failed: ",
        "runc start failed: ",
        "exec failed: ",
        "unable to start container process: ",
    ):
        text = text.removeprefix(prefix)
    return text[:2000]


def kill_conmon(files: Files) -> None:
    """Kill the conmon that conmon.pid names, if it really is this container's, and with it a `create` it waits for.

    Before it has written that file, as when the daemon was killed right after its start, it is looked for.
    """
    for _ in range(3):  # it may fork meanwhile
        found = _conmons(files)
        for pid in found:
            for kill in (os.killpg, os.kill):  # it leads its own group (not yet, right after its fork)
                try:
                    kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        if not found or files.conmon_pid.exists():
            return


def _conmons(files: Files) -> list[int]:
    if files.conmon_pid.exists():
        try:
            found = [int(files.conmon_pid.read_text())]
        except (OSError, ValueError):
            return []
    elif files.bundle.exists():
        found = pids.everybody()
    else:
        return []  # it never came to that
    return [pid for pid in found if _is_conmon_of(pid, files)]


def _is_conmon_of(pid: int, files: Files) -> bool:
    words = pids.words(pid)
    return files.id.encode() in words and os.fsencode(files.bundle) in words


def reopen_log(files: Files) -> None:
    """Ask conmon to reopen its log by name. Asynchronous: the new file appears when it has. NotFound without conmon."""
    control(files, REOPEN_LOG)


def control(files: Files, line: bytes) -> None:
    """Write a line to conmon's fifo. NotFound without conmon."""
    try:
        fd = os.open(files.ctl, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):  # nobody reads it: conmon has ended
            raise NotFound("it has no conmon: it is not running") from error
        raise
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise RuntimeFailure(f"{files.ctl} is not conmon's fifo")
        os.write(fd, line)
    except BrokenPipeError as error:  # it has just ended
        raise NotFound("it has no conmon: it is not running") from error
    finally:
        os.close(fd)


def exit_code(files: Files) -> tuple[int, int] | None:
    """(exit code, Unix time in ns) from the exit files; None while neither holds one."""
    for path in (files.kept_exit, files.exit):
        try:
            with path.open("rb") as file:
                return int(file.read(32)), os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, ValueError):  # absent, or empty for want of room
            continue
    return None


def note_exit(files: Files, code: int, reason: str) -> None:
    """Write what conmon could not: `code`, and why. A full disk is no reason to fail: the spare file is elsewhere."""
    for path, text in ((files.exit, str(code)), (files.reason, reason), (files.kept_exit, str(code))):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            host.write_atomic(path, text.encode())
        except OSError as error:
            log.warning("%s: not written: %s", path, error)
