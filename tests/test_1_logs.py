"""Logs: the three views equal what was written, whatever is torn, rotated, compressed or restarted in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument, NotFound
from engine.logformat import JSONL, STDERR, STDOUT, VIEWS, measure, parse, render
from engine.logs import ContainerLogs, mend
from engine.logsopen import OpenLogs

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
HEAD = b"2026-03-25T13:20:42.%09d+00:00 %s %s "

Record = tuple[bytes, bool, bytes]  # stream, partial, content


def record(number: int, stream: bytes, partial: bool, content: bytes) -> bytes:
    return HEAD % (number, stream, b"P" if partial else b"F") + content + b"\n"


def expected(records: list[Record]) -> dict[str, bytes]:
    """The reference: one record at a time, as the format's description says."""
    out = {view: bytearray() for view in VIEWS}
    for number, (stream, partial, content) in enumerate(records):
        out[stream.decode()] += content + (b"" if partial else b"\n")
        item = {"time": (HEAD % (number, b"", b""))[:35].decode(), "stream": stream.decode()}
        item["line"] = content.decode("utf-8", "replace")
        line = json.dumps(item | ({"partial": True} if partial else {}), separators=(",", ":"), ensure_ascii=False)
        out[JSONL] += line.encode() + b"\n"
    return {view: bytes(text) for view, text in out.items()}


def everything(logs: ContainerLogs, view: str) -> bytes:
    assert logs.caught_up(view, 60)
    return logs.read(view, 0, logs.size(view) + 1000)


