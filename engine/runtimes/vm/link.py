"""A connection to the agent of a guest, for the processes of a run: requests, and the streams of processes. Floor 2.

Only here: which frames belong to whom on one connection (protocol.py has their form). The guest is hostile: whatever
breaks the protocol ends the connection, and everybody who waits is told why. Thread-safe; one thread reads.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.errors import DeadlineExceeded, EngineError, Unreachable
from engine.runtimes.vm import protocol
from engine.runtimes.vm.protocol import Credit, Frame, Parser, ProtocolError, Side, Type, Values, Words

log = logging.getLogger(__name__)

_Answer = queue.SimpleQueue[bytes | None]

SEND_SECONDS = 15  # for one frame to be taken by the guest's port


class Refused(EngineError):
    """The agent answered with an errno of Linux."""

    def __init__(self, errno: int, step: str) -> None:
        super().__init__(f"{step}: {os.strerror(errno)}" if step else os.strerror(errno))
        self.number = errno
        self.step = step


class Event(NamedTuple):
    """What comes on a process's stream: bytes (`flag` says of what), or its end with an exit code."""

    flag: int
    data: bytes = b""
    code: int | None = None
    bits: int = 0


class Stream:
    """One process's stream. `events` ends with one that has a code, or with None: the connection is over."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self.number = number
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._owed = Credit()  # what the guest may still send
        self._mine = protocol.WINDOW  # what may still be sent to it
        self._change = threading.Condition()
        self._over = False

    def took(self, frame: Frame) -> None:
        """From the reading thread. ProtocolError."""
        if frame.type is Type.DATA:
            self._owed.take(len(frame.payload))
            self.events.put(Event(frame.flag, frame.payload))
        elif frame.type is Type.CREDIT:
            with self._change:
                self._mine += protocol.parse_credit(frame.payload)
                if self._mine > protocol.WINDOW:
                    raise ProtocolError(f"a credit of more than the {protocol.WINDOW} bytes of a window")
                self._change.notify_all()
        elif frame.type is Type.EXIT:
            code, bits = protocol.parse_exit(frame.payload)
            self.end(Event(0, b"", code, bits))

    def end(self, event: Event | None) -> None:
        with self._change:
            self._over = True
            self._change.notify_all()
        self.events.put(event)

    def consumed(self, count: int) -> None:
        """The guest may send that much more."""
        self._owed.give(count)
        self._link.send(protocol.credit(self.number, count))

    def write(self, data: bytes) -> bool:
        """Feed the process's input, waiting for it to read. False when it has ended."""
        while data:
            with self._change:
                while not self._mine and not self._over:
                    self._change.wait()
                if self._over:
                    return False
                piece = data[: min(self._mine, protocol.BULK)]
                self._mine -= len(piece)
            self._link.send(protocol.frame(Type.DATA, self.number, piece))
            data = data[len(piece) :]
        return True

    def end_input(self) -> None:
        self._link.send(protocol.frame(Type.END, self.number))


