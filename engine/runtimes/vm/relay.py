"""The agent's connection shared with other processes of the host: the socket `agent.sock` of a machine. Floor 2.

Only here: streams of several clients on one connection. A client speaks protocol.py as if it were alone with the agent,
HELLO included; its streams get numbers of the connection, and when it goes away, what it started (EXEC) is killed and
what it froze goes on, unless it said `keep`. A client that does not read what it asked for is cut off: the agent's
window bounds what can be under way for it. The socket is 0600 in a 0700 directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from engine.errors import EngineError
from engine.hostfiles import socket_address
from engine.runtimes.vm import protocol
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import Frame, Parser, Side, Type

log = logging.getLogger(__name__)

KEEPS = frozenset({"EXEC", "DIAL"})  # verbs whose stream goes on after the answer
MAX_CLIENTS = 256
MAX_QUEUE = 512  # frames for one client
EPERM, EIO = 1, 5  # Linux's


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.out: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUE)
        self.streams: dict[int, int] = {}  # its number -> the connection's
        self.froze = False  # the container's processes, which go on when this client goes away
        self.gone = False
        self.dialled: dict[int, set[Side]] = {}  # the connection's number of a DIAL -> who has ended it
        self.processes: dict[int, str] = {}  # the connection's number of what it started -> id

    def put(self, data: bytes | None) -> None:
        if self.gone:
            return  # what it asked for still comes
        try:
            self.out.put_nowait(data)
        except queue.Full:
            self.cut()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Relay:
    def __init__(self) -> None:
        self.link: AgentClient | None = None
        self.before: dict[str, Callable[[], None]] = {}  # verb -> what the owner does before it is handed on
        self._lock = threading.Lock()
        self._owners: dict[int, tuple[_Client, int]] = {}  # the connection's number -> client, its number
        self._kept: set[int] = set()  # numbers whose stream goes on after the answer
        self._clients = 0

    def listen(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        with socket_address(path) as address:
            old = os.umask(0o177)
            try:
                server.bind(address)
            finally:
                os.umask(old)
        server.listen(64)
        threading.Thread(target=self._accept, args=(server,), name="relay", daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            with self._lock:
                if self._clients >= MAX_CLIENTS:
                    connection.close()
                    continue
                self._clients += 1
            client = _Client(connection)
            threading.Thread(target=self._write, args=(client,), name="relay-out", daemon=True).start()
            threading.Thread(target=self._serve, args=(client,), name="relay-in", daemon=True).start()

    # --- from the guest ------------------------------------------------------------------------------------------

    def took(self, frame: Frame) -> bool:
        """A frame of a stream that is no process of the owner's. False when no client has it."""
        with self._lock:
            owner = self._owners.get(frame.stream)
            if owner is None:
                return False
            client, number = owner
            over = frame.type in (Type.EXIT, Type.PONG)
            if frame.type is Type.END:
                over = self._ended(client, frame.stream, Side.GUEST)
            if frame.type is Type.RESP:
                over = frame.stream not in self._kept or frame.payload[:4] != bytes(4)
            if over:
                self._drop(client, frame.stream, number)
        client.put(frame._replace(stream=number).encode())
        return True

    def _ended(self, client: _Client, stream: int, side: Side) -> bool:
        """Whether a dialled stream is over, now that `side` has ended it. The lock is held."""
        ends = client.dialled.get(stream)
        if ends is None:
            return False
        ends.add(side)
        return len(ends) == 2

    def _drop(self, client: _Client, stream: int, number: int) -> None:
        """The lock is held."""
        self._owners.pop(stream, None)
        self._kept.discard(stream)
        client.streams.pop(number, None)
        client.processes.pop(stream, None)
        client.dialled.pop(stream, None)

    # --- from a client -------------------------------------------------------------------------------------------

    def _write(self, client: _Client) -> None:
        assert self.link is not None
        with contextlib.suppress(OSError):
            client.connection.sendall(protocol.frame(Type.HELLO, 0, self.link.greeting))
            while (data := client.out.get()) is not None:
                client.connection.sendall(data)
        client.cut()

    def _serve(self, client: _Client) -> None:
        parser = Parser(Side.HOST)
        try:
            while data := client.connection.recv(1 << 18):
                for frame in parser.feed(data):
                    self._ask(client, frame)
        except (OSError, EngineError) as error:
            log.info("a client's connection: %s", error)
        finally:
            self._gone(client)

    def _ask(self, client: _Client, frame: Frame) -> None:
        link = self.link
        assert link is not None
        if frame.type is not Type.REQ:
            with self._lock:
                stream = client.streams.get(frame.stream)
                if stream is None and frame.type is Type.PING:
                    stream = link.number()
                    client.streams[frame.stream] = stream
                    self._owners[stream] = (client, frame.stream)
                if stream is not None and frame.type is Type.END and self._ended(client, stream, Side.HOST):
                    self._drop(client, stream, frame.stream)
            if stream is not None:
                link.forward(frame._replace(stream=stream).encode())
            return
        verb, values = protocol.parse_request(frame.payload)
        if verb in ("RUN", "POWEROFF"):
            client.put(_refusal(frame.stream, EPERM, f"{verb} is the owner's"))
            return
        if (before := self.before.get(verb)) is not None:
            try:
                before()
            except (EngineError, OSError) as error:
                client.put(_refusal(frame.stream, EIO, str(error)))
                return
        stream = link.number()
        with self._lock:
            if frame.stream in client.streams:
                raise protocol.ProtocolError(f"the stream {frame.stream} is in use")
            client.streams[frame.stream] = stream
            self._owners[stream] = (client, frame.stream)
            if verb in KEEPS:
                self._kept.add(stream)
            if verb == "DIAL":
                client.dialled[stream] = set()
            if verb == "FREEZE":
                client.froze = values.text("state") != "0" and values.get("keep") is None
            if verb == "EXEC":
                client.processes[stream] = values.text("id")
        link.forward(frame._replace(stream=stream).encode())

    def _gone(self, client: _Client) -> None:
        client.put(None)
        client.gone = True
        with self._lock:
            self._clients -= 1
            left = dict(client.processes)
            open_ = [stream for stream, ends in client.dialled.items() if Side.HOST not in ends]
            for stream, number in [(stream, number) for number, stream in client.streams.items() if stream in open_]:
                if self._ended(client, stream, Side.HOST):
                    self._drop(client, stream, number)
        client.connection.close()
        assert self.link is not None
        for stream in open_:  # what still comes on it is thrown away
            with contextlib.suppress(EngineError):
                self.link.forward(protocol.frame(Type.END, stream))
        if client.froze:
            assert self.link is not None
            with contextlib.suppress(EngineError, OSError):
                self.link.call("FREEZE", {"state": 0})
        for id in left.values():
            assert self.link is not None
            with contextlib.suppress(EngineError, OSError):  # it has ended meanwhile, or the machine has
                self.link.call("SIGNAL", {"id": id, "signal": 9})


def _refusal(stream: int, errno: int, step: str) -> bytes:
    return protocol.frame(Type.RESP, stream, protocol.response(errno, {"step": step}))
