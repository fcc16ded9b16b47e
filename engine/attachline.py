"""A connection to the attach socket of a process: its output, whole or in pieces, and the way to its input. Floor 0.

Only here: the two kinds of sockets. conmon's, `attach`, is SOCK_SEQPACKET: a packet of output is the stream's number
(2 stdout, 3 stderr) and up to 8 KiB; input is at most 32 KiB a packet. Where there is no conmon, `attach.stream` is a
stream (macOS has no SOCK_SEQPACKET for unix sockets): output comes as the stream's number, four bytes of length (big
endian) and as many bytes; input goes as it is. Ending the sending side ends the process's input, unless it has a
terminal. Not thread-safe.
"""

from __future__ import annotations

import socket
from pathlib import Path

from engine.hostfiles import socket_address

STREAM = "attach.stream"
HEAD = 5  # bytes before a piece of output


class Line(socket.socket):
    """One to `attach.stream` that receives as if it were to `attach`."""

    _head = b""
    _left = 0  # bytes of the piece that are still to come

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """The stream's number and up to `size` - 1 bytes of output; empty at the end. A time-out loses nothing."""
        while not self._left:
            if len(self._head) >= HEAD:
                self._head = b""
            more = super().recv(HEAD - len(self._head), flags)
            if not more:
                return b""
            self._head += more
            if len(self._head) == HEAD:
                self._left = int.from_bytes(self._head[1:], "big")
        data = super().recv(min(size - 1, self._left), flags)
        if not data:
            return b""
        self._left -= len(data)
        return self._head[:1] + data


def connect(path: Path) -> socket.socket:
    """A connection, however long the path is. FileNotFoundError or ConnectionRefusedError when nobody listens."""
    stream = path.name == STREAM
    client = Line(socket.AF_UNIX) if stream else socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with socket_address(path) as address:
            client.connect(address)
    except OSError:
        client.close()
        raise
    return client
