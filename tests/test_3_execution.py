"""Containers that really run (driver oci): output, exits, root filesystem, volumes, limits, what changed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import pytest
from engines import add_busybox, events, eventually, reach

from engine import host, hostmounts
from engine.changes import changes_text
from engine.config import parse_config
from engine.engine import Engine
from engine.errors import Busy, RuntimeFailure
from engine.lifecycle import State

IMAGE = "docker.io/library/busybox:latest"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not (host.LINUX and host.is_root()):
        pytest.skip("containers need root on Linux")
    engine = Engine(tmp_path_factory.mktemp("oci") / "store", runtime="oci")
    if not engine.drivers.probe()[1].ok:
        reason = engine.drivers.probe()[1].reason
        engine.close()
        pytest.skip(f"no OCI runtime: {reason}")
    add_busybox(engine, Cmd=["sh"], Env=["FROM=image"], StopSignal="SIGINT")
    yield engine
    for container in engine.containers.all():
        engine.containers.remove(container.name, force=True)
    engine.close(unmount=True)
    assert not [point for point, _, _ in hostmounts.mounts() if point.startswith(str(engine.store))]


def run(engine: Engine, name: str, *argv: str, **more: object) -> str:
    engine.containers.run(IMAGE, name, list(argv), **more)
    return engine.containers.get(name).id


def out(engine: Engine, name: str, stream: str = "stdout") -> str:
    logs = engine.containers.logs(name)
    logs.caught_up(stream)
    return logs.read(stream, 0, 1 << 20).decode()


def test_it_runs_says_something_and_ends_with_its_code(engine: Engine) -> None:
    id = run(engine, "talk", "sh", "-c", "echo out; echo err >&2; echo $FROM $MINE; pwd; exit 3", env={"MINE": "config"}, workdir="/srv/x")  # fmt: skip  # noqa: E501
    assert engine.containers.wait("talk", 40) == 3
    assert out(engine, "talk") == "out\nimage config\n/srv/x\n" and out(engine, "talk", "stderr") == "err\n"
    moves = [event["to"] for event in events(engine, f"container/{id}") if event["type"] == "stateChanged"]
    assert moves == ["starting", "running", "stopped"]
    told = [event for event in events(engine, f"container/{id}") if event["type"] == "logOutput"]
    assert told[-1]["stdout_end"] == len("out\nimage config\n/srv/x\n") and told[-1]["stderr_end"] == 4


def test_what_cannot_be_executed_ends_as_with_docker(engine: Engine) -> None:
    for name, argv, code in (("none", "/bin/nothing", 127), ("noexec", "/etc/passwd", 126)):
        with pytest.raises(RuntimeFailure):
            run(engine, name, argv)
        found = engine.containers.get(name)
        assert (found.state, found.exit_code) == (State.STOPPED, code), found.reason
        assert argv in found.reason or "exec" in found.reason


def test_the_stop_signal_of_the_image_then_grace_then_sigkill(engine: Engine) -> None:
    run(engine, "polite", "sh", "-c", "trap 'echo bye; exit 5' INT; echo ready; while :; do sleep 0.05; done")
    eventually(lambda: "ready" in out(engine, "polite"))
    engine.containers.stop("polite")
    assert reach(engine, "polite", State.STOPPED).exit_code == 5
    assert out(engine, "polite") == "ready\nbye\n"
    run(engine, "rude", "sh", "-c", "trap '' INT; echo ready; while :; do sleep 0.05; done")
    eventually(lambda: "ready" in out(engine, "rude"))
    engine.containers.stop("rude", 0.2)
    assert reach(engine, "rude", State.STOPPED).exit_code == 137


def test_the_root_filesystem_is_live_when_running_and_when_not(engine: Engine) -> None:
    engine.containers.create("files", parse_config(f"image: {IMAGE}"))
    engine.containers.set_field("files", "command", "sh\n-c\nwhile ! cat /go; do sleep 0.02; done; echo made > /etc/new; rm /etc/group; sleep 100\n")  # fmt: skip  # noqa: E501
    rootfs = engine.containers.rootfs("files")  # before it ever ran
    (rootfs / "before").write_text("put there while created")
    engine.containers.start("files")
    assert engine.containers.rootfs("files") == rootfs
    (rootfs / "go").write_text("now\n")
    eventually(lambda: (rootfs / "etc/new").exists() and not (rootfs / "etc/group").exists())
    engine.containers.kill("files")
    reach(engine, "files", State.STOPPED)
    assert (rootfs / "etc/new").read_text() == "made\n" and (rootfs / "before").exists()
    found = changes_text(engine.containers.changes("files")).decode().splitlines()
    assert "A /before" in found and "M /etc" in found and "A /etc/new" in found and "D /etc/group" in found
    assert not [line for line in found if line.endswith("/etc/passwd")]
    engine.containers.start("files")  # what changed is there again
    eventually(lambda: "now" in out(engine, "files"))


def test_a_directory_replaced_by_another_is_shown_as_what_went_and_what_came(engine: Engine) -> None:
    engine.containers.create("opaque", parse_config(f"image: {IMAGE}"))
    etc = engine.containers.rootfs("opaque") / "etc"
    shutil.rmtree(etc)
    etc.mkdir()
    (etc / "only").touch()
    found = [line for line in changes_text(engine.containers.changes("opaque")).decode().splitlines() if "/etc" in line]
    assert found == ["M /etc", "D /etc/group", "A /etc/only", "D /etc/passwd"]


def test_volumes_keep_their_data_and_read_only_is_read_only(engine: Engine) -> None:
    engine.volumes.create("data")
    run(engine, "writer", "sh", "-c", "echo kept > /data/file", volumes=["data:/data"])
    assert engine.containers.wait("writer", 40) == 0
    assert (engine.volumes.path("data") / "file").read_text() == "kept\n"
    run(engine, "reader", "sh", "-c", "cat /data/file; echo no > /data/file", volumes=["data:/data:ro"])
    assert engine.containers.wait("reader", 10) not in (0, None)
    assert out(engine, "reader") == "kept\n"
    with pytest.raises(Busy, match="reader"):
        engine.volumes.remove("data")
    for name in ("writer", "reader"):
        engine.containers.remove(name)
    engine.volumes.remove("data")


def test_resources_are_told_of_while_it_runs(engine: Engine) -> None:
    id = run(engine, "busy", "sleep", "100", memory="64m")
    stats = eventually(lambda: engine.containers.stats("busy"))
    assert stats["memory_limit_bytes"] == 64 << 20 and stats["pids"] == 1 and stats["memory_bytes"] > 0
    eventually(lambda: [event for event in events(engine, f"container/{id}") if event["type"] == "resourceUpdate"])
    engine.containers.remove("busy", force=True)
    assert not (engine.store / "containers" / id).exists()


def test_pause_freezes_and_a_paused_one_stops(engine: Engine) -> None:
    run(engine, "tick", "sh", "-c", "while :; do echo tick; sleep 0.02; done", stop_signal="KILL")
    eventually(lambda: out(engine, "tick"))
    engine.containers.pause("tick")
    size = -1

    def stands() -> bool:
        nonlocal size
        before, size = size, engine.containers.logs("tick").size("stdout")
        time.sleep(0.3)  # fifteen ticks; what conmon had yet to write down comes in the beginning
        return size == before

    eventually(stands)
    engine.containers.resume("tick")
    eventually(lambda: engine.containers.logs("tick").size("stdout") > size)
    engine.containers.pause("tick")
    engine.containers.stop("tick")
    assert reach(engine, "tick", State.STOPPED).exit_code == 137


def test_logs_are_rotated_while_it_runs_and_the_logical_file_only_grows(engine: Engine) -> None:
    engine.containers.create("loud", parse_config(f"image: {IMAGE}\nlog_max_size: 64k\n"))
    engine.containers.set_field("loud", "command", "sh\n-c\ni=0; while [ $i -lt 6 ]; do yes abcdefgh | head -n 3000; i=$((i+1)); sleep 0.4; done\n")  # fmt: skip  # noqa: E501
    id = engine.containers.get("loud").id
    engine.containers.start("loud")
    engine.containers.wait("loud", 40)
    logs = engine.containers.logs("loud")
    logs.caught_up("stdout", 5)
    assert logs.size("stdout") == 6 * 3000 * 9
    assert logs.read("stdout", 0, 1 << 20) == b"abcdefgh\n" * 18000
    assert len(os.listdir(engine.store / "containers" / id / "logs")) > 1
