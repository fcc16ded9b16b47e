"""Input, terminal size and attach socket of a process under conmon, a container's or a session's. conmon 2.1.6.

Floor 2. Facts this relies on, each seen in a real conmon:
    <bundle>/attach     SOCK_SEQPACKET. To conmon: input, at most 32 KiB a packet (more is cut off). From conmon: the
                        stream's number (2 stdout, 3 stderr) and up to 8 KiB of output. Who connects before the process
                        starts misses nothing.
    end of input        without --leave-stdin-open any client that shuts down its sending side, or goes, ends the
                        process's input. So the engine keeps one connection per process, opened by the first write.
    <bundle>/ctl        a fifo; the line `1 ROWS COLUMNS` sets the terminal's size
That connection must outlive the daemon, or `kill -9` of it would end the input: a `cat` to /dev/null holds a duplicate,
and takes in what conmon sends there. It ends with conmon. A later daemon takes the socket back from it (pidfd_getfd).
On a terminal conmon must be told --leave-stdin-open: it would close the terminal itself; ^D ends its input.

Stateless but for files; calls for one process are serialised by the caller.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine import attachline, host, hostfiles
from engine.errors import DeadlineExceeded, InvalidArgument, NotFound, RuntimeFailure
from engine.runtimes import conmon, pids
from engine.runtimes.conmon import Files
from engine.runtimes.monitor import INPUT
from engine.runtimes.monitorinput import GONE
from engine.runtimes.sessions import INPUT_PATIENCE

PACKET = 32 << 10  # bytes conmon takes at once
END_OF_TRANSMISSION = b"\x04"  # ^D
MAX_SIZE = 65535
REQUEST = 32 << 10  # bytes monitor.py is asked to hand on at once
LAST_WORD = 10.0  # seconds for it to say how much was taken
_SYS_PIDFD_GETFD = 438  # on every architecture


class OciConsole:
    """Of containers' own processes; `files(id)` are those of one that runs, or raises."""

    def __init__(self, files: Callable[[str], Files]) -> None:
        self._files = files

    def send(self, id: str, data: bytes) -> int:
        return send(self._files(id), data)

    def end_input(self, id: str) -> None:
        end_input(self._files(id))

    def resize(self, id: str, columns: int, rows: int) -> None:
        resize(self._files(id), columns, rows)

    def attach_path(self, id: str) -> Path | None:
        return attach_path(self._files(id))


def note_terminal(files: Files, terminal: bool) -> None:
    """Whether the process has a terminal: a later daemon must know."""
    (files.run / "terminal").write_text("1" if terminal else "0")


def is_terminal(files: Files) -> bool:
    """NotFound when nothing runs there."""
    try:
        return (files.run / "terminal").read_text() == "1"
    except FileNotFoundError:
        raise NotFound("the runtime knows nothing of it") from None


def attach_path(files: Files) -> Path:
    stream = files.bundle / attachline.STREAM
    return stream if stream.exists() else files.bundle / "attach"


def connect(path: Path) -> socket.socket:
    """A connection to an attach socket, however long its path is. NotFound when nobody listens."""
    try:
        return attachline.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotFound("nobody listens at its attach socket: it has ended") from error


def send(files: Files, data: bytes, patience: float = INPUT_PATIENCE) -> int:
    """Bytes of `data` the process's input took within `patience` seconds. DeadlineExceeded when none."""
    if (files.bundle / INPUT).exists():
        return _ask(files, data, patience)
    with _connection(files, keep=not is_terminal(files)) as client:
        until = time.monotonic() + patience
        poll = select.poll()
        poll.register(client, select.POLLOUT)
        sent = 0
        while sent < len(data):
            try:
                sent += client.send(
                    data[sent : sent + PACKET], socket.MSG_DONTWAIT
                )  # O_NONBLOCK would be the holder's, too
            except BlockingIOError:
                rest = until - time.monotonic()
                if rest <= 0 or not poll.poll(rest * 1000):
                    break
            except ConnectionError:
                raise BrokenPipeError(errno.EPIPE, "its input has ended") from None
        if data and not sent:
            raise DeadlineExceeded("it does not read its input", hint="try again when it does")
        return sent