class Writer:
    """Stands for conmon: writes to what it has open; `reopen` is asynchronous, as conmon's is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.asked = False

    def reopen(self) -> None:
        self.asked = True

    def obey(self) -> None:
        if self.asked:
            self.asked = False
            self.file.close()
            aside = self.path.with_name(self.path.name + ".tmp")
            self.file = aside.open("wb", buffering=0)
            aside.rename(self.path)


def wait_sealed(directory: Path, count: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        plain = [name for name in os.listdir(directory) if name[8:].isdigit()]
        packed = [name for name in os.listdir(directory) if name.endswith(".zst")]
        if not plain and len(packed) == count:
            return
        time.sleep(0.01)
    raise AssertionError(f"not compressed: {sorted(os.listdir(directory))}")


# --- the format -----------------------------------------------------------------------------------------------------

contents = st.one_of(
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([b"", b"\r", b"a\0b", b"\xff\xfe", b" stdout F x", record(0, b"stderr", False, b"in")[:-1]]),
    st.integers(1, 9000).map(lambda size: b"x" * size),
)
records_of = st.lists(st.tuples(st.sampled_from([b"stdout", b"stderr"]), st.booleans(), contents), max_size=60)


@given(records_of)
def test_measure_counts_what_render_shows(records: list[Record]) -> None:
    piece = b"".join(record(n, *item) for n, item in enumerate(records))
    want = expected(records)
    assert {view: render(view, piece) for view in VIEWS} == want
    assert measure(piece) == (len(want[STDOUT]), len(want[STDERR]))


@given(st.lists(st.binary(max_size=80).map(lambda data: data.replace(b"\n", b" ")), max_size=20))
def test_no_bytes_break_the_views(lines: list[bytes]) -> None:
    piece = b"".join(line + b"\n" for line in lines)
    assert measure(piece) == (len(render(STDOUT, piece)), len(render(STDERR, piece)))
    for line in render(JSONL, piece).splitlines():
        json.loads(line)


def test_kubernetes_own_cases() -> None:
    path = FIXTURES / "logs" / "cri-format" / "cases.json"
    if not path.exists() and not os.environ.get("CI"):
        pytest.skip("fixtures are not here")
    checked = 0
    for case in json.loads(path.read_text())["parse"]:
        line = case["line"].encode()
        found = parse(line.rstrip(b"\n"))
        if case.get("error") or line.startswith(b"{"):
            assert found is None
            assert render(STDOUT, line) == render(STDERR, line) == render(JSONL, line) == b""
            continue
        assert found is not None
        assert render(case["stream"], line) == case["log"].encode()
        item = json.loads(render(JSONL, line))
        assert (item["time"], item["stream"]) == (case["time"], case["stream"])
        checked += 1
    assert checked >= 4


# --- the logical files ----------------------------------------------------------------------------------------------


def test_nothing_there_yet(tmp_path: Path) -> None:
    logs = ContainerLogs(tmp_path / "logs")
    assert [logs.size(view) for view in VIEWS] == [0, 0, 0]
    assert logs.read(STDOUT, 0, 100) == b""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ctr.log").write_bytes(record(0, b"stdout", False, b"hi"))
    assert logs.read(STDOUT, 0, 100) == b"hi\n"
    logs.close()


def test_unknown_view_and_negative_offset(tmp_path: Path) -> None:
    logs = ContainerLogs(tmp_path)
    with pytest.raises(InvalidArgument):
        logs.size("stdin")
    with pytest.raises(InvalidArgument):
        logs.read(STDOUT, -1, 5)


def test_a_torn_last_record_counts_when_it_is_whole(tmp_path: Path) -> None:
    logs = ContainerLogs(tmp_path)
    whole = record(0, b"stdout", False, b"hello")
    for cut in range(1, len(whole)):
        (tmp_path / "ctr.log").write_bytes(whole[:cut])
        assert logs.size(STDOUT) == 0
    (tmp_path / "ctr.log").write_bytes(whole)
    assert logs.read(STDOUT, 0, 100) == b"hello\n"
    logs.close()


def test_mend_keeps_the_next_record_whole(tmp_path: Path) -> None:
    current = tmp_path / "ctr.log"
    mend(current)
    assert not current.exists()
    current.write_bytes(record(0, b"stdout", False, b"a") + record(1, b"stdout", False, b"torn")[:-3])
    mend(current)
    with current.open("ab") as file:
        file.write(record(2, b"stdout", False, b"b"))
    mend(current)
    logs = ContainerLogs(tmp_path)
    assert everything(logs, STDOUT) == b"a\nto\nb\n"
    logs.close()


def test_a_line_of_megabytes_is_many_parts(tmp_path: Path) -> None:
    parts = [(b"stdout", True, os.urandom(4096).hex().encode())] * 500 + [(b"stdout", False, b"end")]
    (tmp_path / "ctr.log").write_bytes(b"".join(record(n, *part) for n, part in enumerate(parts)))
    logs = ContainerLogs(tmp_path)
    want = expected(parts)
    assert everything(logs, STDOUT) == want[STDOUT]
    assert everything(logs, JSONL) == want[JSONL]
    assert logs.read(STDOUT, 3_000_000, 77) == want[STDOUT][3_000_000:3_000_077]
    logs.close()


def test_garbage_without_a_newline_is_passed_over(tmp_path: Path) -> None:
    """As a power cut leaves it: megabytes of NUL where a record was."""
    first, last = record(0, b"stdout", False, b"first"), record(1, b"stdout", False, b"last")
    (tmp_path / "ctr.log").write_bytes(first + bytes(3 << 20) + b"\n" + last)
    logs = ContainerLogs(tmp_path)
    assert everything(logs, STDOUT) == b"first\nlast\n"
    assert logs.caught_up(JSONL, 60)
    assert [json.loads(line)["line"] for line in everything(logs, JSONL).splitlines()] == ["first", "last"]
    logs.close()


chunks_of = st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(["", "", "rotate", "obey", "restart", "seal"])))


@settings(max_examples=60, deadline=None)
@given(records=records_of, plan=chunks_of, seed=st.integers(0, 1 << 30))
def test_followers_read_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], plan: list[tuple[int, str]], seed: int
) -> None:
    """Torn appends, rotation at any moment, slow writers, daemon restarts: every view is the plain concatenation."""
    tmp_path = tmp_path_factory.mktemp("logs")
    raw = b"".join(record(n, *item) for n, item in enumerate(records))
    want, chance = expected(records), random.Random(seed)
    logs, writer, written = ContainerLogs(tmp_path), Writer(tmp_path / "ctr.log"), 0
    seen = {view: bytearray() for view in VIEWS}
    sizes = dict.fromkeys(VIEWS, 0)

    def follow() -> None:
        for view in VIEWS:
            size = logs.size(view)
            assert size >= sizes[view]
            sizes[view] = size
            got = logs.read(view, len(seen[view]), chance.randrange(1, 5000))
            seen[view] += got
            assert want[view].startswith(bytes(seen[view]))
            if size:
                start = chance.randrange(size)
                length = chance.randrange(1, 3000)
                assert logs.read(view, start, length) == want[view][start : min(start + length, size)]

    for count, then in [*plan, (len(raw), ""), (0, "rotate"), (0, "obey")]:
        # conmon ends records where it changes files: it writes a record wholly to one file
        data = raw[written : written + count]
        if then == "obey" and writer.asked and data:
            data = data[: data.rfind(b"\n") + 1]
        os.write(writer.file.fileno(), data)
        written += len(data)
        if then == "rotate":
            logs.maybe_rotate(1, None, writer.reopen)
        elif (
            then == "obey"
            and raw[:written].endswith((b"\n", b""))
            and (not written or raw[written - 1 : written] == b"\n")
        ):
            writer.obey()
        elif then == "restart":
            logs.close()
            logs = ContainerLogs(tmp_path)
        elif then == "seal":
            logs.caught_up(STDOUT, 5)
            time.sleep(0.002)
        follow()
    os.write(writer.file.fileno(), raw[written:])
    writer.obey()
    assert {view: everything(logs, view) for view in VIEWS} == want
    logs.close()
    again = ContainerLogs(tmp_path)
    assert {view: everything(again, view) for view in VIEWS} == want
    again.close()
    writer.file.close()


def fill(path: Path, first: int, count: int) -> list[Record]:
    records = [
        (b"stderr" if n % 7 == 3 else b"stdout", n % 50 == 9, b"line %d" % n) for n in range(first, first + count)
    ]
    with path.open("ab") as file:
        file.write(b"".join(record(first + n, *item) for n, item in enumerate(records)))
    return records


def rotated(tmp_path: Path, segments: int = 4, lines: int = 30_000) -> tuple[ContainerLogs, dict[str, bytes]]:
    """Several compressed segments and a current one."""
    logs, records = ContainerLogs(tmp_path), []
    for _ in range(segments):
        records += fill(tmp_path / "ctr.log", len(records), lines)
        assert logs.maybe_rotate(1, None, lambda: (tmp_path / "ctr.log").touch())
        logs.size(STDOUT)
    records += fill(tmp_path / "ctr.log", len(records), lines)
    wait_sealed(tmp_path, segments)
    return logs, expected(records)


def rest(logs: ContainerLogs) -> None:
    """Its helper has saved what there was to save, and does not come between what a test does from here on."""
    while (helper := logs._helper) is not None:
        helper.join(30)
        assert not helper.is_alive()


def test_rotated_segments_are_compressed_and_read_as_one(tmp_path: Path) -> None:
    logs, want = rotated(tmp_path)
    for view in VIEWS:
        assert everything(logs, view) == want[view]
        for start in range(0, len(want[view]), 50_021):
            assert logs.read(view, start, 100) == want[view][start : start + 100]
    logs.close()
    again = ContainerLogs(tmp_path)
    assert again.read(STDOUT, 5000, 200_000) == want[STDOUT][5000:205_000]
    assert {view: everything(again, view) for view in VIEWS} == want
    again.close()


def test_compressed_segments_are_plain_zstd(tmp_path: Path) -> None:
    """Any zstd tool reads them: the seek table is a skippable frame."""
    import zstandard

    logs, want = rotated(tmp_path, 2)
    raw = b""
    for number in (1, 2):
        data = (tmp_path / f"ctr.log.{number}.zst").read_bytes()
        raw += zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data)
    assert want[STDOUT].startswith(render(STDOUT, raw)) and len(raw) > 2 << 20
    logs.close()


@pytest.mark.parametrize("damage", ["no index", "bad index", "bad totals", "both", "tmp files", "no checkpoints"])
def test_a_crash_at_any_point_of_a_rotation_is_repaired(tmp_path: Path, damage: str) -> None:
    import zstandard

    logs, want = rotated(tmp_path, 3, 20_000)  # two frames each
    assert everything(logs, JSONL) == want[JSONL]
    logs.close()
    index = tmp_path / "ctr.log.2.idx"
    if damage == "no index":
        index.unlink()
    elif damage == "bad index":
        index.write_text("nonsense\n")
    elif damage == "bad totals":
        index.write_text('{"raw":99999999999,"stdout":1,"stderr":1,"all.jsonl":null}\n{}\n')
    elif damage == "no checkpoints":
        index.write_text(index.read_text().splitlines()[0] + "\n{\n")
    elif damage == "both":
        data = (tmp_path / "ctr.log.2.zst").read_bytes()
        raw = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data)
        (tmp_path / "ctr.log.2").write_bytes(raw)
    elif damage == "tmp files":
        (tmp_path / "ctr.log.4.zst.tmp").write_bytes(b"half")
        (tmp_path / "ctr.log.2.idx.tmp").write_bytes(b"half")
        (tmp_path / "ctr.log.3.old.tmp").write_bytes(b"what is compressed by now")
    again = ContainerLogs(tmp_path)
    assert {view: everything(again, view) for view in VIEWS} == want
    wait_sealed(tmp_path, 3)
    again.close()
    assert not list(tmp_path.glob("*.tmp"))
    assert {path.name for path in tmp_path.glob("*.idx")} >= {f"ctr.log.{n}.idx" for n in (1, 2, 3)}


def test_killed_between_rename_and_reopen(tmp_path: Path) -> None:
    """The writer goes on in the renamed file; the next daemon reads that on, and asks it once more."""
    writer = Writer(tmp_path / "ctr.log")
    os.write(writer.file.fileno(), record(0, b"stdout", False, b"a"))
    logs = ContainerLogs(tmp_path)
    assert logs.maybe_rotate(1, None, lambda: None)  # the word is lost
    logs.close()
    again = ContainerLogs(tmp_path)
    os.write(writer.file.fileno(), record(1, b"stdout", False, b"b"))
    assert everything(again, STDOUT) == b"a\nb\n"
    again._asked = -1e9  # as if the pause until it asks again were over
    assert not again.maybe_rotate(1, None, writer.reopen)
    assert writer.asked
    writer.obey()
    os.write(writer.file.fileno(), record(2, b"stdout", False, b"c"))
    assert everything(again, STDOUT) == b"a\nb\nc\n"
    wait_sealed(tmp_path, 1)
    assert everything(again, STDOUT) == b"a\nb\nc\n"
    again.close()


def test_a_stopped_container_is_rotated_too(tmp_path: Path) -> None:
    records = fill(tmp_path / "ctr.log", 0, 100)
    logs = ContainerLogs(tmp_path)

    def nobody() -> None:
        raise NotFound("no writer")

    assert logs.maybe_rotate(100, None, nobody)
    wait_sealed(tmp_path, 1)
    assert not logs.maybe_rotate(100, None, nobody)
    records += fill(tmp_path / "ctr.log", 100, 100)  # it is started again
    assert everything(logs, STDOUT) == expected(records)[STDOUT]
    logs.close()


def test_bounds_of_rotation(tmp_path: Path) -> None:
    fill(tmp_path / "ctr.log", 0, 100)
    logs = ContainerLogs(tmp_path)
    size = (tmp_path / "ctr.log").stat().st_size
    asked: list[int] = []
    assert not logs.maybe_rotate(size + 1, None, lambda: asked.append(1))
    assert not logs.maybe_rotate(None, None, lambda: asked.append(1))
    assert not logs.maybe_rotate(None, 10 * 365 * 86400.0 * 10, lambda: asked.append(1))
    assert asked == []
    with (tmp_path / "ctr.log").open("r+b") as file:
        file.write(b"2001")  # an old first record
    assert logs.maybe_rotate(size + 1, 10 * 365 * 86400.0, lambda: asked.append(1))
    assert asked == [1]
    logs.close()


def test_dropped_segments_keep_all_offsets(tmp_path: Path) -> None:
    logs, want = rotated(tmp_path)
    kept = everything(logs, JSONL)
    assert logs.drop(1 << 62) == 0
    assert logs.drop(0) > 0
    assert logs.drop(0) == 0
    for view in VIEWS:
        now = everything(logs, view)
        assert len(now) == len(want[view])
        cut = len(now) - len(now.lstrip(b"\n"))
        assert cut and now[cut:] == want[view][cut:]
    assert len(kept) == logs.size(JSONL)
    firsts = {view: logs.first(view) for view in VIEWS}
    logs.close()
    again = ContainerLogs(tmp_path)
    for view in VIEWS:
        assert everything(again, view)[firsts[view] :] == want[view][firsts[view] :]
        assert again.first(view) == firsts[view] and (again.size(view), firsts[view] > 0) == (len(want[view]), True)
    assert len(list(tmp_path.glob("ctr.log.*.idx"))) - len(list(tmp_path.glob("ctr.log.*.zst"))) <= 1
    again.close()


@pytest.mark.parametrize("point", ["unlink", "rename"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_drop_cut_short_changes_no_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: int
) -> None:
    logs, want = rotated(tmp_path, 3, 2000)
    assert all(len(everything(logs, view)) == len(want[view]) for view in VIEWS)
    rest(logs)
    real, left = getattr(Path, point), [number]

    def fails(self: Path, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, point, fails)
        with contextlib.suppress(KeyboardInterrupt):
            logs.drop(0)
    again = ContainerLogs(tmp_path)  # as after kill -9 there
    for view in VIEWS:
        now = everything(again, view)
        first = again.first(view)
        assert now[first:] == want[view][first:] and now[:first].strip(b"\n") == b""
    again.drop(0)
    again.close()
    logs.close()


def test_size_answers_fast_on_a_large_backlog_and_the_helper_catches_up(tmp_path: Path) -> None:
    line = record(0, b"stdout", False, b"x" * 3)
    block = line * 20_000
    with (tmp_path / "ctr.log").open("wb") as file:
        for _ in range(60):
            file.write(block)
    logs = ContainerLogs(tmp_path)
    started = time.thread_time()
    first = logs.size(STDOUT)
    assert time.thread_time() - started < 1.0  # its bound is 50 ms
    assert logs.caught_up(STDOUT, 60)
    assert first <= logs.size(STDOUT) == 4 * 1_200_000
    started = time.thread_time()
    logs.size(JSONL)
    assert time.thread_time() - started < 1.0
    logs.close()
    reopened = ContainerLogs(tmp_path)
    assert reopened.size(STDOUT) == 4 * 1_200_000  # at once: close saved the index
    with (tmp_path / "ctr.log").open("ab") as file:
        file.write(line)
    assert reopened.size(STDOUT) == 4 * 1_200_001
    reopened.close()


def test_a_saved_index_of_another_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.logs.WORTH_SAVING", 1)
    fill(tmp_path / "ctr.log", 0, 5000)
    logs = ContainerLogs(tmp_path)
    assert logs.size(STDOUT)
    logs.close()
    assert (tmp_path / "ctr.log.idx").exists()
    (tmp_path / "ctr.log").unlink()
    records = fill(tmp_path / "ctr.log", 1, 6000)
    fresh = ContainerLogs(tmp_path)
    want = b"".join(content + (b"" if part else b"\n") for stream, part, content in records if stream == b"stdout")
    assert everything(fresh, STDOUT) == want
    fresh.close()


def test_a_reader_and_a_burst_with_rotation_at_once(tmp_path: Path) -> None:
    """A follower in one thread, a writer with rotations in another: nothing lost, nothing twice, no size shrinks."""
    writer, logs = Writer(tmp_path / "ctr.log"), ContainerLogs(tmp_path)
    total, done, seen = 60_000, threading.Event(), bytearray()

    def write() -> None:
        for number in range(0, total, 100):
            writer.obey()
            text = b"".join(record(n, b"stdout", False, b"%08d" % n) for n in range(number, number + 100))
            os.write(writer.file.fileno(), text)
            if number % 5000 == 0:
                logs.maybe_rotate(100_000, None, writer.reopen)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set() or logs.size(STDOUT) > len(seen):
        seen += logs.read(STDOUT, len(seen), 70_000)
    thread.join()
    assert logs.caught_up(STDOUT, 60)
    seen += logs.read(STDOUT, len(seen), 1 << 30)
    assert bytes(seen) == b"".join(b"%08d\n" % n for n in range(total))
    assert list(tmp_path.glob("ctr.log.*"))
    logs.close()
    writer.file.close()


def test_only_the_logs_used_last_keep_files_open(tmp_path: Path) -> None:
    several = OpenLogs[int](8)
    for number in range(40):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "ctr.log").write_bytes(record(number, b"stdout", False, b"%d" % number))
    before = len(os.listdir("/dev/fd"))
    for number in range(40):
        assert several.known(number) is None
        assert several.open(number, tmp_path / str(number)).size(STDOUT) > 0
    assert len(os.listdir("/dev/fd")) <= before + 9
    for number in range(40):  # what rests goes on where it was, with what came meanwhile
        with several.open(number, tmp_path / str(number)).current.open("ab") as file:
            file.write(record(number, b"stdout", False, b"more"))
        known = several.known(number)
        assert known is not None and everything(known, STDOUT) == b"%d\nmore\n" % number
        several.drop(number)
