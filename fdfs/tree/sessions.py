"""containers/<name>/exec/: further processes in a running container. Floor 5."""

from __future__ import annotations

import threading
from typing import Any

from engine.errors import InvalidArgument, NotFound
from engine.fields import argv_text
from engine.session import parse_request
from fdfs.ctl import Call, Verb, table
from fdfs.entry import STARTED_NS, Dir, File, Row
from fdfs.tree.errors import error_file
from fdfs.tree.text import line, stamp

WAIT_SECONDS = 0.9  # a blocked handler makes its caller unkillable: short
MAX_WAITING = 64  # reads of `wait` that wait at the same time: a quarter of the mount's threads

_waiting = threading.BoundedSemaphore(MAX_WAITING)


def exec_object(engine: Any, name: str) -> str:
    return f"{engine.containers.get(name).object}/exec"


def object_of(engine: Any, name: str, number: str) -> str:
    return f"{exec_object(engine, name)}/{number}"


def _session(engine: Any, name: str, number: str) -> Any:
    return engine.containers.sessions.get(name, int(number))


def _flag(call: Call, key: str) -> bool:
    value = call.options.get(key, "false")
    if value not in ("true", "false", "1", "0"):
        raise InvalidArgument(f"{key}: true or false expected", at=f"{key}={value}")
    return value in ("true", "1")


def run(engine: Any, name: str, call: Call) -> str:
    session = engine.containers.sessions.run(
        name,
        call.args,
        user=call.options.get("user"),
        workdir=call.options.get("workdir", ""),
        env=call.options["env"].split("\n") if "env" in call.options else (),
        tty=_flag(call, "tty"),
        stdin=_flag(call, "stdin"),
        wait=_flag(call, "attach"),
    )
    return f"exec/{session.number}"


def run_spec(engine: Any, name: str, call: Call) -> str:
    asked = parse_request(call.args[0])
    session = engine.containers.sessions.run(
        name,
        asked.argv,
        user=asked.user,
        workdir=asked.workdir,
        env=asked.env,
        tty=asked.tty,
        stdin=asked.stdin,
        size=asked.size,
        wait=asked.attach,
    )
    return f"exec/{session.number}"


def argv(engine: Any, name: str, number: str) -> str:
    return argv_text(_session(engine, name, number).argv)


def user(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).user)


def workdir(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).workdir)


def tty(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).tty)


def state(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).state)


def pid(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).pid)


def exit_code(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).exit_code)


def started_at(engine: Any, name: str, number: str) -> str:
    return stamp(_session(engine, name, number).started_ns)


def finished_at(engine: Any, name: str, number: str) -> str:
    return stamp(_session(engine, name, number).finished_ns)


def reason(engine: Any, name: str, number: str) -> str:
    return line(_session(engine, name, number).reason)


def attach(engine: Any, name: str, number: str) -> str:
    return line(engine.containers.sessions.attach_path(name, int(number)))


def wait(engine: Any, name: str, number: str) -> str:
    free = _waiting.acquire(blocking=False)
    try:
        session = engine.containers.sessions.wait(name, int(number), WAIT_SECONDS if free else 0)
    finally:
        if free:
            _waiting.release()
    return line(session.exit_code)


def _size(view: str) -> Any:
    def size(engine: Any, name: str, number: str) -> int:
        return int(engine.containers.sessions.logs(name, int(number)).size(view))

    return size


def _read(view: str) -> Any:
    def read(engine: Any, name: str, number: str, offset: int, size: int) -> bytes:
        return bytes(engine.containers.sessions.logs(name, int(number)).read(view, offset, size))

    return read


def _mtime(engine: Any, name: str, number: str) -> int:
    return int(engine.containers.sessions.logs(name, int(number)).mtime_ns()) or STARTED_NS


def _output(view: str, doc: str) -> File:
    return File(name=view, doc=doc, read=_read(view), size=_size(view), mtime=_mtime)


def feed(engine: Any, name: str, number: str, data: bytes) -> int:
    return int(engine.containers.sessions.send(name, int(number), data))


# --- verbs of a session -----------------------------------------------------------------------------------------

VALID = {"created": ["start"], "running": ["kill", "eof", "resize"], "stopped": ["remove"], "failed": ["remove"]}


def valid(engine: Any, name: str, number: str) -> list[str]:
    session = _session(engine, name, number)
    verbs = VALID[str(session.state)]
    lacking = [verb for verb, has in (("eof", session.stdin or session.tty), ("resize", session.tty)) if not has]
    return [verb for verb in verbs if verb not in lacking]


