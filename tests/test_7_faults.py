"""A killed daemon and a full disk: what was acknowledged is there afterwards, what was not is gone or can be repeated.

Every test kills a real daemon with SIGKILL in the middle of something, brings it up again and looks at everything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dutchman import Dutchman, demo_archive, needs_oci, wait_for

from engine import hostmounts
from engine.lifecycle import TRANSITIONS, State
from engine.runtimes import pids
from engine.store.check import check
from engine.store.meta import Meta

MEGABYTE = 1 << 20
FILES = 24  # of 4 MB in the big layer
SLOW = bool(os.environ.get("DUTCHMAN_SLOW_TESTS"))
# what a daemon says about the work its predecessor could not finish
AFTERMATH = r"WARNING.*(daemon|killed|reconcil|interrupt|left|stale|tmp/|orders end)"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A docker-archive whose layer takes long enough to be interrupted: 96 MB that do not compress."""
    needs_oci()
    base = tmp_path_factory.mktemp("big")
    (base / "root").mkdir()
    for number in range(FILES):
        (base / "root" / f"{number:02}").write_bytes(os.urandom(4 * MEGABYTE))
    subprocess.run(["tar", "-C", str(base / "root"), "-cf", str(base / "layer.tar"), "."], check=True)
    with open(base / "layer.tar", "rb") as layer:
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    (base / "config.json").write_text(json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}))
    listed = [{"Config": "config.json", "RepoTags": ["big:1"], "Layers": ["layer.tar"]}]
    (base / "manifest.json").write_text(json.dumps(listed))
    with tarfile.open(base / "big.tar", "w") as tar:
        for name in ("manifest.json", "config.json", "layer.tar"):
            tar.add(base / name, name)
    (base / "layer.tar").unlink()
    return base / "big.tar"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path) as engine:
        engine.expect(AFTERMATH)
        engine.up()
        yield engine


@pytest.fixture
def demo(engine: Dutchman) -> Dutchman:
    engine.cli("load", str(demo_archive()))
    return engine


def background(action: Callable[[], object]) -> threading.Thread:
    """Do something that the death of the daemon will interrupt."""

    def attempt() -> None:
        try:
            action()
        except OSError as error:
            assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV, errno.EINTR), error

    thread = threading.Thread(target=attempt)
    thread.start()
    return thread


