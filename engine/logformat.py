r"""The CRI log format, and the three texts it is shown as. Floor 1, pure.

A record is one line, `TIME STREAM TAG CONTENT\n`: TIME RFC 3339 with nanoseconds, STREAM stdout or stderr, TAG F (a
whole line) or P (a part of one, without its newline); tags may follow after ':'. Source: kubernetes' design proposal
"kubelet: CRI logging", and conmon src/ctr_logging.c: its header is always 45 bytes, its parts hold at most 8 KiB.

    stdout, stderr   the contents of that stream; a newline after each F, none after a P
    all.jsonl        one JSON object per record, in arrival order: time, stream, line, and partial: true for a P;
                     bytes that are not UTF-8 become U+FFFD

A line that is no record (torn when a disk was full) shows as nothing. Works on pieces of whole lines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from json.encoder import encode_basestring as _quoted

STDOUT, STDERR, JSONL = "stdout", "stderr", "all.jsonl"
VIEWS = (STDOUT, STDERR, JSONL)

_TAG = slice(35, 45)  # of conmon's fixed header
_OUT_F, _OUT_P, _ERR_F, _ERR_P = b" stdout F ", b" stdout P ", b" stderr F ", b" stderr P "
_OUT, _ERR = frozenset((_OUT_F, _OUT_P)), frozenset((_ERR_F, _ERR_P))
_FIXED = _OUT | _ERR
_OUTPUT, _ERROR = ',"stream":"stdout","line":', ',"stream":"stderr","line":'
_ANY = re.compile(rb"([0-9TZ:.+-]{10,40}) (stdout|stderr) ([FP])(?::[^ ]*)? ", re.ASCII)


def parse(line: bytes) -> tuple[bytes, bool, bool, bytes] | None:
    """(time, is stderr, is partial, content) of one line without its newline; None when it is no record."""
    tag = line[_TAG]
    if tag in _FIXED:
        return line[:35], tag[4] == 101, tag[8] == 80, line[45:]  # 'e' of stderr, 'P'
    match = _ANY.match(line)
    if match is None:
        return None
    return match[1], match[2] == b"stderr", match[3] == b"P", line[match.end() :]


def measure(piece: bytes) -> tuple[int, int]:
    """How many bytes of stdout and of stderr a piece (whole lines) holds."""
    lines = piece.split(b"\n")
    lines.pop()
    tags = [line[_TAG] for line in lines]
    kinds = set(tags)
    if kinds <= _OUT:  # nearly always
        return len(piece) - 45 * len(lines) - (tags.count(_OUT_P) if _OUT_P in kinds else 0), 0
    if kinds <= _ERR:
        return 0, len(piece) - 45 * len(lines) - (tags.count(_ERR_P) if _ERR_P in kinds else 0)
    if kinds <= _FIXED:
        found = [len(line) for line, tag in zip(lines, tags, strict=True) if tag in _OUT]
        out = sum(found) - 44 * len(found) - tags.count(_OUT_P)
        return out, len(piece) - 45 * len(lines) - tags.count(_OUT_P) - tags.count(_ERR_P) - out
    out = err = 0
    for line in lines:
        record = parse(line)
        if record is not None:
            size = len(record[3]) + (not record[2])
            if record[1]:
                err += size
            else:
                out += size
    return out, err


def render(view: str, piece: bytes) -> bytes:
    """The text of `view` for a piece (whole lines)."""
    lines = piece.split(b"\n")
    lines.pop()
    if view == JSONL:
        return _json_lines(lines)
    tags = [line[_TAG] for line in lines]
    kinds = set(tags)
    if not kinds <= _FIXED:
        return b"".join(_contents(lines, view == STDERR))
    own, part = (_OUT, _OUT_P) if view == STDOUT else (_ERR, _ERR_P)
    if not kinds <= own:
        lines = [line for line, tag in zip(lines, tags, strict=True) if tag in own]
        tags = [tag for tag in tags if tag in own]
    contents = [line[45:] for line in lines]
    out, start = [], 0
    for _ in range(tags.count(part) if part in kinds else 0):  # conmon cuts about one line in 8 KiB
        cut = tags.index(part, start) + 1
        out.append(b"\n".join(contents[start:cut]))
        start = cut
    if start < len(contents):
        out.append(b"\n".join(contents[start:] if start else contents))
        out.append(b"\n")
    return b"".join(out)


def _contents(lines: list[bytes], error: bool) -> Iterator[bytes]:
    for line in lines:
        record = parse(line)
        if record is not None and record[1] == error:
            yield record[3]
            if not record[2]:
                yield b"\n"


def _json_lines(lines: list[bytes]) -> bytes:
    out = []
    for line in lines:
        record = parse(line)
        if record is not None:
            time, error, partial, content = record
            out.append('{"time":')
            out.append(_quoted(time.decode("ascii", "replace")))
            out.append(_ERROR if error else _OUTPUT)
            out.append(_quoted(content.decode("utf-8", "replace")))
            out.append(',"partial":true}\n' if partial else "}\n")
    return "".join(out).encode()


def log_line(stream: str, text: str, moment_ns: int | None = None) -> bytes:
    """One record of the CRI log format as conmon writes it (kubernetes KEP: CRI logging; UTC, nanoseconds)."""
    now = time.time_ns() if moment_ns is None else moment_ns
    seconds = datetime.fromtimestamp(now // 10**9, UTC)
    return f"{seconds:%Y-%m-%dT%H:%M:%S}.{now % 10**9:09d}+00:00 {stream} F {text}\n".encode()
