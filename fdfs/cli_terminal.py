"""The person's terminal and pipes, joined to a process in a container by conmon's attach socket.

Floor 7. Only here: raw mode (undone whatever happens), window size, detach keys, and the pump. Input goes as it is, at
most PACKET bytes at once; output has the stream's number in front (engine/attachline.py). One thread; it never blocks
in a send, so that neither side can wait for the other for ever. It waits with select(2), for poll(2) of macOS knows no
terminals.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

PACKET = 32 << 10  # bytes of input conmon takes at once
DETACH = b"\x10\x11"  # ctrl-p ctrl-q, as Docker has it
STDERR = 3


class Detached(Exception):
    """The detach keys were typed: the process goes on."""


class Hangup(Exception):
    """The terminal is gone, or somebody wants this command to end."""


def connect(path: str) -> socket.socket | None:
    """A connection to the attach socket at `path`, however long that is; None when nobody listens (any more)."""
    from engine import attachline  # not before it is needed: most commands are not

    try:
        return attachline.connect(Path(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def window(fd: int) -> tuple[int, int] | None:
    """Columns and rows; None where there is no terminal, or one that does not know."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return (size.columns, size.lines) if size.columns and size.lines else None


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Every key goes to the process. The terminal is as it was afterwards, however this ends."""
    saved = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)


class Keys:
    """Finds the detach keys in what is typed."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What to pass on. Raises Detached."""
        data = self._held + data
        self._held = b""
        if DETACH in data:
            raise Detached
        if data.endswith(DETACH[:1]):
            data, self._held = data[:-1], data[-1:]
        return data


class Pump:
    """Copies between this command's streams and a connection until the process has ended."""

    def __init__(
        self,
        client: socket.socket,
        *,
        keys: Keys | None = None,
        on_resize: Callable[[], None] | None = None,
        on_signal: Callable[[int], None] | None = None,
        skip: int = 0,
    ) -> None:
        """`keys`: input comes from a terminal. `on_signal` gets SIGINT, SIGTERM …; without it they end this command.
        `skip`: so many bytes of output have been shown already."""
        self._client, self._skip = client, skip
        self._keys = keys
        self._on_resize, self._on_signal = on_resize, on_signal
        self._pending = memoryview(b"")
        self._input_open = True
        self._signals: list[int] = []

    def run(self, source: int | None) -> None:
        """Until the connection is closed by the other side. `source` is where input comes from; None: there is none.

        Raises Detached, Hangup, and BrokenPipeError when nobody reads the output.
        """
        wake, poke = os.pipe()
        for end in (wake, poke):
            os.set_blocking(end, False)
        caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH]
        previous = {number: signal.signal(number, self._note) for number in caught}
        old = signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
        self._input_open = source is not None
        try:
            while self._turn(source, wake):
                pass
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(wake)
            os.close(poke)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _turn(self, source: int | None, wake: int) -> bool:
        """One wait and what it brought; False when the connection is at its end."""
        reading = [self._client.fileno(), wake]
        if source is not None and self._input_open and not self._pending:
            reading.append(source)
        ready, _, _ = select.select(reading, [self._client] if self._pending else [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            self._act()
        if self._client.fileno() in ready and not self._receive():
            return False
        if source is not None and source in ready and self._input_open and not self._pending:
            self._read(source)
        if self._pending:
            self._send()
        return True

    def _act(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number == signal.SIGWINCH:
                if self._on_resize is not None:
                    self._on_resize()
            elif self._on_signal is not None:
                self._on_signal(number)
            else:
                raise Hangup(signal.Signals(number).name)

    def _receive(self) -> bool:
        try:
            packet = self._client.recv(70000)
        except ConnectionError:
            return False
        if not packet:
            return False
        shown = packet[1 + self._skip :]
        self._skip = max(0, self._skip - (len(packet) - 1))
        write_all(2 if packet[0] == STDERR else 1, shown)
        return True

    def _read(self, source: int) -> None:
        try:
            data = os.read(source, PACKET)
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal hung up
                raise
            raise Hangup("hang-up") from None
        if not data:
            self._input_open = False
            if self._keys is not None:
                raise Hangup("hang-up")
            with contextlib.suppress(OSError):  # ended meanwhile
                self._client.shutdown(socket.SHUT_WR)
            return
        self._pending = memoryview(data if self._keys is None else self._keys.feed(data))

    def _send(self) -> None:
        try:
            sent = self._client.send(self._pending[:PACKET], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:  # it takes no more input; its output and end still come
            self._input_open, sent = False, len(self._pending)
        self._pending = self._pending[sent:]


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody made it non-blocking
            select.select([], [fd], [])
