"""The catalog: a transaction is whole or not at all, readers see the last commit and never wait."""

from __future__ import annotations

import re
import sqlite3
import threading
from pathlib import Path

import pytest

from engine.store.meta import SCHEMA, Meta


@pytest.fixture
def meta(tmp_path: Path) -> Meta:
    return Meta(tmp_path / "db.sqlite")


def put(meta: Meta, key: str) -> None:
    with meta.tx() as db:
        db.execute("INSERT INTO meta VALUES (?, '')", (key,))


def keys(meta: Meta) -> list[str]:
    return [row["key"] for row in meta.query("SELECT key FROM meta WHERE key != 'schema' ORDER BY key")]


def test_a_transaction_commits_and_survives(meta: Meta) -> None:
    put(meta, "a")
    meta.close()
    assert keys(Meta(meta.path)) == ["a"]


def test_an_exception_rolls_everything_back(meta: Meta) -> None:
    called: list[int] = []
    with pytest.raises(ZeroDivisionError), meta.tx():
        put(meta, "inner")  # joins the outer one
        meta.after_commit(lambda: called.append(1))
        raise ZeroDivisionError
    assert keys(meta) == [] and called == []
    put(meta, "later")
    assert keys(meta) == ["later"] and called == []


def test_readers_see_the_last_commit_while_one_writes(meta: Meta) -> None:
    put(meta, "a")
    with meta.tx() as db:
        db.execute("INSERT INTO meta VALUES ('b', '')")
        seen: list[list[str]] = []
        reader = threading.Thread(target=lambda: seen.append(keys(meta)))
        reader.start()
        reader.join(5)
        assert seen == [["a"]]
    assert keys(meta) == ["a", "b"]


def test_calls_after_commit_run_once_in_order(meta: Meta) -> None:
    called: list[int] = []
    with meta.tx():
        for number in range(3):
            meta.after_commit(lambda number=number: called.append(number))  # type: ignore[misc]
        assert called == []
    put(meta, "x")
    assert called == [0, 1, 2]


def test_writers_of_many_threads_take_turns(meta: Meta) -> None:
    threads = [threading.Thread(target=put, args=(meta, f"{n:02}")) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert keys(meta) == [f"{n:02}" for n in range(20)]


def test_queries_cannot_write(meta: Meta) -> None:
    with pytest.raises(sqlite3.OperationalError):
        meta.query("DELETE FROM meta")


def test_a_change_is_synced_before_it_is_acknowledged(meta: Meta) -> None:
    with meta.tx() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_every_table_is_explained() -> None:
    for match in re.finditer(r"(.*)\nCREATE TABLE IF NOT EXISTS (\w+)", SCHEMA):
        before = SCHEMA[: match.start(2)].rstrip().splitlines()
        assert before[-2].startswith("--") or match[2] == "volumes", match[2]