def start(engine: Any, name: str, number: str, call: Call) -> None:
    engine.containers.sessions.start(name, int(number))


def kill(engine: Any, name: str, number: str, call: Call) -> None:
    engine.containers.sessions.signal(name, int(number), call.arg(0) or "KILL")


def eof(engine: Any, name: str, number: str, call: Call) -> None:
    engine.containers.sessions.end_input(name, int(number))


def screen(call: Call) -> tuple[int, int]:
    """Columns and rows of a `resize`."""
    sizes = []
    for text in call.args:
        if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 1 << 16):
            raise InvalidArgument("resize: columns and rows between 1 and 65535 expected", at=text)
        sizes.append(int(text))
    return sizes[0], sizes[1]


def resize(engine: Any, name: str, number: str, call: Call) -> None:
    engine.containers.sessions.resize(name, int(number), *screen(call))


def remove(engine: Any, name: str, number: str, call: Call | None = None) -> None:
    engine.containers.sessions.remove(name, int(number))


# --- rows -------------------------------------------------------------------------------------------------------


def _names(engine: Any, name: str) -> list[str]:
    return [str(session.number) for session in engine.containers.sessions.of(name)]


def _find(engine: Any, name: str, number: str) -> Row | None:
    if not (number.isascii() and number.isdigit()) or number != str(int(number[:18])):
        return None
    try:
        _session(engine, name, number)
    except NotFound:
        return None
    return SESSION


SESSION = Dir(
    name="<n>",
    doc="one process; the 32 last that are over stay until the container is started again",
    rmdir=remove,
    object=object_of,
    rows=(
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            valid=valid,
            verbs=table(
                Verb(name="start", doc="execute what was created with attach=true", run=start),
                Verb(name="kill", args="[SIGNAL]", doc="a signal to its process; KILL if not given", run=kill),
                Verb(name="eof", doc="its input ends after what was written (on a terminal: ^D)", run=eof),
                Verb(name="resize", args="COLUMNS ROWS", doc="the size of its terminal", run=resize),
                Verb(name="remove", doc="forget it once it is over, as rmdir does", run=remove),
            ),
        ),
        error_file(object_of),
        File(name="argv", doc="what was executed, as config/command shows it", show=argv),
        File(name="user", doc="as asked for; empty: the container's", show=user),
        File(name="workdir", doc="as asked for; empty: the container's", show=workdir),
        File(name="tty", doc="1 when it has a terminal", show=tty),
        File(name="state", doc="created running stopped failed (it could not be executed)", show=state),
        File(name="pid", doc="its process on the host while it runs", show=pid),
        File(name="exit_code", doc="126: not executable, 127: not found; empty while it runs", show=exit_code),
        File(name="started_at", doc="when it was started", show=started_at),
        File(name="finished_at", doc="when it ended", show=finished_at),
        File(name="reason", doc="why it failed, or ended as it did; empty when ordinary", show=reason),
        _output("stdout", "what it printed; grows; ends at 64 MiB of log"),
        _output("stderr", "the same of its other stream"),
        _output("all.jsonl", "both with times: JSON Lines"),
        File(
            name="stdin",
            doc="what is written here it reads; `eof` ends it; ETIMEDOUT when it does not read for a second",
            feed=feed,
            object=object_of,
        ),
        File(name="attach", doc="a socket of this host with its input and output; for terminals", show=attach),
        File(name="wait", doc="its exit code once it is over; empty after a second, read again to go on", wait=wait),
    ),
)

EXEC = Dir(
    name="exec",
    doc="further processes in it while it runs",
    names=_names,
    find=_find,
    kinds=(SESSION,),
    rows=(
        File(
            name="ctl",
            doc="execute something; the reply names its directory",
            object=exec_object,
            verbs=table(
                Verb(
                    name="run",
                    args="[user=…] [workdir=…] [env=…]* [tty=…] [stdin=…] [attach=…] ARGV…",
                    doc="execute ARGV; env is KEY=VALUE; attach=true: only once exec/<n>/ctl is told to start",
                    run=run,
                ),
                Verb(
                    name="spec",
                    args="JSON",
                    doc='the same as a quoted JSON object, {"argv": […], "env": […], …}, for arguments with newlines',
                    run=run_spec,
                ),
            ),
        ),
        error_file(exec_object),
    ),
)