def consistent(engine: Dutchman, *, over: bool = True) -> None:
    """Events without a gap, only legal steps of containers, nothing in between states, and a sound store.

    Nothing may run, and it is down afterwards, unless the test is not `over`.
    """
    events = [json.loads(line) for line in engine.read("events").splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    last: dict[str, str] = {}
    for event in events:
        if event["type"] == "stateChanged" and event["object"].startswith("container/") and event.get("from"):
            assert event["to"] in TRANSITIONS[State(event["from"])], event
            assert last.get(event["object"], event["from"]) == event["from"], event
            last[event["object"]] = event["to"]
    for name in os.listdir(engine.mount / "containers"):
        if (engine.mount / "containers" / name).is_dir():
            assert engine.state(name) in ("created", "running", "stopped", "paused")
    engine.cli("down")
    meta = Meta(engine.store / "db.sqlite")
    try:
        assert check(engine.store, meta) == []
    finally:
        meta.close()
    assert not [path for path in (engine.store / "tmp").iterdir() if not path.name.startswith("partial-")]
    if not over:
        engine.up()


def busy_bytes(engine: Dutchman) -> int:
    """Bytes of what is in the making."""
    total = 0
    for folder, _, names in os.walk(engine.store / "tmp"):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                pass  # it has just become visible or was dropped
    return total


def whole(engine: Dutchman, image: str) -> None:
    """All of the big image is there and right."""
    assert engine.job_of(f"images/{image}", "verify") == ("done", "")
    sizes = {path.name: path.stat().st_size for path in (engine.mount / "images" / image / "rootfs").iterdir()}
    assert sizes == {f"{number:02}": 4 * MEGABYTE for number in range(FILES)}


# --- kill -9 in the middle of … -------------------------------------------------------------------------------------


def test_an_ingest(engine: Dutchman, archive: Path) -> None:
    with open(engine.mount / "images" / "ctl", "w") as ctl:
        ctl.write(f"load {archive}\n")
    wait_for(lambda: busy_bytes(engine) > 20 * MEGABYTE, what="the load is under way")
    engine.kill()
    engine.up()
    assert engine.read("jobs/1/state") == "failed" and "daemon" in engine.read("jobs/1/error")
    assert os.listdir(engine.mount / "images" / "by-digest") == []
    assert engine.job(f"load {archive}") == ("done", "")
    whole(engine, "big:1")
    consistent(engine)


def test_a_pull(engine: Dutchman, archive: Path, tmp_path: Path) -> None:
    registry_module = pytest.importorskip("registry")
    if not registry_module.available():
        pytest.skip("needs docker-registry and skopeo")
    with registry_module.Registry(tmp_path) as registry:
        registry.push_archive(archive, "big:1")
        name = registry.name("big:1")
        with open(engine.mount / "images" / "ctl", "w") as ctl:
            ctl.write(f"pull {name}\n")
        wait_for(lambda: busy_bytes(engine) > 20 * MEGABYTE, what="the pull is under way")
        engine.kill()
        engine.up()
        assert engine.read("jobs/1/state") in ("running", "done")  # it goes on by itself
        wait_for(lambda: engine.read("jobs/1/state") != "running", seconds=60, what="the pull ends")
        assert engine.read("jobs/1/state") == "done"
        whole(engine, name)
    consistent(engine)


# at each step of it: test_4_engine_killed
@pytest.mark.parametrize("delay", [0.01, 0.05, 0.12] if SLOW else [0.05])
def test_a_start(demo: Dutchman, delay: float) -> None:
    demo.make("web", "echo begin; exec sleep 1000")
    starting = background(lambda: demo.write("containers/web/ctl", "start"))
    time.sleep(delay)
    demo.kill()
    starting.join(20)
    demo.up()
    state = demo.state("web")
    assert state in ("created", "running", "stopped")
    consistent(demo, over=False)
    if state == "running":
        assert os.path.exists(f"/proc/{demo.read('containers/web/pid').strip()}")
    else:
        demo.write("containers/web/ctl", "start")
    demo.await_state("web", "running")
    wait_for(lambda: "begin" in demo.read("containers/web/logs/stdout"), what="it runs")
    demo.write("containers/web/ctl", "stop 0")
    assert demo.state("web") == "stopped"


def test_a_stop(demo: Dutchman) -> None:
    demo.make("web", "trap 'echo asked; sleep 1; echo bye; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    demo.write("containers/web/ctl", "start")
    wait_for(lambda: "ready" in demo.read("containers/web/logs/stdout"), what="it runs")
    stopping = background(lambda: demo.write("containers/web/ctl", "stop 10"))
    wait_for(lambda: "asked" in demo.read("containers/web/logs/stdout"), what="it was asked to stop")
    demo.kill()
    stopping.join(20)
    demo.up()
    demo.await_state("web", "stopped")
    assert demo.read("containers/web/exit_code") == "9"
    lines = demo.read("containers/web/logs/stdout").splitlines()  # the new daemon may ask a second time
    assert lines[0] == "ready" and set(lines[1:-1]) == {"asked"} and lines[-1] == "bye"
    consistent(demo)


def test_a_log_burst(demo: Dutchman) -> None:
    """Numbered lines on both streams, with rotation in between: not one is lost, doubled or out of order."""
    script = "i=0; while [ $i -lt 40 ]; do seq $((i * 1000 + 1)) $((i * 1000 + 1000)); echo err $i >&2; i=$((i + 1));"
    demo.make("web", script + " sleep 0.05; done; exit 42")
    demo.write("containers/web/config/log_max_size", "64k")
    demo.write("containers/web/ctl", "start")
    for _ in range(2):
        time.sleep(0.5)
        demo.kill()
        time.sleep(0.3)
        demo.up()
    demo.await_state("web", "stopped", seconds=40)
    assert demo.read("containers/web/exit_code") == "42"
    lines = demo.read("containers/web/logs/stdout").splitlines()
    assert len(lines) == 40000 and lines == [str(number) for number in range(1, 40001)]
    assert demo.read("containers/web/logs/stderr").splitlines() == [f"err {number}" for number in range(40)]
    records = [json.loads(line) for line in demo.read("containers/web/logs/all.jsonl").splitlines()]
    joined = "".join(r["line"] + "\n" * ("partial" not in r) for r in records if r["stream"] == "stdout")
    assert joined.splitlines() == lines
    consistent(demo)


def test_a_follower_of_a_log_goes_on_after_the_restart(demo: Dutchman) -> None:
    demo.cli("run", "-d", "--name", "web", "demo:1")
    wait_for(lambda: "tick 1" in demo.read("containers/web/logs/stdout"), what="it prints")
    demo.kill()
    time.sleep(0.5)
    demo.up()
    wait_for(lambda: "tick 4" in demo.read("containers/web/logs/stdout"), what="it prints again")
    ticks = [line for line in demo.read("containers/web/logs/stdout").splitlines() if line.startswith("tick")]
    assert ticks == [f"tick {number}" for number in range(1, len(ticks) + 1)]


def test_an_exit_while_nobody_looks(demo: Dutchman) -> None:
    demo.make("web", "sleep 0.5; echo last words; exit 42")
    demo.write("containers/web/ctl", "start")
    pid = int(demo.read("containers/web/pid"))
    demo.kill()
    wait_for(lambda: pids.start_time(pid) is None, what="it has ended")
    demo.up()
    demo.await_state("web", "stopped")
    assert demo.read("containers/web/exit_code") == "42"
    assert demo.read("containers/web/logs/stdout") == "last words"
    consistent(demo)


def test_what_was_acknowledged_is_there(demo: Dutchman) -> None:
    """Each of these writes returned before the daemon was killed."""
    for number in range(2):
        (demo.mount / "containers" / f"c{number}").mkdir()
        demo.write(f"containers/c{number}/config/env", f"N={number}")
        (demo.mount / "volumes" / f"v{number}").mkdir()
        (demo.mount / "volumes" / f"v{number}" / "data" / "file").write_text(str(number))
        demo.kill()
        demo.up()
        for back in range(number + 1):
            assert f"N={back}" in demo.read(f"containers/c{back}/config/env")
            assert demo.read(f"volumes/v{back}/data/file") == str(back)
    consistent(demo)


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Dutchman]:
    """A store on a tmpfs of 48 MiB."""
    needs_oci()
    disk = tmp_path / "disk"
    disk.mkdir()
    hostmounts.mount("tmpfs", disk, "tmpfs", 0, f"size={48 * MEGABYTE}")
    try:
        with Dutchman(tmp_path, store=disk / "store") as engine:
            engine.expect(r"full|No space|NoSpace|ENOSPC")
            engine.up()
            yield engine
    finally:
        hostmounts.unmount(disk)


def test_an_ingest_that_does_not_fit_leaves_nothing(small: Dutchman, archive: Path) -> None:
    free = os.statvfs(small.store).f_bavail
    state, error = small.job(f"load {archive}")
    assert state == "failed" and ("full" in error or "No space" in error)
    assert os.listdir(small.mount / "images" / "by-digest") == []
    wait_for(lambda: os.statvfs(small.store).f_bavail > free * 0.9, what="the room is given back")
    assert small.job(f"load {demo_archive()}") == ("done", "")
    assert small.read("images/demo:1/rootfs/srv/hello.txt") == "Hello from version 1."


def test_changes_on_a_full_disk_fail_and_work_again_when_there_is_room(small: Dutchman) -> None:
    (small.mount / "containers" / "before").mkdir()
    filler = small.store.parent / "filler"
    with open(filler, "wb", buffering=0) as handle, pytest.raises(OSError, match="No space"):
        while True:
            handle.write(b"\0" * 4096)
    made = 0
    with pytest.raises(OSError) as caught:  # some room is left inside the catalog's own pages
        for made in range(3000):
            (small.mount / "containers" / f"c{made}").mkdir()
    assert caught.value.errno == errno.ENOSPC
    assert small.state("before") == "created" and "c" in small.read("status")
    filler.unlink()
    (small.mount / "containers" / "after").mkdir()
    small.kill()
    small.up()
    names = {name for name in os.listdir(small.mount / "containers") if name[0] in "abc"} - {"ctl"}
    assert names >= {"before", "after", *(f"c{number}" for number in range(made))}
