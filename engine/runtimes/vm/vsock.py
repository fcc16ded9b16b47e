"""Dialling a port of a guest: one interface over the ways a host reaches into a virtual machine.

Floor 2. A `Transport` dials a port and gives a `Line`; every wait has a deadline in seconds. What is only here: the
engine's own ports, and the three transports:

    Serial   the relay's unix socket before the virtio-serial port of QEMU; other ports by the agent's DIAL
    Vsock    AF_VSOCK to a context id (vsock(7)), where the host has vhost-vsock
    Hybrid   a unix socket that speaks `CONNECT PORT\\n` -> `OK NUMBER\\n` (Firecracker, Cloud Hypervisor,
             vhost-device-vsock; the number is the host's end, not the port)

A guest that listens at Port.AGENT has one host at a time: the next gets its hello when the one before has gone. Several
share it behind the relay.

Errors: Unreachable (nobody listens, no such socket), Unsupported (the host has none), DeadlineExceeded. Thread-safe:
transports are values; a line is used by one reader and one writer at a time.
"""

from __future__ import annotations

import enum
import errno
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.errors import DeadlineExceeded, EngineError, Unreachable, Unsupported
from engine.hostfiles import socket_address
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.protocol import Words
from engine.runtimes.vm.streams import Data, Stream

DEADLINE = 5.0
MAX_GREETING = 64  # bytes of a hybrid socket's answer


class Port(enum.IntEnum):
    """Ports of the engine in a guest. 0xFD00 to 0xFDFF are kept for it; all others are the container's own.

    Others' agents sit at 1024 and a few above it, so nothing here does.
    """

    AGENT = 0xFD00  # the agent's protocol (protocol.py); a guest listens there when booted with fd.vsock=64768


class Line(Protocol):
    """A connection to a port of a guest."""

    def send(self, data: bytes, *, deadline: float = DEADLINE) -> None:
        """All of it. DeadlineExceeded, Unreachable when the other end is gone."""

    def receive(self, *, deadline: float = DEADLINE) -> bytes:
        """What is there, at least a byte; empty at the end."""

    def end(self) -> None:
        """No more is sent; what comes may still be received."""

    def close(self) -> None: ...


class Transport(Protocol):
    def dial(self, port: int, *, deadline: float = DEADLINE) -> Line: ...

    def agent(self, *, deadline: float = DEADLINE) -> AgentClient: ...


def health(transport: Transport, *, deadline: float = DEADLINE) -> float:
    """Seconds of a round trip to the guest's agent over a fresh connection. The errors of dial say what is wrong."""
    until = time.monotonic() + deadline
    client = transport.agent(deadline=deadline)
    try:
        return client.ping(deadline=max(0.0, until - time.monotonic()))
    finally:
        client.close()


class SocketLine:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes, *, deadline: float = DEADLINE) -> None:
        self.sock.settimeout(deadline)
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise _failed(error, "sending to the guest") from error

    def receive(self, *, deadline: float = DEADLINE) -> bytes:
        self.sock.settimeout(deadline)
        try:
            return self.sock.recv(64 << 10)
        except OSError as error:
            raise _failed(error, "the guest's answer") from error

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


class StreamLine:
    """A port behind the agent, on a connection of its own."""

    def __init__(self, client: AgentClient, stream: Stream) -> None:
        self._client, self._stream = client, stream

    def send(self, data: bytes, *, deadline: float = DEADLINE) -> None:
        try:
            self._stream.write(data, deadline=deadline)
        except BrokenPipeError as error:
            raise Unreachable("the guest closed the connection") from error

    def receive(self, *, deadline: float = DEADLINE) -> bytes:
        event = self._stream.next(deadline=deadline)
        return event.data if isinstance(event, Data) else b""

    def end(self) -> None:
        self._stream.end_input()

    def close(self) -> None:
        self._client.close()


