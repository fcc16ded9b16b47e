"""The files of a process's monitor (monitor.py): its log, its notes, its sockets. Floor 2.

Nothing but Python's library is imported: it has to be there at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time


class Log:
    """The file `path` names, in the CRI format. On a full disk what could not be written is dropped."""

    def __init__(self, path: str, most: int, sync: bool) -> None:
        self.path, self._most, self._sync = path, most, sync
        self._written = 0
        self._second, self._date = -1, b""
        self._torn = False
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def reopen(self) -> None:
        try:
            fd = self._open()
        except OSError as error:
            warn(f"the log is not opened anew: {error}")
            return
        self.close()
        self._fd, self._torn = fd, False

    def close(self) -> None:
        if self._sync:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
        os.close(self._fd)

    def write(self, stream: bytes, data: bytes) -> None:
        if self._most >= 0 and self._written >= self._most:
            return
        now = time.time_ns()
        if now // 1_000_000_000 != self._second:
            self._second = now // 1_000_000_000
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._second)).encode()
        head = b"%b.%09d+00:00 %b " % (self._date, now % 1_000_000_000, stream)
        *lines, last = data.split(b"\n")
        out = [b"%bF %b\n" % (head, line) for line in lines]
        if last:
            out.append(b"%bP %b\n" % (head, last))
        text = b"".join(out)
        self._written += len(text)
        view = memoryview(b"\n" + text if self._torn else text)  # what is torn is no record, and shows as nothing
        try:
            while view:
                view = view[os.write(self._fd, view) :]
                self._torn = True
            self._torn = False
        except OSError as error:
            warn(f"{len(view)} bytes of the log are lost: {error}")


def warn(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"monitor: {text}\n".encode(errors="replace"))


def note(path: str, text: str) -> None:
    """Written aside, durable, renamed: it is there whole or not at all."""
    aside = f"{path}.aside"
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError as error:
        warn(f"{path} is not written: {error}")


def listen(bundle: str, name: str) -> socket.socket:
    """A listening socket in the bundle, however long its path is; only its owner may connect."""
    server = socket.socket(socket.AF_UNIX)
    here, mask = os.open(".", os.O_RDONLY), os.umask(0o177)
    try:
        os.chdir(bundle)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        server.bind(name)
    finally:
        os.umask(mask)
        os.fchdir(here)
        os.close(here)
    server.listen(64)
    server.setblocking(False)
    return server