def _ask(files: Files, data: bytes, patience: float) -> int:
    """The same of monitor.py: what its process has not taken in time is taken back."""
    until, sent = time.monotonic() + patience, 0
    while sent < len(data):
        piece = data[sent : sent + REQUEST]
        count, gone = _request(files.bundle / INPUT, piece, until)
        sent += count
        if gone and not sent:
            raise BrokenPipeError(errno.EPIPE, "its input has ended")
        if count < len(piece):
            break
    if data and not sent:
        raise DeadlineExceeded("it does not read its input", hint="try again when it does")
    return sent


def _request(path: Path, data: bytes, until: float) -> tuple[int, bool]:
    """How many bytes of `data` were taken, and whether the input has ended."""
    answer = b""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            with hostfiles.socket_address(path) as address:
                line.connect(address)
            line.settimeout(LAST_WORD)
            line.sendall(struct.pack(">I", len(data)) + data)
            while not answer or struct.unpack(">I", answer[-4:])[0] < len(data):
                line.settimeout(max(0.001, until - time.monotonic()))
                if not (more := line.recv(4096)):
                    break
                answer += more
        except TimeoutError:
            line.settimeout(LAST_WORD)
            line.shutdown(socket.SHUT_WR)
            while more := line.recv(4096):
                answer += more
        except OSError:  # it has ended
            return 0, True
    counts = [count for (count,) in struct.iter_unpack(">I", answer[: len(answer) // 4 * 4])]
    return max((count for count in counts if count != GONE), default=0), GONE in counts or not counts


def end_input(files: Files) -> None:
    """The process sees the end of its input after what was sent."""
    if is_terminal(files):
        send(files, END_OF_TRANSMISSION)
        return
    if (files.bundle / INPUT).exists():
        conmon.control(files, conmon.END_INPUT)
        return
    with _connection(files, keep=False) as client:
        client.shutdown(socket.SHUT_WR)  # of the connection itself: the holder's duplicate does not keep it open
    (files.run / "input.json").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it has ended at that, and is cleared already
        host.write_atomic(files.run / "input.ended", b"", 0o600)


def resize(files: Files, columns: int, rows: int) -> None:
    """Set the size of its terminal. NotFound when conmon has ended."""
    if not (0 < columns <= MAX_SIZE and 0 < rows <= MAX_SIZE):
        raise InvalidArgument(f"resize: columns and rows between 1 and {MAX_SIZE} expected", at=f"{columns} {rows}")
    conmon.control(files, f"1 {rows} {columns}\n".encode())


def _connection(files: Files, *, keep: bool) -> socket.socket:
    """The connection this process's input goes through: the one an earlier write opened, or a new one.

    `keep`: it is to stay open when the caller closes this duplicate, even when the daemon is killed.
    """
    if (files.run / "input.ended").exists():
        raise BrokenPipeError(errno.EPIPE, "its input has ended")
    held = _held(files)
    if held is not None:
        return held
    try:
        client = connect(attach_path(files))
    except NotFound:
        raise BrokenPipeError(errno.EPIPE, "it has ended") from None
    if keep:
        try:
            _hold(files, client)
        except BaseException:
            client.close()
            raise
    return client


def _hold(files: Files, client: socket.socket) -> None:
    cat = shutil.which("cat", path="/usr/bin:/bin")
    if cat is None:
        raise RuntimeFailure("cat is not installed")
    process = subprocess.Popen(
        [cat],
        stdin=client.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    facts = {"pid": process.pid, "start": pids.start_time(process.pid) or 0, "boot": pids.boot_id()}
    host.write_atomic(files.run / "input.json", json.dumps(facts).encode(), 0o600)
    threading.Thread(target=process.wait, name="input-holder", daemon=True).start()  # so that it is no zombie


def _held(files: Files) -> socket.socket | None:
    """The holder's connection; None when there is no holder."""
    try:
        facts = json.loads((files.run / "input.json").read_bytes()[:4096])
        pid, started, boot = int(facts["pid"]), int(facts["start"]), str(facts["boot"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if boot != pids.boot_id():
        return None
    process = pids.open_process(pid, started)
    if process is None:
        return None
    try:
        fd = _duplicate(process, 0)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EBADF):
            return None
        raise
    finally:
        os.close(process)
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    return socket.socket(fileno=fd)


def _duplicate(pidfd: int, number: int) -> int:
    """A duplicate of file descriptor `number` of the process behind `pidfd`: pidfd_getfd(2), Linux 5.6."""
    return host.system_call(_SYS_PIDFD_GETFD, pidfd, number, 0)
