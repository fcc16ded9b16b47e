"""From `echo start` to the first log line, through the mount: a machine that stood by, one from a template, the same
booted, and `oci`.

Prints JSON lines: {"bench": "vmstart", "who", "median_ms", "p90_ms", "rounds", …}, the four alternating, so that all
see the same machine; then whether the aims are met: what stood by within 0.35 of the boot, and within 200 ms of `oci`.
With --clones N: that many machines of 128 MiB are started at once from one template; how long until all run, and what
each takes (PSS of QEMU, MiB). --networks NAME: of the containers (default: none).
Needs root on Linux, runc, conmon, QEMU, busybox-static and a kernel: --kernel FILE, else what tools/setup test fetched.
Usage: python tools/bench/vmstart.py [--rounds N] [--clones N] [--kernel FILE] [--networks NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from guestkernel import stocked
from mounting import Daemon

from engine.runtimes.vm import standbys

WAYS = {
    "standby": "runtime: vm\n",
    "template": "runtime: vm\n",
    "cold": "runtime: vm\nfast_start: false\n",
    "oci": "runtime: oci\n",
}
SECONDS = 120.0  # for whatever is waited for


class Bench(Daemon):
    networks = "none"  # of its containers


def say(who: str, **facts: Any) -> None:
    print(json.dumps({"bench": "vmstart", "who": who} | facts), flush=True)


def until(found: Any, what: str) -> Any:
    end = time.monotonic() + SECONDS
    while not (value := found()):
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {SECONDS:g} s")
        time.sleep(0.0005)
    return value


def make(daemon: Bench, name: str, more: str, command: str) -> Path:
    container = daemon.mount / "containers" / name
    container.mkdir()
    text = f"image: busybox\ncommand: {command}\nnetworks: [{daemon.networks}]\nmemory: 128M\n{more}"
    (container / "config.yaml").write_text(text)
    return container


def started(daemon: Bench, name: str, way: str, templates: Path) -> float:
    """Seconds to the first line."""
    until(lambda: standbys.listing(templates), "a machine that stands by")  # nothing else is going on then
    if way == "template":
        standbys.forget(templates)
    container = make(daemon, name, WAYS[way], "[echo, hello]")
    begin = time.perf_counter()
    (container / "ctl").write_text("start\n")
    until(lambda: (container / "logs/stdout").read_bytes() == b"hello\n", "the line")
    seconds = time.perf_counter() - begin
    until(lambda: (container / "state").read_text() == "stopped\n", "the end")
    how = [line for line in daemon.log().splitlines() if "machine of container" in line]
    if way in ("template", "standby") and not how[-1].rpartition(": ")[2].startswith(way):
        raise SystemExit(f"it was not started so: {how[-1]}")
    container.rmdir()
    return seconds


def row(who: str, seconds: list[float]) -> float:
    ordered = sorted(seconds)
    median = 1e3 * statistics.median(ordered)
    p90 = 1e3 * ordered[int(len(ordered) * 0.9)]
    say(who, median_ms=round(median, 1), p90_ms=round(p90, 1), rounds=len(seconds))
    return median


def shares(pid: int) -> dict[str, float]:
    """MiB: proportional, private and shared memory of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"pss": kib["Pss"] / 1024, "private": private / 1024, "rss": kib["Rss"] / 1024}


def clones(daemon: Bench, count: int) -> None:
    names = [f"clone{number}" for number in range(count)]
    made = [make(daemon, name, WAYS["template"], "[sleep, '1000']") for name in names]
    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda container: (container / "ctl").write_text("start\n"), made))
    for container in made:
        until(lambda container=container: (container / "state").read_text() == "running\n", "all of them")
    say("clones", count=count, seconds=round(time.perf_counter() - begin, 1))
    pids = [int(path.read_text()) for path in daemon.store.glob("containers/*/run/vm/qemu.pid")]
    found = [shares(pid) for pid in pids]
    total = sum(item["pss"] for item in found)
    facts = {kind: round(statistics.mean(item[kind] for item in found), 1) for kind in ("pss", "private", "rss")}
    say("clones", count=len(found), total_pss_mib=round(total), **{f"mean_{kind}_mib": facts[kind] for kind in facts})
    for name in names:
        container = daemon.mount / "containers" / name
        (container / "ctl").write_text("kill\n")
        until(lambda container=container: (container / "state").read_text() == "stopped\n", "the end")
        container.rmdir()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--clones", type=int, default=0)
    options.add_argument("--kernel", type=Path)
    options.add_argument("--networks", default="none")
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    kernel = stocked(place / "store", given.kernel)
    daemon = Bench(place, runtime="oci")
    daemon.networks = given.networks
    try:
        daemon.start()
        say("kernel", version=kernel.version, cpus=os.cpu_count())
        begin = time.perf_counter()
        first = make(daemon, "first", WAYS["template"], "[echo, hello]")
        (first / "ctl").write_text("start\n")
        made = until(lambda: list(kernel.directory.glob("templates/[0-9a-f]*/template.json")), "the template")
        say("first start and its template", seconds=round(time.perf_counter() - begin, 1))
        size = sum(file.stat().st_blocks * 512 for file in made[0].parent.iterdir())
        say("template on disk", mib=round(size / (1 << 20), 1))
        templates = made[0].parent.parent
        again = make(daemon, "again", WAYS["template"], "[echo, hello]")
        (again / "ctl").write_text("start\n")  # from here on one stands by
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in WAYS:
                taken[way].append(started(daemon, f"{way}{number}", way, templates))
        medians = {way: row(way, taken[way]) for way in WAYS}
        ratio, more = medians["standby"] / medians["cold"], medians["standby"] - medians["oci"]
        say("aims", of_cold=round(ratio, 3), more_than_oci_ms=round(more, 1), met=ratio <= 0.35 and more <= 200)
        if given.clones:
            clones(daemon, given.clones)
    except BaseException:
        print(daemon.log()[-4000:], file=sys.stderr)
        raise
    finally:
        daemon.stop()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
