"""A connection to the agent of a guest: calls with deadlines, and streams (streams.py), over any connected socket.

Floor 2. What is only here: which stream belongs to which call. Thread-safe: any thread may call, read or write; one
thread of the client reads the socket. Closing, by either side or for a broken rule, wakes everybody with the reason.
Nothing waits longer than its deadline (seconds); an answer that comes later is dropped.

Errors: GuestError (an OSError with the guest's errno) where the agent refused; DeadlineExceeded; ProtocolError when the
agent broke the protocol; RuntimeFailure when the connection ended.
"""

from __future__ import annotations

import collections
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from engine.errors import DeadlineExceeded, EngineError, RuntimeFailure
from engine.runtimes.vm import protocol
from engine.runtimes.vm.protocol import Frame, Parser, ProtocolError, Side, Type, Values, Words
from engine.runtimes.vm.streams import DEADLINE, KEEPS, Late, Pending, Stream

FORWARD_SECONDS = 15.0  # for a frame to be taken by the guest's port
RECEIVE = 256 << 10


class GuestError(OSError):
    """The agent refused a request: the guest's errno, and what it was doing."""

    def __init__(self, number: int, verb: str, step: str) -> None:
        super().__init__(number, f"{verb}: {step}: {os.strerror(number)}" if step else f"{verb}: {os.strerror(number)}")
        self.verb, self.step = verb, step

    @property
    def reason(self) -> str:
        """As an EngineError has it."""
        text = os.strerror(self.errno or 0)
        return f"{self.step}: {text}" if self.step else f"{self.verb}: {text}"