def _failed(error: OSError, what: str) -> EngineError:
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return DeadlineExceeded(f"{what} took too long")
    return Unreachable(f"{what}: {error.strerror or error}", hint="the guest is starting, ending, or does not listen")


def _unix(path: Path, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(deadline)
        with socket_address(path) as address:
            sock.connect(address)
    except OSError as error:
        sock.close()
        raise _failed(error, f"connecting to {path.name}") from error
    return sock


def _client(sock: socket.socket, deadline: float) -> AgentClient:
    return AgentClient(sock, deadline=deadline)


@dataclass(frozen=True, slots=True)
class Serial:
    """By the relay at `path`; ports of the guest are TCP ports of its loopback unless `kind` is vsock."""

    path: Path
    kind: str = "tcp"

    def dial(self, port: int, *, deadline: float = DEADLINE) -> Line:
        if port == Port.AGENT:
            return SocketLine(_unix(self.path, deadline))
        until = time.monotonic() + deadline
        client = self.agent(deadline=deadline)
        words: Words = {"port": port, "kind": self.kind}
        try:
            stream, _ = client.open("DIAL", words, deadline=max(0.0, until - time.monotonic()))
        except GuestError as error:
            client.close()
            raise _failed(error, f"port {port} of the guest") from error
        except BaseException:
            client.close()
            raise
        return StreamLine(client, stream)

    def agent(self, *, deadline: float = DEADLINE) -> AgentClient:
        return _client(_unix(self.path, deadline), deadline)


@dataclass(frozen=True, slots=True)
class Vsock:
    """By the host's kernel, to the guest with the context id `cid`."""

    cid: int

    def connect(self, port: int, deadline: float) -> socket.socket:
        family = getattr(socket, "AF_VSOCK", None)
        try:
            if family is None:
                raise OSError(errno.EAFNOSUPPORT, "no such address family")
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise Unsupported(
                f"this host has no AF_VSOCK: {error.strerror}", hint="modprobe vhost_vsock, or use another transport"
            ) from error
        try:
            sock.settimeout(deadline)
            sock.connect((self.cid, port))
        except OSError as error:
            sock.close()
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                raise Unsupported(
                    f"this host has no vsock device for the context {self.cid}: {error.strerror}",
                    hint="modprobe vhost_vsock (a guest) or vsock_loopback (1), or use another transport",
                ) from error
            raise _failed(error, f"port {port} of the guest with the context {self.cid}") from error
        return sock

    def dial(self, port: int, *, deadline: float = DEADLINE) -> Line:
        return SocketLine(self.connect(port, deadline))

    def agent(self, *, deadline: float = DEADLINE) -> AgentClient:
        return _client(self.connect(Port.AGENT, deadline), deadline)


@dataclass(frozen=True, slots=True)
class Hybrid:
    """By the unix socket of a virtual machine monitor or of vhost-device-vsock."""

    path: Path

    def connect(self, port: int, deadline: float) -> socket.socket:
        until = time.monotonic() + deadline
        sock = _unix(self.path, deadline)
        greeting = b""
        try:
            sock.sendall(b"CONNECT %d\n" % port)
            while not greeting.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                sock.settimeout(left)
                byte = sock.recv(1)  # what comes after the line is the guest's
                greeting += byte
                if not byte or len(greeting) > MAX_GREETING:
                    break
        except OSError as error:
            sock.close()
            raise _failed(error, f"port {port} of the guest") from error
        word, _, number = greeting.rstrip(b"\n").partition(b" ")
        if word != b"OK" or not number.isdigit() or not greeting.endswith(b"\n"):
            sock.close()
            said = f"answered {greeting[:40]!r}" if greeting else "nobody listens there"
            raise Unreachable(f"port {port} of the guest: {said}")
        return sock

    def dial(self, port: int, *, deadline: float = DEADLINE) -> Line:
        return SocketLine(self.connect(port, deadline))

    def agent(self, *, deadline: float = DEADLINE) -> AgentClient:
        return _client(self.connect(Port.AGENT, deadline), deadline)
