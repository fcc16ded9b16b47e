"""The journal stays bounded, and nobody who reads it is disturbed: offsets, numbers, followers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.events import Event, Journal, Missed
from engine.retention import Retention
from engine.store.meta import Meta
from engine.store.policy import Policy
from fdfs.entry import File
from fdfs.handles import Reader


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    meta = Meta(tmp_path / "db.sqlite")
    meta._writer.execute("PRAGMA synchronous=OFF")
    yield meta
    meta.close()


def fill(meta: Meta, journal: Journal, count: int, objects: int = 3) -> None:
    with meta.tx():
        for number in range(count):
            journal.append("n", f"volume/{number % objects}", {"n": number, "pad": "x" * (number * 7 % 50)})


def keeping(meta: Meta, journal: Journal, most: int | None, age: float | None = None) -> Retention:
    return Retention(meta, journal, lambda: Policy(events_max=most, events_max_age=age))


def reader(journal: Journal, object: str | None = None) -> Reader:
    row = File(
        name="events",
        doc="events",
        read=lambda engine, offset, size: journal.read(offset, size, object),
        size=lambda engine: journal.size(object),
        first=lambda engine: journal.first(object),
    )
    return Reader(None, row, ())


def cat(handle: Reader, step: int = 300) -> bytes:
    out = b""
    while part := handle.read(step, len(out)):
        out += part
    return out


def test_the_oldest_go_and_no_offset_changes(meta: Meta) -> None:
    journal = Journal(meta)
    fill(meta, journal, 2000)
    before = journal.read(0, 1 << 30)
    mine = journal.read(0, 1 << 30, "volume/1")
    assert keeping(meta, journal, 300).prune() == 1700
    for seen in (journal, Journal(meta)):  # as it is, and after a restart
        first = seen.first()
        assert seen.kept == (1701, first) and seen.size() == len(before)
        assert seen.read(first, 1 << 30) == before[first:]
        assert seen.read(0, 1 << 30) == b"\n" * first + before[first:]
        assert seen.read(first - 10, 30) == b"\n" * 10 + before[first : first + 20]
        own = seen.first("volume/1")
        assert own and seen.size("volume/1") == len(mine)
        assert seen.read(own, 1 << 30, "volume/1") == mine[own:]
        assert json.loads(before[first:].splitlines()[0])["seq"] == 1701
        assert [event.seq for event in seen.replay(0, 5)] == [1701, 1702, 1703, 1704, 1705]
    assert journal.append("n", "volume/1", {}) == 2001


def test_age_and_no_limit(meta: Meta) -> None:
    journal = Journal(meta)
    fill(meta, journal, 10)
    meta._writer.execute("UPDATE events SET time_ns = seq * 1000000000")
    assert keeping(meta, journal, None, None).prune(10**18) == 0
    assert keeping(meta, journal, None, 5.0).prune(10 * 10**9) == 4
    assert keeping(meta, journal, None, 0.0).prune(10**18) == 5  # the newest of all stays
    assert journal.kept[0] == journal.last == 10


def test_what_still_exists_goes_on_where_it_was(meta: Meta) -> None:
    journal = Journal(meta)
    journal.append("volumeCreated", "volume/quiet", {})
    journal.append("containerCreated", "container/gone", {})
    journal.append("jobStarted", "job/1", {})
    fill(meta, journal, 50)
    size = journal.size("volume/quiet")
    retention = keeping(meta, journal, 10)
    retention.prune()
    assert journal.size("volume/quiet") == size and b"volumeCreated" in cat(reader(journal, "volume/quiet"))
    assert journal.size("container/gone") == journal.size("job/1") == 0
    journal.append("volumeUsed", "volume/quiet", {})
    fill(meta, journal, 50)
    retention.prune()
    assert journal.first("volume/quiet") == size and journal.size("volume/quiet") > size
    assert meta.query("SELECT count(*) AS n FROM events WHERE seq < ?", (journal.kept[0],))[0]["n"] == 1


def test_who_reads_from_the_beginning_gets_what_is_kept_and_followers_miss_nothing(meta: Meta) -> None:
    journal = Journal(meta)
    fill(meta, journal, 400)
    whole = journal.read(0, 1 << 30)
    follower, slow, seeking = reader(journal), reader(journal), reader(journal)
    at = len(whole) - 1000
    seen = follower.read(1000, at)
    assert slow.read(500, 0) == whole[:500]
    keeping(meta, journal, 40).prune()
    first = journal.first()
    assert cat(reader(journal)) == whole[first:]
    assert cat(reader(journal), 7) == whole[first:]
    fill(meta, journal, 5)
    new = journal.read(len(whole), 1 << 30)
    assert seen + follower.read(1 << 20, len(whole)) == whole[-1000:] + new
    late = slow.read(1 << 20, 500)  # it has begun before: its offsets are the old ones
    assert late == b"\n" * (first - 500) + whole[first:] + new
    assert seeking.read(100, len(whole) - 100) == whole[-100:]  # tail -n
    assert seeking.read(10, first - 20) == b"\n" * 10


def test_a_subscriber_is_told_what_is_gone(meta: Meta) -> None:
    journal = Journal(meta)
    fill(meta, journal, 100)
    keeping(meta, journal, 10).prune()
    with journal.subscribe(since=20) as heard:
        assert heard.get(0) == Missed(21, 90)
        event = heard.get(0)
        assert isinstance(event, Event) and event.seq == 91


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=6), st.integers(50, 400))
def test_any_order_of_writing_and_pruning(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], step: int
) -> None:
    meta = Meta(tmp_path_factory.mktemp("retention") / "db")
    meta._writer.execute("PRAGMA synchronous=OFF")
    journal = Journal(meta)
    everything: dict[str | None, bytes] = {}
    for count, most in steps:
        fill(meta, journal, count)
        for object in (None, "volume/0", "volume/1", "volume/2"):
            known = everything.get(object, b"")
            everything[object] = known + journal.read(len(known), 1 << 30, object)
        keeping(meta, journal, most).prune()
        assert journal.last - journal.kept[0] + 1 <= most
        for object, text in everything.items():
            first = journal.first(object)
            assert journal.size(object) == len(text)
            assert cat(reader(journal, object), step) == text[first:]
    meta.close()
