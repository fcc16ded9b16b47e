"""From start to the first log line: through the mount and by our driver, against `runc run` of the same bundle.

Prints JSON lines: {"bench": "start", "who", "median_ms", "p90_ms", "rounds"}. Rows: `runc run` of the very config.json,
until its first line has come through a pipe; `create+start` by the oci driver, until that line is in the stdout view;
`start` the same for a container created before; `mount`: from the write of `start` to containers/<n>/ctl of a live
mount until the line is read from logs/stdout there, on a root of image and overlay, with loopback alone; and the same
in a network of its own, the only container there. Alternating, so that all see the
same machine.
Needs root on Linux, runc, conmon and busybox-static. Usage: python tools/bench/start.py [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox
from logs import rootfs
from mounting import Daemon

from engine.config import ContainerConfig
from engine.engine import Engine
from engine.logs import ContainerLogs
from engine.runtimes import spec
from engine.runtimes.base import RunSpec, make_spec
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.oci import OciRuntime


def prepared(place: Path, root: Path, name: str) -> RunSpec:
    directory = place / "containers" / name
    directory.mkdir(parents=True)
    config = ContainerConfig(command=("echo", "hello"))  # type: ignore[call-arg]
    return make_spec(id=name, name=name, directory=directory, rootfs=root, config=config)


def bare(place: Path, root: Path, name: str) -> float:
    """Seconds until the first line of `runc run`."""
    run = prepared(place, root, name)
    spec.prepare(run)
    (run.directory / "config.json").write_text(json.dumps(spec.build(run, Cgroups.detect())))
    argv = ["runc", "--root", str(place / "bare"), "run", "--bundle", str(run.directory), name]
    begin = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hello\n"
        return time.perf_counter() - begin


def ours(runtime: OciRuntime, place: Path, root: Path, name: str) -> tuple[float, float]:
    """Seconds of create + start, and of start alone, until the first line is in the view."""
    run = prepared(place, root, name)
    begin = time.perf_counter()
    runtime.create(run)
    logs = ContainerLogs(run.log.parent)
    created = time.perf_counter()
    runtime.start(name)
    while logs.read("stdout", 0, 100) != b"hello\n":
        time.sleep(0.0002)
    end = time.perf_counter()
    logs.close()
    runtime.delete(name)
    return end - begin, end - created


def through_mount(daemon: Daemon, name: str, network: str = "none") -> float:
    """Seconds from `echo start > ctl` to the first byte of the log, both through the mount."""
    container = daemon.mount / "containers" / name
    container.mkdir()
    (container / "config.yaml").write_text(f"image: busybox\ncommand: [echo, hello]\nnetworks: [{network}]\n")
    begin = time.perf_counter()
    (container / "ctl").write_text("start\n")
    while (container / "logs/stdout").read_bytes() != b"hello\n":
        time.sleep(0.0002)
    seconds = time.perf_counter() - begin
    while (container / "state").read_text() != "stopped\n":
        time.sleep(0.005)
    container.rmdir()
    return seconds


def row(who: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    p90 = ordered[int(len(ordered) * 0.9)]
    facts = {
        "bench": "start",
        "who": who,
        "rounds": len(seconds),
        "median_ms": round(1e3 * statistics.median(ordered), 1),
    }
    print(json.dumps(facts | {"p90_ms": round(1e3 * p90, 1)}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=30)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    runtime = OciRuntime(place / "containers", state=place / "state")
    with Engine(place / "mounted" / "store", runtime="oci") as engine:
        add_busybox(engine)
    daemon = Daemon(place / "mounted", runtime="oci")
    try:
        root = rootfs(place)
        print(json.dumps({"bench": "start", "probe": runtime.probe().reason, "version": runtime.probe().version}))
        daemon.start()
        plain, both, only, mounted, networked = [], [], [], [], []
        (daemon.mount / "networks" / "bench").mkdir()
        for number in range(given.rounds):
            plain.append(bare(place, root, f"bare{number}"))
            whole, start = ours(runtime, place, root, f"ours{number}")
            both.append(whole)
            only.append(start)
            mounted.append(through_mount(daemon, f"mount{number}"))
            networked.append(through_mount(daemon, f"networked{number}", "bench"))
        row("runc run", plain)
        row("create+start", both)
        row("start", only)
        row("mount", mounted)
        row("mount, in a network", networked)
    finally:
        daemon.stop()
        runtime.close()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