class AgentClient:
    """Over `sock`, whose first frame is the agent's HELLO. The client owns the socket from here on."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        deadline: float | None = DEADLINE,
        foreign: Callable[[Frame], bool] = lambda frame: False,
        hello: bytes = b"",
        run: int = 0,
    ) -> None:
        """`deadline` None: HELLO is waited for by `greet` alone. `foreign` is shown, on the reading thread, frames of
        streams that are not this client's; False: they are nobody's, which is refused. `hello`: the HELLO of a guest
        that has said it before, to somebody else, who had the RUN on the stream `run` answered."""
        self._sock = sock
        self._foreign = foreign
        sock.setblocking(False)
        self._parser = Parser(Side.GUEST)
        self.state = threading.Condition()  # guards all below but the sending
        self._streams: dict[int, Pending] = {}
        self._pings: dict[int, bool] = {}
        self._next = run
        self.running: Stream | None = None
        if run:
            self._streams[run] = pending = Pending("RUN", None, (0, Values(())))
            self.running = Stream(self, run, pending)
        self._hello: Values | None = None
        self.greeting = b""  # HELLO as it came
        self._failure: EngineError | None = None
        self._sending = threading.Lock()  # guards _unsent and the order of frames
        self._unsent = bytearray()  # the rest of a frame whose sender ran out of time
        self._wake, self._woken = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(hello,), name="agent-reader", daemon=True)
        self._reader.start()
        if deadline is None:
            return
        try:
            self.greet(deadline)
        except BaseException:
            self.close()
            raise

    def greet(self, deadline: float) -> Values:
        """HELLO, once it has come."""
        self.wait_for(lambda: self._hello is not None, time.monotonic() + deadline, "the agent's hello")
        return self.hello

    @property
    def hello(self) -> Values:
        assert self._hello is not None
        return self._hello

    @property
    def closed(self) -> bool:
        return self._failure is not None

    @property
    def lost(self) -> str:
        """Why the connection is over; empty while it is not."""
        return "" if self._failure is None else self._failure.reason

    def close(self, reason: str = "the connection to the guest's agent was closed") -> None:
        """Idempotent; wakes who waits. Does not wait for the reader when called by it."""
        self._fail(RuntimeFailure(reason))
        if threading.current_thread() is not self._reader:
            self._reader.join()

    # ---- calls

    def call(self, verb: str, words: Words | None = None, *, deadline: float = DEADLINE, late: Late = None) -> Values:
        """One request and its answer. Not for verbs that keep their stream. `late` is called on the reading thread when
        the guest has answered, also after the deadline; not when the connection ends before. It may not wait."""
        assert verb not in KEEPS
        return self._ask(Pending(verb, late), words, deadline)[1]

    def open(self, verb: str, words: Words | None = None, *, deadline: float = DEADLINE) -> tuple[Stream, Values]:
        """RUN, EXEC or DIAL: the stream of the process or connection, and the answer."""
        assert verb in KEEPS
        pending = Pending(verb)
        number, values = self._ask(pending, words, deadline)
        return Stream(self, number, pending), values

    def ping(self, *, deadline: float = DEADLINE) -> float:
        """Seconds of one round trip."""
        until = time.monotonic() + deadline
        began = time.monotonic()
        with self.state:
            number = self._number()
            self._pings[number] = False
        self.send(protocol.frame(Type.PING, number, b"ping"), until)  # failed, it stays taken: a PONG may come
        self.wait_for(lambda: self._pings[number], until, "the agent's answer to a ping")
        with self.state:
            del self._pings[number]
        return time.monotonic() - began

    def calls(self, requests: Sequence[tuple[str, Words]], *, deadline: float = DEADLINE) -> None:
        """One after another, without waiting for the answers in between; each has `deadline` seconds. Raises as `call`
        for the first that failed."""
        asked: collections.deque[tuple[int, Pending]] = collections.deque()
        try:
            for verb, words in requests:
                pending = Pending(verb)
                asked.append((self.request(pending, words, time.monotonic() + deadline), pending))
            while asked:
                self.answer(*asked.popleft(), time.monotonic() + deadline)
        finally:
            for number, pending in asked:  # nobody waits for these any more
                self.abandon(number, pending)

    def _ask(self, pending: Pending, words: Words | None, deadline: float) -> tuple[int, Values]:
        until = time.monotonic() + deadline
        number = self.request(pending, words, until)
        return number, self.answer(number, pending, until)

    def request(self, pending: Pending, words: Words | None, until: float) -> int:
        payload = protocol.request(pending.verb, words)
        with self.state:
            number = self._number()
            self._streams[number] = pending
        try:
            self.send(protocol.frame(Type.REQ, number, payload), until)
        except DeadlineExceeded:
            self.abandon(number, pending)
            raise
        return number

    def answer(self, number: int, pending: Pending, until: float) -> Values:
        try:
            self.wait_for(lambda: pending.answer is not None, until, f"the agent's answer to {pending.verb}")
        except DeadlineExceeded:
            self.abandon(number, pending)
            raise
        assert pending.answer is not None
        error, values = pending.answer
        if error or not pending.keeps:
            with self.state:
                self._streams.pop(number, None)
        if error:
            raise GuestError(error, pending.verb, values.text("step"))
        return values

    def abandon(self, number: int, pending: Pending) -> None:
        """Its answer may come yet."""
        with self.state:
            pending.abandoned = True
            if pending.answer is not None and not pending.keeps:
                self._streams.pop(number, None)

    def _number(self) -> int:
        if self._failure is not None:
            raise self._failure
        while True:
            self._next = self._next % 0x7FFFFFFF + 1
            if self._next not in self._streams and self._next not in self._pings:
                return self._next

    def wait_for(self, ready: Callable[[], bool], until: float, what: str) -> None:
        with self.state:
            while not ready():
                if self._failure is not None:
                    raise self._failure
                left = until - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(
                        f"{what} did not come in time", hint="the guest may hang; see its console log"
                    )
                self.state.wait(left)

    # ---- for who hands on frames of others (relay.py)

    def number(self) -> int:
        """A stream nobody uses."""
        with self.state:
            return self._number()

    def forward(self, data: bytes, *, deadline: float = FORWARD_SECONDS) -> None:
        """Whole frames of streams that `foreign` knows. When it takes too long, the rest goes before the next."""
        self.send(data, time.monotonic() + deadline)

    # ---- the socket

    def send(self, data: bytes, until: float) -> None:
        """Sends whole frames in order. On DeadlineExceeded the rest of a frame goes before the next."""
        if not self._sending.acquire(timeout=max(0.0, until - time.monotonic())):
            raise DeadlineExceeded("the guest's agent takes nothing")
        try:
            if self._unsent:
                self._push(self._unsent, until)
            view = bytearray(data)
            try:
                self._push(view, until)
            except DeadlineExceeded:
                if len(view) < len(data):
                    self._unsent = view
                raise
        finally:
            self._sending.release()

    def _push(self, data: bytearray, until: float) -> None:
        """Sends from the front of `data` and takes away what went."""
        while data:
            if self._failure is not None:
                raise self._failure
            try:
                count = self._sock.send(data)
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded("the guest's agent takes nothing") from None
                poll = select.poll()
                with suppress(ValueError):  # the reader has closed it: why, is said above
                    poll.register(self._sock, select.POLLOUT)
                    poll.poll(min(left, 0.5) * 1000)  # a close is noticed soon
            except OSError as error:
                self._fail(RuntimeFailure(f"the connection to the guest's agent broke: {error}"))
            else:
                del data[:count]

    def _read(self, hello: bytes) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            if hello:
                self._feed(protocol.frame(Type.HELLO, 0, hello))
            while self._failure is None:
                poll.poll()
                try:
                    data = self._sock.recv(RECEIVE)
                except BlockingIOError:
                    continue
                if not data:
                    raise RuntimeFailure("the guest's agent closed the connection")
                self._feed(data)
        except EngineError as error:
            self._fail(error)
        except OSError as error:
            self._fail(RuntimeFailure(f"the connection to the guest's agent broke: {error}"))
        finally:
            self._sock.close()
            os.close(self._wake)

    def _feed(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            with self.state:
                mine = frame.type is Type.HELLO or frame.stream in self._streams or frame.stream in self._pings
                if mine:
                    self._take(frame)
                    self.state.notify_all()
            if not mine and not self._foreign(frame):  # not under the lock
                raise ProtocolError(f"{frame.type.name} on the stream {frame.stream}, which nobody has")

    def _fail(self, error: EngineError) -> None:
        with self.state:
            if self._failure is None:
                self._failure = error
                os.close(self._woken)
            self.state.notify_all()

    def _take(self, frame: Frame) -> None:
        """One frame of the guest, under the lock. ProtocolError for what was not to come."""
        if frame.type is Type.HELLO:
            self.greeting, self._hello = frame.payload, protocol.parse_hello(frame.payload)
            return
        if frame.type is Type.PONG:
            if self._pings.get(frame.stream, True):
                raise ProtocolError("a PONG nobody asked for")
            self._pings[frame.stream] = True
            return
        pending = self._streams.get(frame.stream)
        if pending is None:
            raise ProtocolError(f"{frame.type.name} on the stream {frame.stream} of a ping")
        if frame.type is Type.RESP:
            if pending.answer is not None:
                raise ProtocolError(f"a second answer to {pending.verb}")
            pending.answer = protocol.parse_response(frame.payload)
            if pending.late is not None:
                pending.late()
            if pending.abandoned and (not pending.keeps or pending.answer[0]):
                del self._streams[frame.stream]
            return
        if not pending.keeps or pending.answer is None:
            raise ProtocolError(f"{frame.type.name} on the stream of {pending.verb}")
        if pending.take(frame):
            self.drop(frame.stream)

    def drop(self, number: int) -> None:
        """A stream that is over. The lock is held."""
        self._streams.pop(number, None)
