"""The input of a process that a monitor keeps (monitor.py): who feeds it, in which order, and where it ends. Floor 2.

Only here: clients of the attach socket, requests of the socket `input`, the queue of both. It never waits: who calls
does, with select(2). Nothing but Python's library is imported.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

GONE = 0xFFFFFFFF  # in place of a count: the input has ended
PACKET = 64 << 10  # bytes taken from a client at once


class Client:
    """Of the attach socket: gets all output, may feed the input."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.owed = bytearray()
        self.reads = True  # more may come from it
        self.fed = 0  # bytes of its input in the queue
        self.gone = False

    def send(self) -> bool:
        """Some of what it is owed; whether it took any, or is gone."""
        try:
            sent = self.line.send(self.owed[:PACKET])
        except BlockingIOError:
            return False
        except OSError:
            self.gone = True
            return True
        del self.owed[:sent]
        return True


class Asker:
    """Of the socket `input`: one request."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.came = b""
        self.wants = -1  # bytes it announced
        self.taken = 0
        self.told = 0
        self.queued = False
        self.over = False  # it wants no more of it

    def answer(self, ended: bool) -> bool:
        """Tell it what has been taken; whether that was the last word. `ended`: the input has."""
        whole = self.queued and self.taken >= self.wants
        ended = ended and self.queued and not whole
        if self.taken > self.told or whole or self.over or ended:
            self.told = self.taken
            with contextlib.suppress(OSError):  # gone, or it does not read a few bytes
                self.line.send(struct.pack(">I", self.taken) + (struct.pack(">I", GONE) if ended else b""))
        if whole or self.over or ended:
            self.line.close()
            return True
        return False


class Input:
    """`ends`: a client that ends its sending side ends the process's input."""

    def __init__(self, ends: bool) -> None:
        self.fd = -1  # not blocking; -1: there is none, or no more
        self.shared = False  # the descriptor is the output's, too: a terminal
        self.open = False  # the process is ready for it
        self._ends = ends
        self._ending = False  # once the queue is empty
        self._queue: list[tuple[Client | Asker, memoryview]] = []

    @property
    def ended(self) -> bool:
        return self.open and self.fd < 0

    @property
    def wants(self) -> bool:
        """Whether there is something to feed."""
        return self.open and self.fd >= 0 and bool(self._queue)

    def receive(self, client: Client) -> None:
        """What a client of the attach socket has sent."""
        try:
            data = client.line.recv(PACKET)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            client.reads = False
            if self._ends:
                self._ending = True
        elif not self.ended:
            self._queue.append((client, memoryview(data)))
            client.fed += len(data)
        self.feed()

    def ask(self, asker: Asker) -> None:
        """What has come of a request."""
        try:
            data = asker.line.recv(PACKET + 4)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # it takes back the rest
            asker.over = True
            self.forget(asker)
            return
        asker.came += data
        if asker.wants < 0 and len(asker.came) >= 4:
            asker.wants = int.from_bytes(asker.came[:4], "big")
        if asker.wants > PACKET or len(asker.came) - 4 > asker.wants >= 0:
            asker.over = True  # it does not keep the rules
            self.forget(asker)
        elif not asker.queued and asker.wants == len(asker.came) - 4:
            asker.queued = True
            self._queue.append((asker, memoryview(asker.came)[4:]))
            self.feed()

    def forget(self, who: Client | Asker) -> None:
        self._queue = [(other, view) for other, view in self._queue if other is not who]

    def end(self) -> None:
        """After what has come."""
        self._ending = True
        self.feed()

    def feed(self) -> None:
        """As much of the queue as the process takes."""
        if not self.open:
            return
        while self._queue and self.fd >= 0:
            who, view = self._queue[0]
            try:
                count = os.write(self.fd, view) if view else 0
            except BlockingIOError:
                return
            except OSError:  # nobody can read it any more
                self.close()
                break
            if isinstance(who, Client):
                who.fed -= count
            else:
                who.taken += count
            if count == len(view):
                self._queue.pop(0)
            else:
                self._queue[0] = (who, view[count:])
        if self.fd < 0:
            for who, _ in self._queue:
                if isinstance(who, Client):
                    who.fed = 0
            self._queue.clear()
        if self._ending and not self._queue:
            self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0 and not self.shared:
            os.close(fd)
