"""The agent's connection shared with other processes of the host: the socket `agent.sock` of a machine. Floor 2.

Only here: streams of several clients on one connection. A client speaks protocol.py as if it were alone with the agent,
HELLO included; its streams get numbers of the connection, and when it goes away, what it started (EXEC) is killed and
what it froze goes on. A client that does not read what it asked for is cut off: the agent's window bounds what can be
under way for it. The socket is 0600 in a 0700 directory.
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
from engine.runtimes.vm.link import Link
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
        self.processes: dict[int, str] = {}  # the connection's number of what it started -> id

    def put(self, data: bytes | None) -> None:
        try:
            self.out.put_nowait(data)
        except queue.Full:
            self.cut()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Relay:
    def __init__(self) -> None:
        self.link: Link | None = None
        self.before: dict[str, Callable[[], None]] = {}  # verb -> what the owner does before it is handed on
        self._lock = threading.Lock()
        self._owners: dict[int, tuple[_Client, int]] = {}  # the connection's number -> client, its number
        self._kept: set[int] = set()  # numbers whose stream goes on after the answer
        self._ends: dict[int, set[int]] = {}  # DIAL: flags of END seen
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
            over = frame.type is Type.EXIT
            if frame.type is Type.RESP:
                over = frame.stream not in self._kept or frame.payload[:4] != bytes(4)
            if over:
                self._drop(client, frame.stream, number)
        client.put(frame._replace(stream=number).encode())
        return True

    def _drop(self, client: _Client, stream: int, number: int) -> None:
        """The lock is held."""
        self._owners.pop(stream, None)
        self._kept.discard(stream)
        client.streams.pop(number, None)
        client.processes.pop(stream, None)

    # --- from a client -------------------------------------------------------------------------------------------

    def _write(self, client: _Client) -> None:
        assert self.link is not None
        with contextlib.suppress(OSError):
            client.connection.sendall(protocol.frame(Type.HELLO, 0, self.link.hello))
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
            if stream is not None:
                link.send(frame._replace(stream=stream).encode())
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
            if verb == "FREEZE":
                client.froze = values.text("state") != "0"
            if verb == "EXEC":
                client.processes[stream] = values.text("id")
        link.send(frame._replace(stream=stream).encode())

    def _gone(self, client: _Client) -> None:
        client.put(None)
        with self._lock:
            self._clients -= 1
            left = dict(client.processes)
            for stream in list(client.streams.values()):
                self._kept.discard(stream)
                if stream not in left:
                    self._owners.pop(stream, None)
        client.connection.close()
        if client.froze:
            assert self.link is not None
            with contextlib.suppress(EngineError):
                self.link.call("FREEZE", {"state": 0})
        for id in left.values():
            assert self.link is not None
            with contextlib.suppress(EngineError):  # it has ended meanwhile, or the machine has
                self.link.call("SIGNAL", {"id": id, "signal": 9})


def _refusal(stream: int, errno: int, step: str) -> bytes:
    return protocol.frame(Type.RESP, stream, protocol.response(errno, {"step": step}))
