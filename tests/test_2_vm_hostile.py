"""A hostile guest: whatever it says to the host's end of its connection, that ends or goes on, and names why.

It answers as an agent does for the most part, and adds frames that are out of place or damaged. Bounded, from fixed
seeds; the parsers by themselves are fuzzed by tools/fuzz.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from engine.errors import EngineError
from engine.runtimes.vm import protocol
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import Frame, Parser, Side, Type, frame

TURNS = 60
SECONDS = 0.05  # of each call: most are never answered
HELLO = frame(
    Type.HELLO, 0, protocol.pack_words([b"version=%d" % protocol.VERSION, b"build=x", b"arch=x86_64", b"kernel=6.1"])
)


def saying(chance: random.Random, stream: int) -> bytes:
    """One frame about `stream`, which may be in its place or not."""
    other = chance.choice((stream, stream, stream, stream + 1, 7, 0xFFFFFFFF))
    data = Frame(other, Type.DATA, chance.choice((1, 2)), bytes(chance.choice((1, 900, 65000)))).encode()
    exit_ = frame(Type.EXIT, other, protocol.EXITED.pack(chance.randrange(300), chance.randrange(8)))
    out = chance.choice(
        (
            frame(Type.RESP, other, protocol.response(chance.choice((0, 2, 1 << 30)), {"pid": "7", "step": "x"})),
            frame(Type.RESP, other, chance.randbytes(chance.randrange(4, 40))),
            *(data, data, data),
            *(frame(Type.END, other, flag=chance.choice((1, 2))), exit_),
            protocol.credit(other, chance.choice((1, 1000, 0xFFFFFFFF))),
            *(frame(Type.PONG, other, b"ping"), HELLO),
        )
    )
    if chance.random() < 0.1:
        out = out[: chance.randrange(len(out))] + chance.randbytes(1) + out[chance.randrange(len(out)) :]
    return out


def answers(chance: random.Random, asked: Frame) -> bytes:
    """What it says to a frame of the host: the right answer for the most part, and then more than that."""
    out = b""
    if asked.type is Type.REQ and chance.random() < 0.9:
        out = frame(Type.RESP, asked.stream, protocol.response(0, {"pid": "7"}))
    elif asked.type is Type.PING and chance.random() < 0.9:
        out = frame(Type.PONG, asked.stream, asked.payload)
    for _ in range(chance.choice((0, 0, 1, 3, 9))):
        out += saying(chance, asked.stream)
    return out


@pytest.fixture
def threads() -> Iterator[list[str]]:
    """What threads died of; none may."""
    died: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda args: died.append(repr(args.exc_value))
    yield died
    threading.excepthook = before


def guest(seed: int) -> tuple[socket.socket, threading.Thread]:
    """Our end of a connection to a guest that says its hello, answers what it is sent, and hangs up in the end."""
    ours, theirs = socket.socketpair()
    chance = random.Random(seed)

    def talk() -> None:
        parser = Parser(Side.HOST)
        with theirs, suppress(OSError):
            theirs.settimeout(4 * SECONDS)
            theirs.sendall(HELLO)
            while data := theirs.recv(1 << 16):
                for asked in parser.feed(data):
                    theirs.sendall(answers(chance, asked))

    thread = threading.Thread(target=talk)
    thread.start()
    return ours, thread


def test_the_client_of_an_agent_withstands_a_hostile_guest(threads: list[str]) -> None:
    answered = 0
    for seed in range(TURNS):
        sock, thread = guest(seed)
        try:
            client = AgentClient(sock, deadline=5)
        except EngineError:
            thread.join()
            continue
        with suppress(EngineError, OSError):
            client.call("STATS", deadline=SECONDS)
            answered += 1
        with suppress(EngineError, OSError):
            stream, _ = client.open("EXEC", {"id": "a", "in": "main", "argv": ["x"]}, deadline=SECONDS)
            stream.write(b"x" * 1000, deadline=SECONDS)
            while stream.next(deadline=SECONDS) is not None:
                answered += 1
        with suppress(EngineError, OSError):
            client.ping(deadline=SECONDS)
        client.close()
        thread.join()
    assert threads == [] and answered > TURNS // 4


def test_an_exit_that_is_none_ends_the_wait_for_it() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HELLO)
        client = AgentClient(ours, deadline=5)

        def talk() -> None:
            theirs.recv(1 << 16)
            theirs.sendall(frame(Type.RESP, 1, protocol.response(0, {"pid": "7"})))
            theirs.sendall(frame(Type.EXIT, 1, protocol.EXITED.pack(299, 0)))

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(EngineError, match="agent protocol"):  # at once, or where its end is waited for
            client.open("RUN", {"id": "main", "rootfs": "/", "argv": ["x"]}, deadline=5)[0].wait(deadline=5)
        thread.join()
        client.close()
