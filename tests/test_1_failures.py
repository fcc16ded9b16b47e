"""The `error` files: eight, newest first, with a caret under the fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Busy, EngineError, InvalidArgument
from engine.failures import KEPT, Failures, render
from engine.store.meta import Meta


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    meta = Meta(tmp_path / "db.sqlite")
    yield meta
    meta.close()


def test_it_shows_time_errno_command_caret_reason_and_hint() -> None:
    error = InvalidArgument("unknown verb 'stopp'", at="stopp", hint="one of start, stop")
    assert render("stopp 10", error, 1_700_000_000_000_000_000) == (
        "2023-11-14T22:13:20Z EINVAL\n    stopp 10\n    ^^^^^\nunknown verb 'stopp'\nhint: one of start, stop\n"
    )


def test_the_caret_prefers_the_whole_word() -> None:
    text = render("started start", Busy("no", at="start"), 0)
    assert text.splitlines()[2] == "    " + " " * 8 + "^^^^^"


def test_a_fault_that_is_not_in_the_command_has_no_caret() -> None:
    assert "^" not in render("start", Busy("no", at="nginx"), 0)


def test_newest_first_at_most_eight_and_each_object_its_own(meta: Meta) -> None:
    failures = Failures(meta)
    for number in range(12):
        failures.record("container/1", f"start {number}", Busy(f"reason {number}"))
    failures.record("", "bogus", InvalidArgument("what?"))
    text = failures.text("container/1")
    assert [line for line in text.splitlines() if line.startswith("reason")] == [
        f"reason {n}" for n in range(11, 3, -1)
    ]
    assert text.count("EBUSY") == KEPT
    assert "bogus" in failures.text("") and "bogus" not in text
    assert failures.mtime_ns("container/1") > 0 == failures.mtime_ns("volumes")


def test_it_survives_a_restart_and_can_be_cleared(meta: Meta) -> None:
    Failures(meta).record("images", "pull x", Busy("no"))
    meta.close()
    again = Meta(meta.path)
    failures = Failures(again)
    assert "pull x" in failures.text("images")
    failures.clear("images")
    assert failures.text("images") == ""
    again.close()


@given(command=st.text(max_size=3000), at=st.none() | st.text(max_size=50), reason=st.text(max_size=100))
def test_whatever_was_written_reads_as_plain_lines(command: str, at: str | None, reason: str) -> None:
    text = render(command, EngineError(reason, at=at), 0)
    assert text.endswith("\n")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text) < 12_000
