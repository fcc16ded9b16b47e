"""The agent's connection shared by clients: what one that goes away leaves under way harms nobody."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from engine.errors import DeadlineExceeded, EngineError
from engine.runtimes.vm import protocol, pump
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.protocol import Frame, Parser, Side, Type
from engine.runtimes.vm.relay import Relay
from engine.runtimes.vm.streams import Data, End, Stream

WAIT = 30.0
T = TypeVar("T")


class Guest:
    """The other end of the owner's connection, played here frame by frame."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(WAIT)
        self.relay = Relay()
        self.relay.link = self.link = AgentClient(ours, deadline=None, foreign=self.relay.took)
        hello = protocol.response(0, {"version": protocol.VERSION, "build": "x"})[4:]
        self.send(Type.HELLO, 0, hello)
        self.link.greet(WAIT)
        self._parser, self._frames = Parser(Side.HOST), list[Frame]()

    def send(self, kind: Type, stream: int, payload: bytes = b"", flag: int = 0) -> None:
        self.sock.sendall(protocol.frame(kind, stream, payload, flag))

    def next(self) -> Frame:
        while not self._frames:
            self._frames += self._parser.feed(self.sock.recv(1 << 16))
        return self._frames.pop(0)

    def answer(self, verb: str, errno: int = 0) -> int:
        """To the next request, which is `verb`: its stream."""
        frame = self.next()
        assert frame.type is Type.REQ and protocol.parse_request(frame.payload)[0] == verb
        self.send(Type.RESP, frame.stream, protocol.response(errno, {"step": "here"} if errno else {}))
        return frame.stream


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest()
    guest.relay.listen(tmp_path / "agent.sock")
    yield guest
    guest.link.close()
    guest.sock.close()


def connect(place: Path) -> AgentClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(place / "agent.sock"))
    return AgentClient(sock, deadline=WAIT)


def in_background(work: Callable[[], T]) -> Future[T]:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


def alive(guest: Guest) -> bool:
    """The owner's own requests are answered still."""
    asked = in_background(lambda: guest.link.call("SYNC", deadline=WAIT))
    guest.answer("SYNC")
    asked.result(WAIT)
    return not guest.link.lost


def dialled(guest: Guest, tmp_path: Path) -> tuple[AgentClient, Stream, int]:
    """A client, its line to a port of the guest, and the line's number there."""
    client = connect(tmp_path)
    dialling = in_background(lambda: client.open("DIAL", {"port": 80, "kind": "tcp"}, deadline=WAIT))
    stream = guest.answer("DIAL")
    line, _ = dialling.result(WAIT)
    return client, line, stream


def test_a_dialled_port_whose_client_went_away(guest: Guest, tmp_path: Path) -> None:
    client, line, stream = dialled(guest, tmp_path)
    guest.send(Type.DATA, stream, b"first", protocol.STDOUT)
    assert line.next(deadline=WAIT) == Data(protocol.STDOUT, b"first")
    client.close()
    assert guest.next()[:2] == (stream, Type.END)  # so that whoever listens there sees the end
    guest.send(Type.DATA, stream, b"more", protocol.STDOUT)
    guest.send(Type.END, stream, b"", protocol.STDOUT)
    assert alive(guest) and not guest.relay._owners
    guest.send(Type.DATA, stream, b"after its end", protocol.STDOUT)
    with pytest.raises(EngineError, match="nobody has"):
        guest.link.call("SYNC", deadline=WAIT)


def test_a_dialled_port_that_ends_from_both_sides_is_forgotten(guest: Guest, tmp_path: Path) -> None:
    client, line, stream = dialled(guest, tmp_path)
    guest.send(Type.END, stream, b"", protocol.STDOUT)
    assert line.next(deadline=WAIT) == End(protocol.STDOUT)
    line.end_input()
    assert guest.next()[:2] == (stream, Type.END)
    client.close()
    assert alive(guest) and not guest.relay._owners


def test_an_answer_that_comes_when_who_asked_has_gone(guest: Guest, tmp_path: Path) -> None:
    client = connect(tmp_path)
    asking = in_background(lambda: client.call("STATS", deadline=0.2))
    request = guest.next()
    with pytest.raises(DeadlineExceeded):
        asking.result(WAIT)
    client.close()
    guest.send(Type.RESP, request.stream, protocol.response(0, {"uptime": "1"}))
    assert alive(guest) and not guest.relay._owners


def test_pings_and_refusals_go_to_who_asked(guest: Guest, tmp_path: Path) -> None:
    first, second = connect(tmp_path), connect(tmp_path)
    pinging = in_background(lambda: first.ping(deadline=WAIT))
    refused = in_background(lambda: second.call("PS", deadline=WAIT))
    for _ in range(2):
        frame = guest.next()
        if frame.type is Type.PING:
            guest.send(Type.PONG, frame.stream, frame.payload)
        else:
            guest.send(Type.RESP, frame.stream, protocol.response(13, {"step": "looking"}))
    assert pinging.result(WAIT) >= 0
    with pytest.raises(GuestError, match="looking"):
        refused.result(WAIT)
    with pytest.raises(GuestError, match="RUN is the owner's"):
        second.open("RUN", {"id": "x"}, deadline=WAIT)
    first.close()
    second.close()
    assert alive(guest) and not guest.relay._owners


def test_output_is_written_whole_to_a_pipe_that_somebody_made_not_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as pipe:
            got.append(pipe.read())

    reader = threading.Thread(target=read)
    reader.start()
    pump._write(writing, b"x" * (1 << 20))
    os.close(writing)
    reader.join(60)
    assert got == [b"x" * (1 << 20)] and not caplog.records
    pump._write(writing, b"lost")  # a closed descriptor is nobody's end
    assert "4 bytes of output are lost" in caplog.text
