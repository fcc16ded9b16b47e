"""Log lines per second: a container writing as fast as it can, under conmon alone and under our driver with a follower.

Prints JSON lines: {"bench": "logs", "what", "who", "lines", "…_lines_per_second"}. `alone` is conmon and runc as
podman calls them, nobody reading, and `alone, tail -f` with GNU tail on conmon's own file; `ours` is the oci driver,
with rotation at 16 MiB and a follower that reads every byte of the stdout view while it is written, and `ours, unread`
with only what the daemon does once a second. Two cores that write have none to spare for who reads: compare like with
like. `written` counts until the container has ended, `read` until the follower has every line. `cold` rows read a
finished log that nobody has indexed.
Needs root on Linux, runc, conmon and busybox-static. Usage: python tools/bench/logs.py [--lines N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.config import ContainerConfig
from engine.logs import ContainerLogs
from engine.runtimes.base import make_spec
from engine.runtimes.oci import OciRuntime

LINE = "x" * 79


def rootfs(place: Path) -> Path:
    root = place / "rootfs"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for name in ("sh", "yes", "head", "true", "echo"):
        (root / "bin" / name).symlink_to("busybox")
    return root


def burst(place: Path, root: Path, name: str, lines: int, who: str) -> tuple[float, float, int]:
    """(seconds from start to the exit, seconds until the follower had all, lines that arrived)."""
    runtime = OciRuntime(place / "containers", state=place / "state")
    directory = place / "containers" / name
    directory.mkdir(parents=True)
    config = ContainerConfig(command=("sh", "-c", f"yes {LINE} | head -n {lines}"))  # type: ignore[call-arg]
    runtime.create(make_spec(id=name, name=name, directory=directory, rootfs=root, config=config))
    ended = threading.Event()
    exits: list[float] = []
    runtime.watch(name, lambda id, end: (exits.append(time.perf_counter()), ended.set()))
    begin = time.perf_counter()
    runtime.start(name)
    seen = 0
    tail = None
    if who == "alone, tail -f":
        log = directory / "logs" / "ctr.log"
        tail = subprocess.Popen(["tail", "-n", "+1", "-f", str(log)], stdout=subprocess.DEVNULL)
    if who == "ours, unread":
        logs = ContainerLogs(directory / "logs")
        while not ended.wait(1.0):
            logs.size("stdout")
            logs.maybe_rotate(16 << 20, None, lambda: runtime.reopen_log(name))
        seconds = time.perf_counter() - begin
        logs.caught_up("stdout", 60)
        seen = logs.size("stdout") // (len(LINE) + 1)
        logs.close()
    elif who == "ours":
        logs, offset, next_look = ContainerLogs(directory / "logs"), 0, 0.0
        while True:
            over = ended.is_set()
            part = logs.read("stdout", offset, 1 << 17)
            seen += part.count(b"\n")
            offset += len(part)
            if time.monotonic() > next_look:
                next_look = time.monotonic() + 0.2
                logs.maybe_rotate(16 << 20, None, lambda: runtime.reopen_log(name))
            if not part:
                if over and logs.caught_up("stdout", 0):
                    break
                time.sleep(0.005)
        seconds = time.perf_counter() - begin
        assert logs.size("stdout") == offset
        logs.close()
    else:
        ended.wait()
        seconds = time.perf_counter() - begin
        if tail is not None:
            tail.kill()
            tail.wait()
        with (directory / "logs" / "ctr.log").open("rb") as file:
            while data := file.read(1 << 20):
                seen += data.count(b"\n")
    runtime.delete(name)
    runtime.close()
    return exits[0] - begin, seconds, seen


def cold(directory: Path, view: str) -> tuple[float, float, int]:
    """(seconds to index, seconds to read all after that, bytes) of a finished log."""
    logs = ContainerLogs(directory)
    begin = time.perf_counter()
    logs.caught_up(view, 600)
    indexed = time.perf_counter() - begin
    begin, offset, size = time.perf_counter(), 0, logs.size(view)
    while offset < size:
        offset += len(logs.read(view, offset, 1 << 17))
    done = time.perf_counter() - begin
    logs.close()
    return indexed, done, size


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lines", type=int, default=1_000_000)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    try:
        root = rootfs(place)
        for number in range(given.rounds):
            for place_in_row, who in enumerate(("alone", "ours, unread", "alone, tail -f", "ours")):
                exited, seconds, seen = burst(place, root, f"c{place_in_row}-{number}", given.lines, who)
                row = {"bench": "logs", "what": "burst", "who": who, "round": number, "lines": seen}
                row |= {"written_lines_per_second": round(seen / exited)}
                print(json.dumps(row | {"read_lines_per_second": round(seen / seconds)} if who == "ours" else row))
        directory = place / "containers" / "c0-0" / "logs"
        for view in ("stdout", "all.jsonl"):
            indexed, read, size = cold(directory, view)
            row = {"bench": "logs", "what": "cold", "who": "ours", "view": view, "lines": given.lines, "bytes": size}
            row |= {"index_lines_per_second": round(given.lines / max(indexed, 1e-9))}
            print(json.dumps(row | {"read_lines_per_second": round(given.lines / max(read, 1e-9))}))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
