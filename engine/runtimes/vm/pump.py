"""Between a process in a guest and the descriptors its stand-in on the host was given by conmon. Floor 2.

Only here: bytes both ways with the guest's credits, the terminal conmon asks for, and signals handed on. One process
of the host per process in a guest; it ends as that one does.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import signal
import socket
import struct
import termios
import threading
import tty

from engine.errors import EngineError
from engine.runtimes import signals
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import STDERR
from engine.runtimes.vm.streams import Data, Exit, Stream

log = logging.getLogger(__name__)

# SIGKILL and SIGSTOP cannot be; SIGCHLD and SIGWINCH mean this process
_KEPT = "KILL STOP CHLD WINCH PIPE SEGV BUS FPE ILL"
HANDED_ON = signal.valid_signals() - {signal.Signals[f"SIG{name}"] for name in _KEPT.split()}


def give_terminal(console_socket: str, size: tuple[int, int] | None) -> int:
    """A new terminal whose master goes to conmon (runtime-spec's console socket): its other end, raw."""
    master, slave = os.openpty()
    try:
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # this process, a session's leader, is told of its changes of size
        if size is not None:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        with socket.socket(socket.AF_UNIX) as giving:
            giving.connect(console_socket)
            socket.send_fds(giving, [b"/dev/ptmx"], [master])
    finally:
        os.close(master)
    return slave


def block_signals() -> None:
    """Those that are handed on wait until `hand_on`; to be called before any thread is there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON | {signal.SIGWINCH})


def hand_on(link: AgentClient, id: str, terminal: int | None) -> None:
    """Every signal this process gets goes to the guest's process `id`; a change of the terminal's size as well."""

    def work() -> None:
        while True:
            number = signal.sigwait(HANDED_ON | {signal.SIGWINCH})
            try:
                if number != signal.SIGWINCH:
                    if known := signals.of_linux(number):
                        link.call("SIGNAL", {"id": id, "signal": known})
                elif terminal is not None:
                    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8)))
                    link.call("RESIZE", {"id": id, "rows": rows, "columns": columns})
            except (EngineError, OSError) as error:
                log.warning("signal %s was not handed on: %s", number, error)

    threading.Thread(target=work, name="signals", daemon=True).start()


def feed(stream: Stream, source: int) -> None:
    """What is read from `source` goes to the process's input, its end too. On a thread of its own."""

    def work() -> None:
        try:
            while True:
                try:
                    data = os.read(source, 64 << 10)
                except OSError:  # a terminal whose other end is gone
                    data = b""
                if not data:
                    stream.end_input(deadline=None)
                    return
                stream.write(data, deadline=None)
        except BrokenPipeError:
            return  # it has ended
        except EngineError as error:
            log.info("input: %s", error)

    threading.Thread(target=work, name="input", daemon=True).start()


def drain(stream: Stream, out: int, err: int) -> Exit | None:
    """Write what the process prints until it has ended: its end. None when the guest is gone."""
    while True:
        try:
            event = stream.next()
        except EngineError as error:
            log.info("output: %s", error)
            return None
        if event is None or isinstance(event, Exit):
            return event
        if not isinstance(event, Data):
            continue
        _write(err if event.flag == STDERR else out, event.data)


def _write(fd: int, data: bytes) -> None:
    """All of it. When conmon is gone, what is printed goes nowhere, as to a closed pipe."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # whoever shares the descriptor may have made it so
            select.select([], [fd], [])  # a terminal, perhaps: poll(2) of macOS knows none
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: of a terminal
                log.error("%d bytes of output are lost: %s", len(view), error)
            return
