"""Rendered pieces that followers share: each byte is rendered once, and what is kept is bounded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from engine import logindex
from engine.logformat import JSONL, STDOUT, log_line, render
from engine.logindex import Segment
from engine.logpieces import Pieces
from engine.logs import ContainerLogs


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that is rendered from now on."""
    sizes: list[int] = []

    def counted(view: str, piece: bytes) -> bytes:
        sizes.append(len(piece))
        return render(view, piece)

    monkeypatch.setattr(logindex, "render", counted)
    return sizes


def lines(first: int, end: int) -> bytes:
    return b"".join(log_line("stdout", f"line {number} {'x' * 60}", 0) for number in range(first, end))


def contents(raw: bytes) -> bytes:
    return b"".join(line[45:] + b"\n" for line in raw.splitlines())


@pytest.mark.parametrize("view", [STDOUT, JSONL])
def test_many_followers_of_a_growing_log_cost_one_rendering(tmp_path: Path, rendered: list[int], view: str) -> None:
    logs, raw = ContainerLogs(tmp_path), b""
    seen = [b""] * 20
    for number in range(0, 3000, 100):
        more = lines(number, number + 100)
        raw += more
        with logs.current.open("ab") as file:
            file.write(more)
        for follower, text in enumerate(seen):
            seen[follower] = text + logs.read(view, len(text), 1 << 20)
    assert set(seen) == {render(view, raw)} and (view == JSONL or seen[0] == contents(raw))
    times = 2 if view == JSONL else 1  # measuring all.jsonl is rendering it
    assert sum(rendered) <= times * len(raw)
    logs.close()


def test_pieces_are_bounded_and_forgotten(tmp_path: Path, rendered: list[int]) -> None:
    def segment(name: str) -> Segment:
        path = tmp_path / name
        path.write_bytes(lines(0, 3000))
        made = Segment(path, 1)
        while made.advance():
            pass
        return made

    def whole(segment: Segment) -> bytes:
        marks = sorted({*segment.marks, segment.raw})
        return b"".join(pieces.get(segment, STDOUT, start, end) for start, end in pairwise(marks))

    one, two = segment("one"), segment("two")
    pieces = Pieces(most=2 * one.sizes[STDOUT])
    assert whole(one) == whole(two) == contents(lines(0, 3000))
    once = sum(rendered)
    assert whole(one) and whole(two) and sum(rendered) == once, "both fit, and nothing is rendered again"
    pieces.forget([one])
    assert whole(two) and sum(rendered) == once
    assert whole(one) and sum(rendered) == once + one.raw
    small = Pieces(most=one.sizes[STDOUT] // 2)
    for start, end in pairwise(one.marks):
        small.get(one, STDOUT, start, end)
    assert 0 < small.size <= one.sizes[STDOUT] // 2
    small.forget([one])
    assert small.size == 0
    one.close()
    two.close()
