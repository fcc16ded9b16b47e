"""The streams of a connection to a guest's agent (client.py): what has come on each, and the credit both sides have.

Floor 2. Only here: what a stream is while it lasts, from its answer to its end. What has come is guarded by the
connection's lock; a stream has one reader and one writer at a time. Nothing waits longer than its deadline (seconds).
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from engine.errors import RuntimeFailure
from engine.runtimes.vm import protocol
from engine.runtimes.vm.protocol import Credit, Frame, ProtocolError, Type, Values

DEADLINE = 10.0
KEEPS = frozenset({"RUN", "EXEC", "DIAL"})  # verbs whose stream lives on after the answer

Late = Callable[[], None] | None


class Data(NamedTuple):
    flag: int  # STDOUT (also of a terminal or a dialled port) or STDERR
    data: bytes


class End(NamedTuple):
    flag: int


class Exit(NamedTuple):
    code: int
    oom: bool
    signaled: bool


Event = Data | End | Exit


class Connection(Protocol):
    """What a stream needs of the client it belongs to."""

    state: threading.Condition  # guards what is pending

    @property
    def closed(self) -> bool: ...
    def wait_for(self, ready: Callable[[], bool], until: float, what: str) -> None: ...
    def send(self, data: bytes, until: float) -> None: ...
    def drop(self, number: int) -> None: ...  # the stream is over; called with `state` held


class Pending:
    """What one stream waits for. Guarded by the connection's lock."""

    def __init__(self, verb: str, late: Late = None, answer: tuple[int, Values] | None = None) -> None:
        self.verb, self.late, self.answer = verb, late, answer
        self.keeps = verb in KEEPS
        self.abandoned = False
        self.events: collections.deque[Event] = collections.deque()
        self.incoming = Credit()  # of the guest
        self.outgoing = Credit()  # ours
        self.owed = 0  # taken by the reader, not yet given back as credit
        self.ends: set[int] = set()
        self.ended_input = False
        self.over = False

    def take(self, frame: Frame) -> bool:
        """A frame after the answer; whether the stream is over. ProtocolError for what was not to come."""
        if frame.type is Type.DATA:
            if frame.flag in self.ends:
                raise ProtocolError("DATA after its END")
            self.incoming.take(len(frame.payload))
            self.events.append(Data(frame.flag, frame.payload))
        elif frame.type is Type.END:
            if frame.flag in self.ends:
                raise ProtocolError("a second END")
            self.ends.add(frame.flag)
            self.events.append(End(frame.flag))
            return self.settled()
        elif frame.type is Type.EXIT:
            code, bits = protocol.parse_exit(frame.payload)
            self.events.append(Exit(code, bool(bits & protocol.OOM), bool(bits & protocol.SIGNALED)))
            self.over = True
            return True
        else:
            self.outgoing.give(protocol.parse_credit(frame.payload))
        return False

    def settled(self) -> bool:
        """Whether both directions of a dialled port have ended; it is over then."""
        done = self.verb == "DIAL" and self.ended_input and bool(self.ends)
        self.over = self.over or done
        return done


class Stream:
    """Of a process or a dialled port. One reader and one writer at a time."""

    def __init__(self, connection: Connection, number: int, pending: Pending) -> None:
        self._connection, self.number, self._pending = connection, number, pending

    def next(self, *, deadline: float | None = None) -> Event | None:
        """The next event; None after the last. What is taken here is what the guest may send anew."""
        connection, pending = self._connection, self._pending
        until = time.monotonic() + (deadline if deadline is not None else 1e9)
        connection.wait_for(lambda: bool(pending.events) or pending.over, until, "output of the guest")
        with connection.state:
            if not pending.events:
                return None
            event = pending.events.popleft()
            if not isinstance(event, Data) or pending.over:
                return event
            pending.owed += len(event.data)
            if pending.owed < protocol.WINDOW // 4:  # the guest has the rest of its window meanwhile
                return event
            count, pending.owed = pending.owed, 0
            pending.incoming.give(count)
        if not connection.closed:
            connection.send(protocol.credit(self.number, count), max(until, time.monotonic() + DEADLINE))
        return event

    def write(self, data: bytes, *, deadline: float | None = DEADLINE) -> None:
        """Blocks while the guest does not read. BrokenPipeError once the process has ended."""
        connection, pending = self._connection, self._pending
        until = time.monotonic() + (deadline if deadline is not None else 1e9)
        view = memoryview(data)
        while view:
            connection.wait_for(lambda: pending.outgoing.left > 0 or pending.over, until, "room for input")
            with connection.state:
                if pending.over:
                    raise BrokenPipeError("the process has ended")
                count = min(pending.outgoing.left, len(view), protocol.BULK)
                pending.outgoing.take(count)
            connection.send(protocol.frame(Type.DATA, self.number, bytes(view[:count])), until)
            view = view[count:]

    def end_input(self, *, deadline: float | None = DEADLINE) -> None:
        connection, pending = self._connection, self._pending
        with connection.state:
            if pending.over or pending.ended_input:
                return
            pending.ended_input = True
        until = time.monotonic() + (deadline if deadline is not None else 1e9)
        connection.send(protocol.frame(Type.END, self.number), until)
        with connection.state:
            if pending.settled():
                connection.drop(self.number)

    def wait(self, *, deadline: float = 3600.0) -> tuple[Exit, bytes, bytes]:
        """Everything to the end: exit, stdout, stderr. For processes with little output."""
        until = time.monotonic() + deadline
        out: dict[int, bytearray] = {protocol.STDOUT: bytearray(), protocol.STDERR: bytearray()}
        while True:
            event = self.next(deadline=max(0.0, until - time.monotonic()))
            if isinstance(event, Data):
                out[event.flag] += event.data
            elif isinstance(event, Exit):
                return event, bytes(out[protocol.STDOUT]), bytes(out[protocol.STDERR])
            elif event is None:
                raise RuntimeFailure("the stream ended without an exit")
