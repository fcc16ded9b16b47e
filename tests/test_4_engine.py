"""The engine as a whole: opening, locking, status, commands, a full disk, closing."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import add_image, events, eventually, reach

from engine import host, hostmounts
from engine.config import parse_config
from engine.engine import Engine
from engine.errors import Busy, EngineError, InvalidArgument, NoSpace, NotFound, Unsupported
from engine.lifecycle import State

IMAGE = "docker.io/library/small:1"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "store", runtime="fake", mount=Path("/some/where")) as engine:
        yield engine


def test_a_store_is_private_and_locked_by_one_engine_at_a_time(engine: Engine) -> None:
    assert stat.S_IMODE(os.stat(engine.store).st_mode) == 0o700
    with pytest.raises(Busy) as caught:
        Engine(engine.store, runtime="fake")
    assert f"pid {os.getpid()}, mount /some/where" in caught.value.reason
    with pytest.raises(Busy):
        Engine(engine.store, runtime="fake")
    assert engine.containers.all() == []
    engine.close()
    Engine(engine.store, runtime="fake").close()


def test_files_are_private_even_in_a_directory_others_can_enter(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir(mode=0o755)
    with Engine(store, runtime="fake") as engine:
        add_image(engine, IMAGE)
        found = [path for path in store.iterdir() if stat.S_IMODE(path.stat().st_mode) & 0o077]
        assert found == []


def test_an_unknown_runtime_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="vmware"):
        Engine(tmp_path / "store", runtime="vmware")
    assert not (tmp_path / "store").exists()


def test_auto_never_pretends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_root", lambda: False)
    with Engine(tmp_path / "store") as engine:
        assert "oci" in engine.status()["runtime"] and "root" in engine.status()["runtime"]
        add_image(engine, IMAGE)
        engine.containers.create("c", parse_config(f"image: {IMAGE}"))
        with pytest.raises(Unsupported, match="root"):
            engine.containers.start("c")
        assert engine.containers.get("c").state is State.STOPPED
        engine.containers.set_field("c", "runtime", "fake")  # asked for by name
        engine.containers.start("c")
        assert engine.containers.get("c").state is State.RUNNING
        engine.containers.remove("c", force=True)


def test_status_says_what_is_there_in_flat_keys(engine: Engine) -> None:
    add_image(engine, IMAGE)
    engine.containers.create("c", parse_config(f"image: {IMAGE}"))
    engine.containers.start("c")
    engine.volumes.create("v")
    status = engine.status()
    assert status["version"] == engine.version and status["pid"] == str(os.getpid())
    assert (status["images"], status["volumes"], status["containers"]) == ("1", "1", "1")
    assert status["containers_running"] == "1" and status["containers_stopped"] == "0"
    assert status["events"] == str(engine.journal.last)
    assert all(" " not in key and "\n" not in value for key, value in status.items())


def test_neither_the_journal_nor_error_has_a_password(engine: Engine) -> None:
    line = "create v type=cifs device=//h/s o=user=a,password=SECRET bogus=1"
    with pytest.raises(InvalidArgument), engine.command("volumes", line):
        raise InvalidArgument("invalid option", at="bogus=1")
    text = engine.failures.text("volumes")
    assert "^^^^^^^" in text and "SECRET" not in text
    events = [json.loads(item) for item in engine.journal.read(0, 1 << 20).splitlines()]
    assert [event["command"] for event in events if event["type"] == "verb"] == [line.replace("SECRET", "…")]


def test_a_command_is_in_the_journal_with_who_wrote_it_and_its_failure_in_error(engine: Engine) -> None:
    engine.containers.create("c")
    container = engine.containers.get("c")
    with pytest.raises(Busy), engine.command(container.object, "stop 5", who="uid=7 pid=8"):
        engine.containers.stop("c", 5)
    verb = [event for event in events(engine, container.object) if event["type"] == "verb"]
    assert [(event["command"], event["who"]) for event in verb] == [("stop 5", "uid=7 pid=8")]
    text = engine.failures.text(container.object)
    assert "EBUSY\n    stop 5\n    ^^^^\n" in text and "the container is created" in text
    with pytest.raises(NoSpace), engine.command("", "x"):
        raise OSError(errno.ENOSPC, "No space left on device", "/x")
    with pytest.raises(PermissionError), engine.command("", "y"):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")
    assert "ENOSPC" in engine.failures.text("") and "Permission denied" in engine.failures.text("")


def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        digest = add_image(engine, IMAGE)
        engine.containers.create("c", parse_config(f"image: {IMAGE}\ncommand: [exit, '4']"))
        engine.containers.start("c")
        assert engine.containers.wait("c", 40) == 4
        engine.volumes.create("v", labels={"a": "b"})
        before, last = engine.containers.get("c"), engine.journal.last
        journal = engine.journal.read(0, engine.journal.size())
    with Engine(tmp_path / "store", runtime="fake") as engine:
        assert engine.containers.get("c") == before
        assert engine.images.get(digest).digest == digest
        assert dict(engine.volumes.get("v").labels) == {"a": "b"}
        assert engine.journal.read(0, len(journal)) == journal
        assert events(engine)[last]["type"] == "engineStarted"


def test_closing_is_quick_whatever_is_going_on_and_ends_every_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    engine = Engine(tmp_path / "store", runtime="fake")
    add_image(engine, IMAGE)
    for name in ("a", "b"):
        engine.containers.create(name, parse_config(f"image: {IMAGE}\ncommand: [trap, inf]"))
        engine.containers.start(name)
    threading.Thread(target=engine.containers.stop, args=("a", 60), daemon=True).start()
    reach(engine, "a", State.STOPPING)
    subscription = engine.journal.subscribe()
    named = [thread.name for thread in threading.enumerate() if thread not in before]
    assert "monitor" in named and any(name.startswith("stop-") for name in named)
    began = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - began < 30  # and not the minute of the stop
    assert subscription.get(1) is None
    deadline = time.monotonic() + 40
    while left := [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_readers_do_not_wait_for_a_writer(engine: Engine) -> None:
    add_image(engine, IMAGE)
    engine.containers.create("c", parse_config(f"image: {IMAGE}"))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.meta.tx():
            held.set()
            release.wait(100)

    writer = threading.Thread(target=hold)
    writer.start()
    held.wait(60)
    done = threading.Event()

    def read() -> None:  # a thread of its own, as the mount's are: its connection is new
        engine.containers.get("c")
        engine.containers.verbs("c")
        engine.containers.field_text("c", "image")
        engine.containers.logs("c").size("stdout")
        engine.journal.read(0, 100, "engine")
        engine.journal.size()
        engine.failures.text("")
        engine.volumes.all()
        engine.status()
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert done.wait(50), "a reader waited for the writer"
    finally:
        release.set()
        writer.join()
        thread.join()


def test_threads_that_read_leave_no_open_files_behind(engine: Engine) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd")) if host.LINUX else 0

    engine.status()
    before = files()
    for _ in range(50):
        thread = threading.Thread(target=engine.status)
        thread.start()
        thread.join()
    gc.collect()
    eventually(lambda: files() - before < 10)


def test_a_damaged_layer_is_warned_of_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        layer = engine.layers.all()[0]
        os.unlink(engine.layers.data_path(layer.diff_id))
    with Engine(tmp_path / "store", runtime="fake"):
        assert "has lost its data file" in caplog.text
    assert "has lost its data file" in (tmp_path / "store" / "engine.log").read_text()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if not (host.LINUX and host.is_root()):
        pytest.skip("mounting a tmpfs needs root on Linux")
    target = tmp_path / "small"
    target.mkdir()
    hostmounts.mount("tmpfs", target, "tmpfs", 0, "size=3m")
    yield target
    hostmounts.unmount(target)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_on_a_full_disk_things_can_still_be_stopped_and_removed(small: Path) -> None:
    with Engine(small / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        engine.containers.create("runs", parse_config(f"image: {IMAGE}\ncommand: [sleep, inf]"))
        engine.containers.start("runs")
        engine.volumes.create("v")
        fill(small / "ballast")
        with pytest.raises(NoSpace):
            for number in range(2000):
                with engine.command("", f"create v{number}"):
                    engine.volumes.create(f"v{number}")
        with engine.command("container/runs", "kill"):
            engine.containers.kill("runs")
        reach(engine, "runs", State.STOPPED)
        with engine.command("container/runs", "remove"):
            engine.containers.remove("runs")
        with engine.command("volume/v", "rmdir v"):
            engine.volumes.remove("v")
        assert engine.containers.all() == [] and "v" not in engine.volumes.names()
        assert not (engine.store / "reserve").exists()
        os.unlink(small / "ballast")
        with engine.command("", "create w"):
            engine.volumes.create("w")
        assert (engine.store / "reserve").stat().st_size == 1 << 20


def test_on_a_full_disk_verbs_fail_nothing_changes_and_later_they_work(small: Path) -> None:
    with Engine(small / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        engine.containers.create("c", parse_config(f"image: {IMAGE}"))
        engine.containers.create("runs", parse_config(f"image: {IMAGE}"))
        engine.containers.start("runs")
        fill(small / "ballast")
        seq, size = engine.journal.last, engine.journal.size()
        attempts = 0
        for number in range(200):  # what room the catalog still has is used up
            try:
                with engine.command("", f"create v{number}"):
                    engine.volumes.create(f"v{number}")
            except EngineError as error:
                assert isinstance(error, NoSpace), error
                attempts += 1
                if attempts == 3:
                    break
        assert attempts == 3
        volumes, seq, size = engine.volumes.names(), engine.journal.last, engine.journal.size()
        with pytest.raises(NoSpace):
            engine.containers.start("c")
        with pytest.raises(NoSpace), engine.command("", "start"):
            engine.containers.start("c")
        assert engine.containers.get("c").state is State.CREATED
        assert (engine.journal.last, engine.journal.size(), engine.volumes.names()) == (seq, size, volumes)
        assert sorted(os.listdir(engine.store / "volumes")) == volumes
        engine.containers.execution.driver_of(engine.containers.get("runs")).signal(engine.containers.get("runs").id, 9)
        time.sleep(0.2)
        os.unlink(small / "ballast")
        reach(engine, "runs", State.STOPPED)  # an end that could not be recorded was not lost
        assert engine.containers.get("runs").exit_code == 137
        engine.containers.start("c")
        assert engine.containers.get("c").state is State.RUNNING
        found = events(engine)
        assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
        with pytest.raises(NotFound):
            engine.volumes.get("never")
        engine.close(unmount=True)
        engine.mounts.release_all()
