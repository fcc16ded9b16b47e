"""Frames and words of the guest's agent: what is whole comes out, what breaks a rule ends the connection by name."""

from __future__ import annotations

import random
import struct

import pytest

from engine.runtimes.vm import protocol, verbs
from engine.runtimes.vm.protocol import Parser, ProtocolError, Side, Type, frame

HELLO = frame(Type.HELLO, 0, protocol.pack_words([b"version=1"]))


def test_frames_come_out_however_the_bytes_are_cut() -> None:
    stream = HELLO + frame(Type.RESP, 3, protocol.response(2, {"step": "open"})) + frame(Type.DATA, 4, b"x" * 9000, 2)
    stream += frame(Type.END, 4, flag=2) + frame(Type.EXIT, 4, protocol.EXITED.pack(137, protocol.OOM))
    whole = list(Parser(Side.GUEST).feed(stream))
    assert [item.type for item in whole] == [Type.HELLO, Type.RESP, Type.DATA, Type.END, Type.EXIT]
    chance = random.Random(1)
    for _ in range(20):
        parser, out, at = Parser(Side.GUEST), [], 0
        while at < len(stream):
            step = chance.choice((1, 5, 12, 13, 4096))
            out += parser.feed(stream[at : at + step])
            at += step
        assert out == whole


@pytest.mark.parametrize(
    ("sender", "data", "reason"),
    [
        (Side.GUEST, struct.pack("<IIBBH", 0, 1, 99, 0, 0), "unknown type 99"),
        (Side.GUEST, struct.pack("<IIBBH", 1 << 30, 1, Type.RESP, 0, 0), "RESP of 1073741824 bytes"),
        (Side.GUEST, struct.pack("<IIBBH", 5, 1, Type.REQ, 0, 0), "REQ came from the guest"),
        (Side.GUEST, struct.pack("<IIBBH", 4, 1, Type.RESP, 0, 0), "RESP before HELLO"),
        (Side.GUEST, HELLO + HELLO, "a second HELLO"),
        (Side.GUEST, HELLO + struct.pack("<IIBBH", 4, 0, Type.RESP, 0, 0), "RESP on the stream 0"),
        (Side.GUEST, HELLO + struct.pack("<IIBBH", 4, 1, Type.RESP, 0, 7), "7 in the reserved field"),
        (Side.GUEST, HELLO + struct.pack("<IIBBH", 4, 1, Type.DATA, 0, 0), "DATA with the flag 0"),
        (Side.HOST, struct.pack("<IIBBH", 4, 1, Type.DATA, 1, 0), "DATA with the flag 1"),
        (Side.HOST, struct.pack("<IIBBH", 8, 1, Type.EXIT, 0, 0), "EXIT came from the host"),
    ],
)
def test_a_broken_rule_is_named_and_final(sender: Side, data: bytes, reason: str) -> None:
    parser = Parser(sender)
    with pytest.raises(ProtocolError, match=reason):
        list(parser.feed(data))
    with pytest.raises(ProtocolError, match=reason):
        list(parser.feed(HELLO))


def test_a_header_alone_decides_and_nothing_is_kept_for_it() -> None:
    """A frame that announces too much is refused before its payload is waited for."""
    parser = Parser(Side.HOST)
    with pytest.raises(ProtocolError):
        list(parser.feed(struct.pack("<IIBBH", protocol.MAX_PAYLOAD + 1, 1, Type.REQ, 0, 0)))


def test_words_fill_their_payload_exactly() -> None:
    assert protocol.unpack_words(protocol.pack_words([b"a", b"", b"c" * 500])) == [b"a", b"", b"c" * 500]
    for payload, reason in (
        (b"\1\0\0", "3 bytes after"),
        (b"\5\0\0\0abcd", "a word of 5 bytes where 4 are left"),
        (b"\xff\xff\xff\xffabcd", "4294967295"),
        (b"\0\0\0\0" * (protocol.MAX_WORDS + 1), "more than"),
    ):
        with pytest.raises(ProtocolError, match=reason):
            protocol.unpack_words(payload)


def test_a_request_is_what_the_table_has() -> None:
    payload = protocol.request("RUN", {"id": "main", "argv": ["sh", "-c", "a=b"], "uid": 7})
    verb, values = protocol.parse_request(payload)
    assert (verb, values.all("argv"), values.number("uid")) == ("RUN", [b"sh", b"-c", b"a=b"], 7)
    with pytest.raises(ProtocolError, match="no verb FLY"):
        protocol.request("FLY")
    with pytest.raises(ProtocolError, match="are allowed"):
        protocol.request("PUT", {"path": "/x", "data": b"x" * protocol.MAX_PAYLOAD})


def test_answers_are_checked() -> None:
    errno, values = protocol.parse_response(protocol.response(0, {"handle": 3, "name": [b"a", b"b"]}))
    assert errno == 0
    assert values.number("handle", most=10) == 3
    with pytest.raises(ProtocolError, match="handle is b'3'"):
        values.number("handle", most=2)
    with pytest.raises(ProtocolError, match="name came 2 times"):
        values.get("name")
    with pytest.raises(ProtocolError, match="size is missing"):
        values.need("size")
    with pytest.raises(ProtocolError, match="the errno -5"):
        protocol.parse_response(struct.pack("<i", -5))
    with pytest.raises(ProtocolError, match="version 9"):
        protocol.parse_hello(protocol.pack_words([b"version=9"]))
    with pytest.raises(ProtocolError, match="the code 256"):
        protocol.parse_exit(struct.pack("<iI", 256, 0))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"\0user.a", b"x" * 256])
def test_an_entry_of_a_directory_has_a_name(name: bytes) -> None:
    with pytest.raises(ProtocolError, match="a directory entry"):
        protocol.parse_entry(bytes(protocol.ATTR.size) + name)
    attr = bytes(protocol.ATTR.size)
    assert protocol.parse_entry(attr + b"\xff")[::2] == (b"\xff", None)
    assert protocol.parse_entry(attr + b"a\0")[::2] == (b"a", ())
    assert protocol.parse_entry(attr + b"a\0user.a\0user.b")[::2] == (b"a", (b"user.a", b"user.b"))
    with pytest.raises(ProtocolError, match="names of xattrs"):
        protocol.parse_entry(attr + b"a\0user.a\0")
    with pytest.raises(ProtocolError, match="times of a directory of 3 bytes"):
        protocol.parse_folder(b"abc")


def test_credit_has_bounds() -> None:
    credit = protocol.Credit()
    credit.take(protocol.WINDOW)
    with pytest.raises(ProtocolError, match="1 bytes of DATA where 0"):
        credit.take(1)
    credit.give(10)
    with pytest.raises(ProtocolError, match="a credit of"):
        credit.give(protocol.WINDOW)


def test_options_of_a_mount() -> None:
    assert verbs.mount_flags(["nosuid", "ro", "rw", "mode=755", "size=65536k"]) == (2, "mode=755,size=65536k")
    assert verbs.mount_flags(["rbind", "rprivate"])[0] == 4096 | 16384 | 1 << 18
