"""The journal: gapless, in the same transaction as what it tells of, readable as one growing file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.events import Event, Journal, Missed, acting, rfc3339
from engine.store.meta import Meta


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    meta = Meta(tmp_path / "db.sqlite")
    meta._writer.execute("PRAGMA synchronous=OFF")  # speed only: no test here cuts the power
    yield meta
    meta.close()


def whole(journal: Journal, object: str | None = None, step: int = 1 << 20) -> bytes:
    out, size = b"", journal.size(object)
    while len(out) < size:
        part = journal.read(len(out), step, object)
        assert part, "the file ended before its size"
        out += part
    return out


def lines(data: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_line_says_what_happened_when_to_what_and_by_whom(meta: Meta) -> None:
    journal = Journal(meta)
    with acting("uid=1000 pid=7"):
        assert journal.append("stateChanged", "container/1", {"name": "web", "from": "created", "to": "starting"}) == 1
    journal.append("engineStarted", "engine", {"version": "0"})
    first, second = lines(whole(journal))
    assert list(first) == ["seq", "time", "type", "object", "name", "from", "to", "who"]
    assert (first["seq"], first["who"], first["name"]) == (1, "uid=1000 pid=7", "web")
    assert second["seq"] == 2 and "who" not in second


def test_time_is_rfc3339_with_nanoseconds() -> None:
    assert rfc3339(1_700_000_000_000_000_042) == "2023-11-14T22:13:20.000000042Z"


def test_a_rolled_back_event_never_was(meta: Meta) -> None:
    journal = Journal(meta)
    journal.append("a", "engine", {})
    with journal.subscribe() as heard:
        with pytest.raises(RuntimeError), meta.tx():
            journal.append("b", "engine", {})
            raise RuntimeError
        assert heard.get(0) is None
        assert journal.append("c", "engine", {}) == 2
        event = heard.get(1)
        assert isinstance(event, Event) and (event.seq, event.type) == (2, "c")
    assert [line["type"] for line in lines(whole(journal))] == ["a", "c"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.sampled_from(["engine", "container/a", "volume/ü"]), st.text(max_size=30)), max_size=5
            ),
            st.booleans(),
        ),
        max_size=12,
    ),
    step=st.integers(1, 700),
)
def test_sequence_numbers_and_files_have_no_gaps_whatever_is_rolled_back(
    tmp_path_factory: pytest.TempPathFactory, batches: list[tuple[list[tuple[str, str]], bool]], step: int
) -> None:
    meta = Meta(tmp_path_factory.mktemp("journal") / "db")
    meta._writer.execute("PRAGMA synchronous=OFF")
    journal = Journal(meta)
    kept: list[tuple[str, str]] = []
    heard = journal.subscribe()
    for events, commit in batches:
        try:
            with meta.tx():
                for object, text in events:
                    journal.append("t", object, {"text": text})
                if not commit:
                    raise KeyError
            kept += events
        except KeyError:
            pass
    again = Journal(meta)  # as after a restart
    for reader in (journal, again):
        found = lines(whole(reader, step=step))
        assert [(line["object"], line["text"]) for line in found] == kept
        assert [line["seq"] for line in found] == list(range(1, len(kept) + 1))
        for object in {object for object, _ in kept}:
            mine = lines(whole(reader, object, step))
            assert [line["text"] for line in mine] == [text for name, text in kept if name == object]
        assert reader.last == len(kept)
    told = [event for _ in kept if isinstance(event := heard.get(0), Event)]
    assert [(event.object, event.data["text"]) for event in told] == kept
    heard.close()
    meta.close()


def test_reads_at_any_offset_agree_with_the_whole(meta: Meta) -> None:
    journal = Journal(meta)
    for number in range(40):
        journal.append("n", f"container/{number % 3}", {"n": number, "pad": "x" * (number * 7 % 50)})
    everything = whole(journal)
    assert journal.size() == len(everything)
    for offset in range(0, len(everything) + 5, 37):
        for size in (0, 1, 100, 5000):
            assert journal.read(offset, size) == everything[offset : offset + size]
    assert journal.size("container/none") == 0 and journal.read(0, 10, "container/none") == b""


def test_a_slow_subscriber_is_told_what_it_missed_and_replays_it(meta: Meta) -> None:
    journal = Journal(meta)
    with journal.subscribe(capacity=3) as heard:
        for number in range(10):
            journal.append("n", "engine", {"n": number})
        got = [heard.get(0) for _ in range(4)]
        assert [event.seq for event in got[:3] if isinstance(event, Event)] == [1, 2, 3]
        missed = got[3]
        assert missed == Missed(4, 10)
        assert [event.seq for event in journal.replay(missed.first - 1)] == list(range(4, 11))
        journal.append("n", "engine", {"n": 10})
        event = heard.get(1)
        assert isinstance(event, Event) and event.seq == 11


def test_a_subscriber_that_comes_back_gets_what_happened_since_then_goes_on_live(meta: Meta) -> None:
    journal = Journal(meta)
    for number in range(1300):  # more than a page
        if number % 100 == 0:
            journal.append("mark", "engine", {})
        else:
            with meta.tx():
                journal.append("n", "engine", {"n": number})
    journal = Journal(meta)
    with journal.subscribe(since=700) as heard:
        journal.append("live", "engine", {})
        seqs = [event.seq for _ in range(601) if isinstance(event := heard.get(1), Event)]
        assert seqs == list(range(701, 1302))
        assert heard.get(0) is None


def test_threads_append_at_once_and_every_subscriber_hears_all_in_order(meta: Meta) -> None:
    journal = Journal(meta)
    heard = [journal.subscribe() for _ in range(3)]

    def work(name: int) -> None:
        for number in range(50):
            with meta.tx():
                journal.append("n", f"container/{name}", {"n": number})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for subscription in heard:
        seqs = []
        for item in subscription:
            assert isinstance(item, Event)
            seqs.append(item.seq)
            if len(seqs) == 200:
                break
        assert seqs == list(range(1, 201))
        subscription.close()
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [line["n"] for line in lines(whole(journal, f"container/{name}"))] == list(range(50))


def test_closing_ends_a_waiting_consumer(meta: Meta) -> None:
    journal = Journal(meta)
    subscription = journal.subscribe()
    ended = threading.Event()

    def consume() -> None:
        for _ in subscription:
            pass
        ended.set()

    thread = threading.Thread(target=consume)
    thread.start()
    journal.close()
    assert ended.wait(5)
    thread.join()


def test_data_cannot_forge_the_fields_of_the_journal(meta: Meta) -> None:
    with pytest.raises(ValueError, match="who"):
        Journal(meta).append("x", "engine", {"who": "root"})
    assert Journal(meta).size() == 0
