"""`dutchman exec attach`, and the terminal of `dutchman run -it`: processes in containers, with pipes and terminals.

Floor 7. Only here: how a session is asked for (`exec/ctl`), joined to this command's streams (its attach socket), and
how its exit code becomes this command's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import threading
import time

import click

from fdfs.cli_mount import Failure, Follower, Mount
from fdfs.cli_options import mount_option
from fdfs.cli_terminal import Detached, Hangup, Keys, Pump, connect, raw, window, write_all

POLL = 0.03  # seconds between looks where there is no socket
SETTLE = 10  # looks until what was printed before and after connecting is told apart
SEEN = 256 << 10  # bytes that suffice for it
HEAD = 32  # bytes of which all places are looked at


def _control(mount: Mount, directory: tuple[str, ...], line: str) -> None:
    """A command whose refusal does not matter: the process has just ended."""
    with contextlib.suppress(OSError), open(mount.path(*directory, "ctl"), "w") as ctl:
        ctl.write(line + "\n")


def _exit_code(mount: Mount, directory: tuple[str, ...], what: str) -> int:
    """Wait until it is over; its exit code."""
    while True:
        try:
            text = mount.read(*directory, "wait")
        except OSError:
            raise Failure(f"{what}: it is gone") from None
        if text:
            return int(text)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@mount_option
@click.option("-i", "--interactive", is_flag=True, help="Pass on this command's input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Print its number and return.")
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="An environment variable.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Whom to run as (default: as the container).")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.argument("name")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    mount: str | None,
    interactive: bool,
    tty: bool,
    detach: bool,
    env: tuple[str, ...],
    user: str | None,
    workdir: str | None,
    name: str,
    argv: tuple[str, ...],
) -> int:
    """Execute ARGV in the running container NAME.

    Its exit code becomes that of this command; 126: it cannot be executed, 127: there is no such program. With -t,
    ctrl-p ctrl-q detaches and leaves it running.
    """
    where = Mount.find(mount)
    container = ("containers", where.container(name))
    what = f"exec {name}"
    if tty and interactive and not detach and not os.isatty(0):
        raise Failure(f"{what}: the input is not a terminal", "hint: leave out -t")
    variables = [item if "=" in item else f"{item}={os.environ.get(item, '')}" for item in env]
    asked = {
        "argv": list(argv[1:] if argv[:1] == ("--",) else argv),
        "user": user,
        "workdir": workdir or "",
        "env": variables,
        "tty": tty,
        "stdin": interactive,
        "size": window(0) or window(1) if tty else None,
        "attach": not detach,
    }
    reply = where.command((*container, "exec"), "spec " + shlex.quote(json.dumps(asked)), what=what)
    session = (*container, *reply[0].split("/"))
    number = session[-1]
    if detach:
        click.echo(number)
        return 0
    client = connect(where.field(*session, "attach")) if where.field(*session, "attach") else None
    try:
        where.command(session, "start", what=what)
    except Failure as failure:
        code = where.field(*session, "exit_code")
        raise Failure(failure.reason, *failure.more, code=int(code) if code.isdigit() else 1) from None
    if client is None:
        return _followed(where, session, what)
    keys = Keys() if tty and interactive else None
    pump = Pump(
        client,
        keys=keys,
        on_resize=(lambda: _resize(where, session)) if tty else None,
        on_signal=None if keys else lambda signum: _control(where, session, f"kill {signum}"),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(client)
        if keys:
            stack.enter_context(raw(0))
        try:
            pump.run(0 if interactive else None)
        except Detached:
            return 0
        except BrokenPipeError:
            _control(where, session, "kill PIPE")  # as if the pipe were its own
            raise
        except Hangup as reason:
            raise Failure(f"{what}: {reason}; it goes on as exec/{number}", code=129) from None
    return _exit_code(where, session, what)


def _resize(mount: Mount, directory: tuple[str, ...]) -> None:
    size = window(0) or window(1)
    if size:
        _control(mount, directory, f"resize {size[0]} {size[1]}")


def _followed(mount: Mount, session: tuple[str, ...], what: str) -> int:
    """Where the driver has no socket: from its files, as anybody would."""
    followers = [(Follower(mount.path(*session, stream)), fd) for stream, fd in (("stdout", 1), ("stderr", 2))]
    while True:
        over = mount.field(*session, "exit_code")
        for follower, fd in followers:
            for chunk in follower.read():
                write_all(fd, chunk)
        if over:
            return _exit_code(mount, session, what)
        time.sleep(POLL)


# --- containers' own processes ------------------------------------------------------------------------------------


@click.command("attach")
@mount_option
@click.argument("name")
def attach_command(mount: str | None, name: str) -> int:
    """Join this terminal to the process of the running container NAME.

    What it prints from now on appears here, what is typed it reads if it was started with its input open (run -i). Its
    exit code becomes that of this command. On a terminal ctrl-p ctrl-q detaches; otherwise Ctrl-C goes to the process.
    """
    where = Mount.find(mount)
    where.container(name)
    if where.field("containers", name, "state") not in ("running", "paused"):
        raise Failure(f"attach: {name} does not run", f"hint: dutchman start {name}")
    return join(where, name, fresh=False)


def has_terminal(mount: Mount, name: str) -> bool:
    return mount.field("containers", name, "config", "tty") == "true"


def join(mount: Mount, name: str, *, fresh: bool) -> int:
    """This command's streams and the container's, until it has stopped or the detach keys are typed; its exit code.

    `fresh`: with everything it has printed since it was created.
    """
    if has_terminal(mount, name):
        return _terminal(mount, name, fresh=fresh)
    from fdfs.cli_logs import follow

    if mount.field("containers", name, "config", "stdin") == "true":
        threading.Thread(target=_feed, args=(mount, name), daemon=True).start()
    return follow(mount, name, fresh=fresh)


def _feed(mount: Mount, name: str) -> None:
    """Copy this command's input to the container's, and end it with ours."""
    container = ("containers", name)
    with contextlib.suppress(OSError):  # it ended: so does its input
        fd = os.open(mount.path(*container, "stdin"), os.O_WRONLY)
        while data := os.read(0, 64 << 10):
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(fd, view) :]
                except TimeoutError:
                    continue  # it does not read at the moment
        _control(mount, container, "eof")


def _terminal(mount: Mount, name: str, *, fresh: bool) -> int:
    container = ("containers", name)
    log = Follower(mount.path(*container, "logs", "stdout"))
    path = mount.field(*container, "attach")
    before = b"".join(log.read()) if fresh else b""
    client = connect(path) if path else None
    if client is None:  # it has ended already
        if fresh:
            write_all(1, b"".join((before, *log.read())))
        return _exit_code(mount, container, f"attach {name}")
    interactive = os.isatty(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(client)
        if interactive:
            stack.enter_context(raw(0))
        skip = 0
        if fresh:
            text, skip = _printed(client, log, before)
            write_all(1, text)
        _resize(mount, container)
        pump = Pump(
            client,
            keys=Keys() if interactive else None,
            on_resize=lambda: _resize(mount, container),
            on_signal=None if interactive else lambda signum: _control(mount, container, f"kill {signum}"),
            skip=skip,
        )
        try:
            pump.run(0 if interactive else None)
        except Detached:
            return 0
        except Hangup as reason:
            raise Failure(f"{name}: {reason}; it goes on", code=128 + signal.SIGHUP) from None
    return _exit_code(mount, container, f"attach {name}")


def _printed(client: socket.socket, log: Follower, before: bytes) -> tuple[bytes, int]:
    """What the container printed before and just after we connected: the log has both, the socket only the latter.

    `before` is what the log had before. Returned with it: how many of the next bytes of the socket are in it already.
    """
    logged, received = before, b""
    for _ in range(SETTLE):
        logged += b"".join(log.read())
        quiet = True
        while len(received) < SEEN and select.select([client], [], [], POLL)[0]:
            try:
                packet = client.recv(70000)
            except ConnectionError:
                packet = b""
            if not packet:  # it has ended: the log has it all
                return b"".join((logged, *log.read())), 0
            received += packet[1:]
            quiet = False
        if quiet or len(received) >= SEEN:
            break
    return merged(logged, received, len(before))


def merged(logged: bytes, received: bytes, least: int) -> tuple[bytes, int]:
    """All of a stream whose beginning is `logged`, and of which `received` is a part that begins at `least` or later
    and ends with all that has come; and how many bytes that are still to come are in it.

    It begins at the first place that fits; a stream that repeats itself fits at several, of which that is the nearest.
    """
    at, head = least, received[:HEAD]
    while True:
        both = min(len(received), len(logged) - at)
        if logged[at : at + both] == received[:both]:
            return logged + received[len(logged) - at :], len(logged) - at - both
        found = logged.find(head, at + 1)
        at = found if found >= 0 else max(at + 1, len(logged) - len(head) + 1)
