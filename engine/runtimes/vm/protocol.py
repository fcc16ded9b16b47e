"""The protocol between a host and the agent in a guest: frames, words and a strict parser (verbs: verbs.py).

Floor 2. Pure, standard library only. Its other half is guest/*.c; tests/test_1_vm_protocol.py holds the two together.
The guest is hostile: whatever arrives is checked against the bounds below before anything is kept, and a violation is a
`ProtocolError` that names what was wrong; a connection which had one is over.

    frame   = u32 length, u32 stream, u8 type, u8 flag, u16 zero, payload[length]; little-endian, length <= MAX_PAYLOAD
    words   = (u32 length, bytes[length])... to the payload's end, at most MAX_WORDS
    REQ     = words: the verb, then key=value words; a key that repeats makes a list; values are any bytes
    RESP    = i32 errno (0: done; Linux numbers), then key=value words; on an error `step` says what failed
    HELLO   = key=value words: version, build (of the agent's sources), arch, kernel, boot (ms since the guest's start)
    DATA    = bytes; flag 0 to the guest (stdin), 1 stdout or a terminal, 2 stderr from it
    END     = empty; no more DATA with that flag. Host's END closes stdin (of a terminal: nothing)
    EXIT    = i32 code (128 + signal where one ended it), u32 bits (1: the kernel killed for memory, 2: by a signal)
    CREDIT  = u32: that many bytes of DATA more may be sent on the stream by who receives this
    PING    = up to 64 bytes, echoed by PONG

Streams. The host chooses a number (not 0, not in use) for each REQ; RESP comes on the same one and frees it. RUN, EXEC
and DIAL keep theirs for DATA, END, CREDIT; EXIT is its last frame and frees it (DIAL: both ENDs do). Each side may send
WINDOW bytes of DATA per stream (stdout and stderr together) before it needs CREDIT. HELLO has stream 0.
Processes have a name, `id`, chosen by the host; verbs name processes by it, never by the stream.
Requests of different streams may be answered in any order (the file verbs are served by several workers).
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from engine.errors import RuntimeFailure
from engine.runtimes.vm.verbs import VERBS

VERSION = 2
PORT_NAME = "fd.agent"  # of the virtio-serial port
BULK = 128 << 10  # most bytes of one READ, WRITE or DATA
EARLY = 64 << 10  # most bytes that come with OPEN
MAX_PAYLOAD = BULK + (4 << 10)
MAX_WORDS = 8192  # per payload
MAX_PING = 64
WINDOW = 256 << 10  # DATA without credit, per stream and direction
MAX_ID = 64  # bytes of a process's id

HEADER = struct.Struct("<IIBBH")
LENGTH = struct.Struct("<I")
ERRNO = struct.Struct("<i")
EXITED = struct.Struct("<iI")
OOM, SIGNALED = 1, 2


class Type(enum.IntEnum):
    HELLO = 1
    REQ = 2
    RESP = 3
    DATA = 4
    END = 5
    EXIT = 6
    CREDIT = 7
    PING = 8
    PONG = 9


class Side(enum.Enum):
    """Who sent a frame."""

    HOST = "host"
    GUEST = "guest"


STDIN, STDOUT, STDERR = 0, 1, 2  # flags of DATA and END

# mode nlink uid gid rdev_major rdev_minor, dev ino size blocks (of 512), atime mtime ctime in ns
ATTR = struct.Struct("<6I4Q3q")


FOLDER = struct.Struct("<4q")
Folder = tuple[int, int]  # mtime and ctime of a directory, ns


class Attr(NamedTuple):
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev_major: int
    rdev_minor: int
    dev: int
    ino: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class ProtocolError(RuntimeFailure):
    """The other side broke the protocol; the connection is over."""

    def __init__(self, what: str) -> None:
        super().__init__(f"agent protocol: {what}", hint="the guest's agent is damaged or hostile; end the VM")


class Frame(NamedTuple):
    stream: int
    type: Type
    flag: int
    payload: bytes

    def encode(self) -> bytes:
        return HEADER.pack(len(self.payload), self.stream, self.type, self.flag, 0) + self.payload


# type -> (sides that may send it, flags, least and most bytes of payload)
_RULES: Mapping[Type, tuple[frozenset[Side], frozenset[int], int, int]] = {
    Type.HELLO: (frozenset({Side.GUEST}), frozenset({0}), 1, 4096),
    Type.REQ: (frozenset({Side.HOST}), frozenset({0}), LENGTH.size + 1, MAX_PAYLOAD),
    Type.RESP: (frozenset({Side.GUEST}), frozenset({0}), ERRNO.size, MAX_PAYLOAD),
    Type.DATA: (frozenset(Side), frozenset({0, 1, 2}), 1, BULK),
    Type.END: (frozenset(Side), frozenset({0, 1, 2}), 0, 0),
    Type.EXIT: (frozenset({Side.GUEST}), frozenset({0}), EXITED.size, EXITED.size),
    Type.CREDIT: (frozenset(Side), frozenset({0}), LENGTH.size, LENGTH.size),
    Type.PING: (frozenset({Side.HOST}), frozenset({0}), 0, MAX_PING),
    Type.PONG: (frozenset({Side.GUEST}), frozenset({0}), 0, MAX_PING),
}


class Parser:
    """Bytes of one side in, whole checked frames out. Keeps at most one frame. Not thread-safe."""

    def __init__(self, sender: Side) -> None:
        self._sender = sender
        self._buffer = bytearray()
        self._greeted = False  # a guest's first frame is HELLO
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """The frames completed by `data`. ProtocolError at the first that breaks a rule, and at every call after it."""
        view = memoryview(data)
        while True:
            if self._broken is not None:
                raise self._broken
            try:
                missing = self._wanted() - len(self._buffer)
            except ProtocolError as error:
                self._broken = error
                raise
            if missing == 0:
                yield self._take()
            elif len(view) == 0:
                return
            else:
                self._buffer += view[:missing]
                view = view[missing:]

    def _wanted(self) -> int:
        """Bytes of the header, or of the whole frame once the header is there and allowed."""
        if len(self._buffer) < HEADER.size:
            return HEADER.size
        length, stream, number, flag, zero = HEADER.unpack_from(self._buffer)
        try:
            kind = Type(number)
        except ValueError:
            raise ProtocolError(f"a frame of the unknown type {number}") from None
        senders, flags, least, most = _RULES[kind]
        if self._sender not in senders:
            raise ProtocolError(f"{kind.name} came from the {self._sender.value}")
        if not least <= length <= most:
            raise ProtocolError(f"{kind.name} of {length} bytes ({least} to {most} are allowed)")
        if flag not in flags or (kind in (Type.DATA, Type.END) and (flag == 0) != (self._sender is Side.HOST)):
            raise ProtocolError(f"{kind.name} with the flag {flag}")
        if zero:
            raise ProtocolError(f"{kind.name} with {zero} in the reserved field")
        if (stream == 0) != (kind is Type.HELLO):
            raise ProtocolError(f"{kind.name} on the stream {stream}")
        if self._sender is Side.GUEST and (kind is Type.HELLO) == self._greeted:
            raise ProtocolError("a second HELLO" if self._greeted else f"{kind.name} before HELLO")
        return HEADER.size + int(length)

    def _take(self) -> Frame:
        _, stream, number, flag, _ = HEADER.unpack_from(self._buffer)
        payload = bytes(memoryview(self._buffer)[HEADER.size :])
        self._buffer.clear()
        self._greeted = True
        return Frame(stream, Type(number), flag, payload)


def pack_words(words: Iterable[bytes]) -> bytes:
    return b"".join(LENGTH.pack(len(word)) + word for word in words)


def unpack_words(payload: bytes | memoryview, offset: int = 0) -> list[bytes]:
    """The words from `offset` to the end. ProtocolError when they do not fill it exactly or are too many."""
    words: list[bytes] = []
    end = len(payload)
    while offset < end:
        if len(words) == MAX_WORDS:
            raise ProtocolError(f"more than {MAX_WORDS} words")
        if end - offset < LENGTH.size:
            raise ProtocolError(f"{end - offset} bytes after the last word")
        (length,) = LENGTH.unpack_from(payload, offset)
        offset += LENGTH.size
        if length > end - offset:
            raise ProtocolError(f"a word of {length} bytes where {end - offset} are left")
        words.append(bytes(payload[offset : offset + length]))
        offset += length
    return words


class Values:
    """key=value words, looked up by key."""

    def __init__(self, words: Iterable[bytes]) -> None:
        self._values: dict[str, list[bytes]] = {}
        for word in words:
            key, equals, value = word.partition(b"=")
            if not equals or not key or len(key) > 64 or not key.isascii() or not key.decode().isprintable():
                raise ProtocolError(f"not a key=value word: {word[:40]!r}")
            self._values.setdefault(key.decode(), []).append(value)

    def all(self, key: str) -> list[bytes]:
        return list(self._values.get(key, ()))

    def get(self, key: str) -> bytes | None:
        """The one value of `key`; None when it is absent. ProtocolError when it repeats."""
        found = self._values.get(key)
        if found is None:
            return None
        if len(found) > 1:
            raise ProtocolError(f"{key} came {len(found)} times")
        return found[0]

    def need(self, key: str) -> bytes:
        found = self.get(key)
        if found is None:
            raise ProtocolError(f"{key} is missing")
        return found

    def text(self, key: str, default: str = "") -> str:
        """Bytes that are no UTF-8 are escaped: what a guest says is shown, never trusted."""
        found = self.get(key)
        return default if found is None else found.decode(errors="backslashreplace")

    def number(self, key: str, least: int = 0, most: int = (1 << 64) - 1) -> int:
        found = self.need(key)
        digits = found[1:] if found[:1] == b"-" else found
        if not digits.isdigit() or len(digits) > 20 or not least <= int(found) <= most:
            raise ProtocolError(f"{key} is {found[:40]!r}; a number from {least} to {most} was expected")
        return int(found)

    def items(self) -> Iterator[tuple[str, list[bytes]]]:
        return iter(self._values.items())


Value = bytes | str | int | os.PathLike[str]
Words = Mapping[str, "Value | Iterable[Value]"]


def to_bytes(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return b"%d" % value
    return os.fsencode(value)


def fields(*values: Value) -> bytes:
    """The parts of one value, joined by NUL. ProtocolError (ours) when a part holds one."""
    parts = [to_bytes(value) for value in values]
    if any(b"\0" in part for part in parts[:-1]):
        raise ProtocolError(f"a NUL inside {parts!r:.80}")
    return b"\0".join(parts)


def request(verb: str, words: Words | None = None) -> bytes:
    """Payload of a REQ. ProtocolError for a verb that is not in VERBS, or when it is too large."""
    if verb not in VERBS:
        raise ProtocolError(f"no verb {verb}")
    out = [verb.encode()]
    for key, value in (words or {}).items():
        several = isinstance(value, Iterable) and not isinstance(value, bytes | str | os.PathLike)
        for item in value if several else (value,):  # type: ignore[union-attr]
            out.append(key.encode() + b"=" + to_bytes(item))  # type: ignore[arg-type]
    payload = pack_words(out)
    if len(payload) > MAX_PAYLOAD or len(out) > MAX_WORDS:
        raise ProtocolError(f"{verb} has {len(payload)} bytes in {len(out)} words; {MAX_PAYLOAD} are allowed")
    return payload


def parse_request(payload: bytes) -> tuple[str, Values]:
    """Verb and values of a REQ (for tests and tools that play the guest)."""
    words = unpack_words(payload)
    verb = words[0].decode(errors="replace") if words else ""
    if verb not in VERBS:
        raise ProtocolError(f"no verb {verb[:40]!r}")
    return verb, Values(words[1:])


def parse_response(payload: bytes) -> tuple[int, Values]:
    """errno (0..4095) and values of a RESP."""
    (errno,) = ERRNO.unpack_from(payload)
    if not 0 <= errno < 4096:
        raise ProtocolError(f"the errno {errno}")
    return errno, Values(unpack_words(payload, ERRNO.size))


def response(errno: int, words: Words | None = None) -> bytes:
    """Payload of a RESP (for tests and tools that play the guest)."""
    return ERRNO.pack(errno) + request("HELLO", words)[LENGTH.size + len("HELLO") :]


def parse_hello(payload: bytes) -> Values:
    """ProtocolError when the agent speaks another version."""
    values = Values(unpack_words(payload))
    version = values.number("version", most=1 << 31)
    if version != VERSION:
        raise ProtocolError(f"the agent speaks version {version}, this engine {VERSION}; make the initfs again")
    return values


def parse_exit(payload: bytes) -> tuple[int, int]:
    """Exit code (0..255) and bits (OOM, SIGNALED)."""
    code, bits = EXITED.unpack(payload)
    if not 0 <= code <= 255 or bits & ~(OOM | SIGNALED):
        raise ProtocolError(f"EXIT with the code {code} and the bits {bits:#x}")
    return code, bits


def parse_attr(data: bytes) -> Attr:
    if len(data) != ATTR.size:
        raise ProtocolError(f"attributes of {len(data)} bytes")
    return Attr(*ATTR.unpack(data))


def parse_names(data: bytes) -> tuple[bytes, ...]:
    """Names of xattrs, joined by NUL."""
    names = tuple(data.split(b"\0")) if data else ()
    if any(not 0 < len(name) < 256 for name in names):
        raise ProtocolError(f"names of xattrs that are none: {data[:40]!r}")
    return names


def parse_entry(data: bytes) -> tuple[bytes, Attr, tuple[bytes, ...] | None]:
    """One entry of LIST and the names of its xattrs, where they are known. ProtocolError for a name that is none (it
    would be shown in a tree of the host)."""
    name, known, names = data[ATTR.size :].partition(b"\0")
    if not name or len(name) > 255 or name in (b".", b"..") or b"/" in name:
        raise ProtocolError(f"a directory entry named {name[:40]!r}")
    return name, parse_attr(data[: ATTR.size]), parse_names(names) if known else None


def parse_page(values: Values) -> tuple[list[tuple[bytes, Attr, tuple[bytes, ...] | None]], bytes | None]:
    """What LIST answers: entries, and the handle when there are more. ProtocolError for a page of none that is not the
    last: those could come for ever."""
    entries, handle = [parse_entry(data) for data in values.all("entry")], values.get("handle")
    if handle is not None and not entries:
        raise ProtocolError("a listing that goes on after no entries")
    return entries, handle


def parse_folder(data: bytes) -> tuple[Folder, Folder]:
    """FOLDER: before and after."""
    if len(data) != FOLDER.size:
        raise ProtocolError(f"times of a directory of {len(data)} bytes")
    times = FOLDER.unpack(data)
    return times[:2], times[2:]


class Credit:
    """What may still be sent on a stream, or what a peer may still send. Not thread-safe."""

    def __init__(self, left: int = WINDOW) -> None:
        self.left = left

    def take(self, count: int) -> None:
        """ProtocolError when the peer sent more than it may."""
        if count > self.left:
            raise ProtocolError(f"{count} bytes of DATA where {self.left} were allowed")
        self.left -= count

    def give(self, count: int) -> None:
        if count == 0 or self.left + count > WINDOW:
            raise ProtocolError(f"a credit of {count} bytes above the {self.left} of {WINDOW} that are left")
        self.left += count


def parse_credit(payload: bytes) -> int:
    return int.from_bytes(payload, "little")


def frame(kind: Type, stream: int, payload: bytes = b"", flag: int = 0) -> bytes:
    return Frame(stream, kind, flag, payload).encode()


def credit(stream: int, count: int) -> bytes:
    return frame(Type.CREDIT, stream, LENGTH.pack(count))