class Link:
    def __init__(
        self, connection: socket.socket, foreign: Callable[[Frame], bool] = lambda frame: False, hello: bytes = b""
    ) -> None:
        """`foreign` is shown frames of streams that are not this link's; False: they are nobody's, which is refused.
        `hello`: the HELLO of a guest that has said it before, to somebody else."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self._socket = connection
        self._foreign = foreign
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._number = 0
        self._waiting: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._streams: dict[int, Stream] = {}
        self._greeting: queue.SimpleQueue[Values | None] = queue.SimpleQueue()
        self.hello = b""  # as it came
        self.lost = ""  # why the connection is over
        threading.Thread(target=self._read, args=(hello,), name="agent", daemon=True).start()

    def greet(self, seconds: float) -> Values:
        """HELLO. DeadlineExceeded when none came; Unreachable or ProtocolError's words when the connection is over."""
        try:
            found = self._greeting.get(timeout=seconds)
        except queue.Empty:
            raise DeadlineExceeded(f"the agent in the guest did not answer within {seconds:g} s") from None
        if found is None:
            raise Unreachable(self.lost or "the guest is gone")
        return found

    def number(self) -> int:
        """A stream nobody uses."""
        with self._lock:
            self._number = self._number % 0xFFFFFFF0 + 1
            return self._number

    def call(self, verb: str, words: Words | None = None, seconds: float = 10.0) -> Values:
        """The answer. Refused with the agent's errno, DeadlineExceeded, Unreachable."""
        return self._ask(self.number(), verb, words, seconds)

    def process(self, verb: str, words: Words, seconds: float = 15.0) -> tuple[Values, Stream]:
        """RUN or EXEC: the answer, and the stream of the process."""
        stream = Stream(self, self.number())
        with self._lock:
            self._streams[stream.number] = stream
        try:
            return self._ask(stream.number, verb, words, seconds), stream
        except BaseException:
            with self._lock:
                self._streams.pop(stream.number, None)
            raise

    def calls(self, requests: Sequence[tuple[str, Words]], seconds: float) -> None:
        """One after another, without waiting for the answers in between. Raises as `call` for the first that failed."""
        sent = []
        try:
            for verb, words in requests:
                number = self.number()
                sent.append((number, verb, self._send(number, verb, words)))
            for number, verb, answer in sent:
                self._answer(number, verb, answer, seconds)
        finally:
            with self._lock:
                for number, _, _ in sent:
                    self._waiting.pop(number, None)

    def _ask(self, number: int, verb: str, words: Words | None, seconds: float) -> Values:
        return self._answer(number, verb, self._send(number, verb, words), seconds)

    def _send(self, number: int, verb: str, words: Words | None) -> _Answer:
        answer: _Answer = queue.SimpleQueue()
        with self._lock:
            if self.lost:
                raise Unreachable(self.lost)
            self._waiting[number] = answer
        try:
            self.send(protocol.frame(Type.REQ, number, protocol.request(verb, words)))
        except BaseException:
            with self._lock:
                self._waiting.pop(number, None)
            raise
        return answer

    def _answer(self, number: int, verb: str, answer: _Answer, seconds: float) -> Values:
        try:
            payload = answer.get(timeout=seconds)
        except queue.Empty:
            raise DeadlineExceeded(f"{verb}: the guest did not answer within {seconds:g} s") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if payload is None:
            raise Unreachable(self.lost)
        errno, values = protocol.parse_response(payload)
        if errno:
            raise Refused(errno, values.text("step") or verb)
        return values

    def send(self, data: bytes) -> None:
        """One or more whole frames. Unreachable when the connection is over."""
        try:
            with self._sending:
                self._socket.sendall(data)
        except BlockingIOError:
            self._end(f"the guest took nothing for {SEND_SECONDS} s")
            raise Unreachable(self.lost) from None
        except OSError as error:
            self._end(f"the guest is gone: {error}")
            raise Unreachable(self.lost) from error

    def close(self) -> None:
        self._end("closed")

    def _end(self, why: str) -> None:
        with self._lock:
            if not self.lost:
                self.lost = why
            waiting, streams = list(self._waiting.values()), list(self._streams.values())
            self._streams.clear()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the agent's connection was gone already")
        self._greeting.put(None)
        for answer in waiting:
            answer.put(None)
        for stream in streams:
            stream.end(None)

    def _read(self, hello: bytes) -> None:
        parser = Parser(Side.GUEST)
        try:
            if hello:
                for frame in parser.feed(protocol.frame(Type.HELLO, 0, hello)):
                    self._took(frame)
            while data := self._socket.recv(1 << 18):
                for frame in parser.feed(data):
                    self._took(frame)
            self._end("the guest closed the connection")
        except (OSError, EngineError) as error:
            self._end(str(error))

    def _took(self, frame: Frame) -> None:
        if frame.type is Type.HELLO:
            self.hello = frame.payload
            self._greeting.put(protocol.parse_hello(frame.payload))
            return
        with self._lock:
            answer = self._waiting.get(frame.stream) if frame.type is Type.RESP else None
            stream = self._streams.get(frame.stream)
            if stream is not None and frame.type is Type.EXIT:
                del self._streams[frame.stream]
        if answer is not None:
            answer.put(frame.payload)
        elif stream is not None and frame.type is not Type.RESP:
            stream.took(frame)
        elif not self._foreign(frame) and frame.type is not Type.RESP:  # an answer may come after its deadline
            raise ProtocolError(f"{frame.type.name} on the stream {frame.stream}, which nobody has")
