"""Two things at once: nothing is lost, and nobody waits for a process that does nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import add_image

from engine import connecting
from engine.config import parse_config
from engine.engine import Engine
from engine.errors import Busy, DeadlineExceeded, NotFound
from engine.lifecycle import State

IMAGE = "docker.io/library/small:1"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_image(engine, IMAGE)
        yield engine
        for container in engine.containers.all():
            engine.containers.remove(container.name, force=True)  # their root filesystems are mounted


def _running(engine: Engine, name: str = "c", more: str = "") -> None:
    engine.containers.create(name, parse_config(f"image: {IMAGE}\n{more}"))
    engine.containers.start(name)


def test_two_connects_at_once_keep_both(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.containers.create("c")
    for name in ("a", "b"):
        engine.networks.create(name)
    found = engine.networks.get
    others = [lambda: connecting.connect(engine.containers, engine.networks, engine.connections, "c", "b")]

    def get(name: str) -> Any:  # after the container was looked at
        while name == "a" and others:
            others.pop()()
        return found(name)

    monkeypatch.setattr(engine.networks, "get", get)
    connecting.connect(engine.containers, engine.networks, engine.connections, "c", "a")
    assert {"a", "b"} <= set(engine.containers.get("c").config.networks)
    others.append(lambda: connecting.disconnect(engine.containers, engine.networks, engine.connections, "c", "b"))
    connecting.disconnect(engine.containers, engine.networks, engine.connections, "c", "a")
    assert not {"a", "b"} & set(engine.containers.get("c").config.networks)


def test_leaving_a_network_goes_on_where_a_killed_daemon_stopped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    for name in ("a", "b"):
        engine.networks.create(name)
    engine.containers.create("c", parse_config("networks: [a, b]"))
    records, connections, left = engine.containers.records, engine.connections, []
    with monkeypatch.context() as patch:
        patch.setattr(connecting, "_runs", lambda container: True)
        patch.setattr(connections, "disconnect", lambda *given: left.append(given[2]))
        patch.setattr(records, "configure", killed)
        with pytest.raises(Killed):
            connecting.disconnect(engine.containers, engine.networks, connections, "c", "a")
    assert left == ["a"] and set(records.get("c").config.networks) == {"a", "b"}
    assert records.leaving() == [(records.get("c").id, "a")]
    with monkeypatch.context() as patch:  # the host has let go already
        patch.setattr(connecting, "_runs", lambda container: True)
        connecting.finish(engine.containers, engine.networks, connections)
    assert set(records.get("c").config.networks) == {"b"} and records.leaving() == []


def test_a_refused_disconnect_is_not_begun_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.networks.create("a")
    engine.containers.create("c", parse_config("networks: [a]"))
    monkeypatch.setattr(connecting, "_runs", lambda container: True)
    with pytest.raises(Busy):  # it has no namespace
        connecting.disconnect(engine.containers, engine.networks, engine.connections, "c", "a")
    assert engine.containers.records.leaving() == []
    assert set(engine.containers.get("c").config.networks) == {"a"}


def test_a_process_that_does_not_read_keeps_nobody_from_killing_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _running(engine, more="stdin: true\n")
    inside, go_on = threading.Event(), threading.Event()

    def send(id: str, data: bytes) -> int:
        inside.set()
        go_on.wait(60)
        return len(data)

    console = engine.containers.execution.driver_of(engine.containers.get("c")).console
    monkeypatch.setattr(console, "send", send)
    writer = threading.Thread(target=lambda: engine.containers.console.send("c", b"x"))
    writer.start()
    try:
        assert inside.wait(60)
        with pytest.raises(DeadlineExceeded):  # another writer is told so
            engine.containers.console.send("c", b"y")
        engine.containers.kill("c")
        assert engine.containers.get("c").state is State.STOPPED
    finally:
        go_on.set()
        writer.join()


def test_a_session_of_a_container_that_goes_meanwhile_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _running(engine)
    id = engine.containers.get("c").id
    sessions = engine.containers.sessions
    permit = sessions._permit

    def slow(container: Any) -> None:
        permit(container)
        engine.containers.remove("c", force=True)

    monkeypatch.setattr(sessions, "_permit", slow)
    with pytest.raises(NotFound):
        sessions.run("c", ["true"])
    assert not (engine.store / "containers" / id).exists() and id not in sessions._table


def test_arguments_larger_than_an_event_are_executed(engine: Engine) -> None:
    _running(engine)
    argv = ["sleep", "inf", "\n" * 60_000]  # 120 kB as JSON
    session = engine.containers.sessions.run("c", argv)
    assert session.argv == tuple(argv) and session.state == "running"
    (told,) = (event.data["argv"] for event in engine.journal.replay(0, 10_000) if event.type == "execStarted")
    assert told == ["sleep", "inf", "…"]


def test_a_session_that_was_started_keeps_no_thread_waiting_for_its_start(engine: Engine) -> None:
    _running(engine)
    for _ in range(20):
        session = engine.containers.sessions.run("c", ["true"], wait=True)
        engine.containers.sessions.start("c", session.number)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.function.__name__ == "_give_up":  # type: ignore[attr-defined]
            assert thread.finished.is_set()  # cancelled: it is about to end
            thread.join(60)


def test_a_kill_that_was_refused_ends_no_restart_policy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _running(engine, more="restart: always\n")
    id = engine.containers.get("c").id
    execution = engine.containers.execution

    def refuse(container: Any, signum: int) -> None:
        raise Busy("another command on this container is being carried out")

    with monkeypatch.context() as patch:
        patch.setattr(execution, "signal", refuse)
        with pytest.raises(Busy):
            engine.containers.kill("c")
    execution.driver_of(engine.containers.get("c")).signal(id, 9)  # it crashes
    again = engine.containers.records.wait(id, lambda now: now.state is State.RUNNING and now.restarts == 1, 60)
    assert again is not None and again.restarts == 1


def test_anonymous_volumes_go_though_the_daemon_ended_in_between(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with Engine(store, runtime="fake") as engine:
        add_image(engine, IMAGE)
        for name in ("gone", "there"):
            _running(engine, name, "volumes: [/data]\n")
            engine.containers.stop(name, 0)
        assert len(engine.volumes.names()) == 2 and not engine.volumes.unused()
        engine.volumes.remove_anonymous = lambda id: []  # type: ignore[method-assign]
        engine.containers.remove("gone")
        assert [volume.name for volume in engine.volumes.all() if not engine.volumes.users(volume.name)] == [
            volume.name for volume in engine.volumes.unused()
        ]
    with Engine(store, runtime="fake") as engine:
        (left,) = engine.volumes.names()
        assert engine.volumes.users(left) == ["there"]
        engine.containers.remove("there")
        assert engine.volumes.names() == []


def test_a_probe_that_stumbles_is_made_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    health = engine.containers.health

    def ask(container: Any, check: Any) -> tuple[int, bytes]:
        asked.append(container.name)
        if len(asked) == 1:
            raise ValueError("not foreseen")
        return 0, b"well"

    monkeypatch.setattr(health, "_ask", ask)
    _running(engine, more="healthcheck: {test: [CMD, 'true'], interval: 10ms}\n")
    subscription = engine.journal.subscribe(since=0)
    for event in subscription:
        if getattr(event, "type", "") == "healthStatus" and event.data["health"] == "healthy":  # type: ignore[union-attr]
            break
    subscription.close()
    assert len(asked) >= 2
