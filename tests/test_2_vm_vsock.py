"""A port of a guest is dialled the same way over every transport, and what is wrong is said.

Behind the sockets is the real agent (agents.py). The hybrid socket's other side is played here after Firecracker's
description (docs/vsock.md); AF_VSOCK is tried with the kernel's loopback where the host has it.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import agents
import pytest

from engine.errors import DeadlineExceeded, Unreachable, Unsupported
from engine.runtimes.vm.vsock import Hybrid, Port, Serial, Transport, Vsock, health

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces without a user namespace need root")
WAIT = 60.0


def serve(path: Path, answer: Callable[[socket.socket], None]) -> threading.Thread:
    """One connection at `path` is answered."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def accept() -> None:
        with listener:
            answer(listener.accept()[0])

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Callable[[socket.socket], None]]:
    """Gives an accepted connection to an agent."""
    started = []

    def give(sock: socket.socket) -> None:
        started.append(agents.spawn(sock))

    yield give
    for process in started:
        process.wait(WAIT)


def hybrid(reply: bytes, then: Callable[[socket.socket], None], asked: list[bytes]) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += sock.recv(1)
        asked.append(line)
        sock.sendall(reply)
        then(sock)

    return answer


def test_the_agent_is_reached_over_the_relay_and_over_a_hybrid_socket(
    tmp_path: Path, behind: Callable[[socket.socket], None]
) -> None:
    asked: list[bytes] = []
    serve(tmp_path / "serial", behind)
    serve(tmp_path / "hybrid", hybrid(b"OK 1073741824\n", behind, asked))
    for transport in (Serial(tmp_path / "serial"), Hybrid(tmp_path / "hybrid")):
        assert 0 < health(transport, deadline=WAIT) < WAIT
    assert asked == [b"CONNECT %d\n" % Port.AGENT]


def test_a_port_behind_the_relay_that_nobody_listens_at(
    tmp_path: Path, behind: Callable[[socket.socket], None]
) -> None:
    serve(tmp_path / "serial", behind)
    with pytest.raises(Unreachable, match="port 7001 of the guest"):
        Serial(tmp_path / "serial").dial(7001, deadline=WAIT)


def test_a_line_carries_both_ways_and_ends(tmp_path: Path) -> None:
    def echo(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    serve(tmp_path / "s", hybrid(b"OK 5\n", echo, []))
    line = Hybrid(tmp_path / "s").dial(80, deadline=WAIT)
    line.send(b"there", deadline=WAIT)
    assert line.receive(deadline=WAIT) == b"there"
    line.end()
    assert line.receive(deadline=WAIT) == b""
    line.close()


@pytest.mark.parametrize("reply", [b"", b"NO 5\n", b"OK \n", b"OK 5" + b"5" * 100, b"OK x\n"])
def test_a_hybrid_socket_that_does_not_accept(tmp_path: Path, reply: bytes) -> None:
    serve(tmp_path / "s", hybrid(reply, socket.socket.close, []))
    with pytest.raises(Unreachable, match="port 80 of the guest"):
        Hybrid(tmp_path / "s").dial(80, deadline=WAIT)


def test_deadlines(tmp_path: Path) -> None:
    held: list[socket.socket] = []
    for name in ("hybrid", "serial"):
        serve(tmp_path / name, held.append)
    for transport in (Hybrid(tmp_path / "hybrid"), Serial(tmp_path / "serial")):
        with pytest.raises(DeadlineExceeded):
            health(transport, deadline=0.2)
    for transport in (Hybrid(tmp_path / "none"), Serial(tmp_path / "none")):
        with pytest.raises(Unreachable, match="connecting to none"):
            health(transport, deadline=WAIT)
    for sock in held:
        sock.close()


def test_af_vsock_or_why_not() -> None:
    """With the kernel's loopback a real connection; without one the error says what is missing."""
    transport: Transport = Vsock(1)
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((1, socket.VMADDR_PORT_ANY))
        listener.listen(1)
        port = listener.getsockname()[1]
    except (AttributeError, OSError):
        port = 0
    if not port:
        with pytest.raises(
            (Unsupported, Unreachable, DeadlineExceeded), match=r"vsock|AF_VSOCK|the context 1"
        ) as caught:
            transport.dial(Port.AGENT, deadline=5)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.EHOSTUNREACH, errno.ETIMEDOUT)
        return
    with listener:
        try:
            line = transport.dial(port, deadline=5)
        except (Unsupported, Unreachable, DeadlineExceeded) as error:
            assert "the context 1" in str(error)  # sockets, but no loopback
            return
        peer = listener.accept()[0]
        line.send(b"x")
        assert peer.recv(1) == b"x"
        peer.close()
        assert line.receive() == b""
        line.close()
