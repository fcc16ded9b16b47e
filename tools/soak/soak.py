"""Load and endurance through the real mount: nothing may be lost, nothing may be left behind.

Prints JSON lines, {"soak": phase, …}; the last one has "failures". Exit status 1 when a line or event was lost or
something leaked. Phases, each bounded by its count:

    many       N containers created, started, followed, stopped and removed by S parallel shells, all running at once
    stopped    N stopped containers: ls, ps, start-up of the daemon over them, its memory; then all are removed
    followers  N followers of one log that grows by so many MB a second, for some seconds
    cycles     N starts and stops by S shells: file descriptors, threads, memory, mounts, namespaces, cgroups, processes

A follower of `events` reads along all the time and must have what a reader of the whole file gets afterwards.
Needs root on Linux, runc or crun, conmon and busybox-static; --runtime vm also what tools/setup test installs for it.
Usage: python tools/soak/soak.py [--many 200] [--stopped 1000] [--followers 100] [--cycles 1000] … ; 0 leaves one out
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox
from guestkernel import copy_kernels
from mounting import Daemon

from engine import hostmounts
from engine.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
LINES = 100  # a container of `many` prints so many, and one more when it is told to stop
PATIENCE = 120.0  # seconds for anything that should take one
STATES = ("starting", "running", "stopping", "stopped", "removing", "removed")

# $1: output directory; the rest: names. Runs in the mount. set -e: a refused write ends it with a message.
MANY = r"""
set -euo pipefail
out=$1; shift
for name; do
    mkdir "containers/$name"
    cat > "containers/$name/config.yaml" <<'END'
image: busybox
command:
  - sh
  - -c
  - |
    trap 'echo last; exit 7' TERM
    i=0; while [ $i -lt LINES ]; do echo line $i; i=$((i+1)); done
    while :; do sleep 60 & wait; done
END
    echo start > "containers/$name/ctl"
done
for name; do
    tail -n +1 -s 0.1 -f "containers/$name/logs/stdout" > "$out/$name" & tail=$!
    until grep -q "line $((LINES - 1))" "$out/$name"; do sleep 0.05; done
    [ "$(cat "containers/$name/state")" = running ]
    echo stop > "containers/$name/ctl"
    until grep -q last "$out/$name"; do sleep 0.05; done
    kill $tail; wait $tail || true
    [ "$(cat "containers/$name/state")" = stopped ]
    [ "$(cat "containers/$name/exit_code")" = 7 ]
    rmdir "containers/$name"
done
""".replace("LINES", str(LINES))

STOPPED = r"""
set -euo pipefail
for name; do
    mkdir "containers/$name"
    printf 'image: busybox\ncommand: ["true"]\n' > "containers/$name/config.yaml"
    echo start > "containers/$name/ctl"
    until [ -n "$(cat "containers/$name/wait")" ]; do :; done
done
"""

CYCLES = r"""
set -euo pipefail
name=$1 rounds=$2
for _ in $(seq "$rounds"); do
    echo start > "containers/$name/ctl" || { cat "containers/$name/error"; exit 1; }
    while [ "$(cat "containers/$name/state")" = starting ]; do sleep 0.05; done
    [ "$(cat "containers/$name/state")" = running ]
    echo 'stop 5' > "containers/$name/ctl"
    while [ "$(cat "containers/$name/state")" = stopping ]; do sleep 0.05; done
    [ "$(cat "containers/$name/state")" = stopped ]
done
"""


class Soak:
    """One daemon on a store of its own, and what went wrong so far."""

    def __init__(self, place: Path, shells: int, runtime: str = "oci") -> None:
        self.place, self.shells = place, shells
        self.failures: list[str] = []
        with Engine(place / "store", runtime="oci") as engine:
            add_busybox(engine)
        if runtime == "vm":
            copy_kernels(place / "store")
        self.daemon = Daemon(place, runtime=runtime)
        self.begin = time.monotonic()

    def say(self, phase: str, **facts: Any) -> None:
        print(json.dumps({"soak": phase, "at_s": round(time.monotonic() - self.begin, 1), **facts}), flush=True)

    def check(self, fine: bool, what: str) -> None:
        if not fine:
            self.failures.append(what)

    def file(self, *parts: str) -> Path:
        return self.daemon.mount.joinpath(*parts)

    def in_shells(self, script: str, calls: list[list[str]]) -> float:
        """Run a script with each list of arguments, all at the same time; seconds. What fails is a failure."""
        begin = time.monotonic()
        running = [
            subprocess.Popen(
                ["bash", "-c", script, "soak", *arguments],
                cwd=self.daemon.mount,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for arguments in calls
        ]
        for process in running:
            said = process.communicate()[0].decode(errors="replace")
            self.check(process.returncode == 0, f"a shell ended with {process.returncode}: {said[-500:]}")
        return time.monotonic() - begin

    def shares(self, names: list[str]) -> list[list[str]]:
        return [share for number in range(self.shells) if (share := names[number :: self.shells])]

    # --- phases -----------------------------------------------------------------------------------------------------

    def many(self, count: int) -> None:
        out = self.place / "followed"
        out.mkdir()
        names = [f"many{number}" for number in range(count)]
        seconds = self.in_shells(MANY, [[str(out), *share] for share in self.shares(names)])
        wanted = "".join(f"line {number}\n" for number in range(LINES)) + "last\n"
        lost = [name for name in names if not (out / name).exists() or (out / name).read_text() != wanted]
        self.check(not lost, f"followers of {len(lost)} containers missed lines: {lost[:5]}")
        seen: dict[str, list[str]] = collections.defaultdict(list)
        for event in self.events():
            if event["type"] == "stateChanged" and str(event.get("name", "")).startswith("many"):
                seen[event["name"]].append(event["to"])
        wrong = [name for name in names if not is_within(STATES, seen[name])]
        self.check(not wrong, f"events of {len(wrong)} containers are missing: {wrong[:3]} {seen[(wrong or ['-'])[0]]}")
        left = [name for name in os.listdir(self.file("containers")) if name.startswith("many")]
        self.check(not left, f"not removed: {left[:5]}")
        self.say("many", containers=count, shells=self.shells, seconds=round(seconds, 1), **self.held())

    def stopped(self, count: int) -> None:
        before = self.held()
        names = [f"stopped{number}" for number in range(count)]
        made = self.in_shells(STOPPED, self.shares(names))
        full = self.held()
        ls, listed = timed(lambda: os.listdir(self.file("containers")))
        self.check(set(names) <= set(listed), "ls containers does not show them all")
        command = [sys.executable, "-m", "fdfs", "ps", "-a", "--mount", str(self.daemon.mount)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ps, done = timed(lambda: subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600))
        self.check(
            done.returncode == 0 and sum("stopped" in line for line in done.stdout.splitlines()) >= count,
            f"ps does not show them all: {done.stderr[-300:]}",
        )
        self.daemon.stop()
        up, _ = timed(self.daemon.start)
        fresh = self.held()
        remove = 'set -e; for name; do rmdir "containers/$name"; done'
        removed = self.in_shells(remove, self.shares(names))
        self.say(
            "stopped",
            containers=count,
            made_s=round(made, 1),
            removed_s=round(removed, 1),
            ls_ms=round(1e3 * ls, 1),
            ps_s=round(ps, 2),
            start_up_s=round(up, 2),
            rss_before_mb=before["rss_mb"],
            rss_with_all_mb=full["rss_mb"],
            rss_after_start_mb=fresh["rss_mb"],
        )

    def followers(self, count: int, rate: float, seconds: float) -> None:
        """`rate` in MB/s. Every follower must read every byte, and bytes are what the container wrote."""
        rounds = max(1, int(seconds * 10))
        block = int(rate * 1e6 / 10 / 100)  # lines of 100 bytes in a tenth of a second
        script = (
            f"i=0; while [ $i -lt {rounds} ]; do yes {'x' * 99} | head -n {block}; "
            'echo "block $i"; i=$((i+1)); usleep 40000; done; echo end'
        )
        box = self.file("containers", "loud")
        box.mkdir()
        (box / "config.yaml").write_text(json.dumps({"image": "busybox", "command": ["sh", "-c", script]}))
        (box / "ctl").write_text("start\n")
        log = box / "logs" / "stdout"
        wanted = zlib.crc32(
            b"".join(b"x" * 99 + b"\n" for _ in range(block)) + b"block 0\n"
        )  # of the first block; the whole is compared with a last reader's
        crcs, sizes, firsts = [0] * count, [0] * count, [0] * count
        fds = [os.open(log, os.O_RDONLY) for _ in range(count)]
        # 10 MB/s for all of them together: what a busy machine manages at the least
        ended, began, deadline = 0.0, time.monotonic(), time.monotonic() + PATIENCE + count * rate * seconds / 10
        first = block * 100 + 8
        try:
            while time.monotonic() < deadline:
                moved = False
                for number, fd in enumerate(fds):
                    data = os.read(fd, min(1 << 20, first - sizes[number]) if sizes[number] < first else 1 << 20)
                    if not data:
                        continue
                    moved = True
                    crcs[number] = zlib.crc32(data, crcs[number])
                    sizes[number] += len(data)
                    if sizes[number] == first:
                        firsts[number] = crcs[number]
                if not ended and (box / "state").read_text() == "stopped\n":
                    ended = time.monotonic() - began
                total = os.stat(log).st_size
                if ended and not moved and min(sizes) == max(sizes) == total:
                    break
                if not moved:
                    time.sleep(0.02)
        finally:
            for fd in fds:
                os.close(fd)
        took = time.monotonic() - began
        whole = rounds * block * 100 + sum(len(f"block {number}\n") for number in range(rounds)) + len("end\n")
        self.check(total == whole, f"the log has {total} bytes, not {whole}")
        self.check(set(sizes) == {total}, f"followers have {min(sizes)} to {max(sizes)} of {total} bytes")
        self.check(len(set(crcs)) == 1 and crcs[0] == crc_of(log), "followers read something else than the log")
        self.check(set(firsts) == {wanted}, "the log does not begin with what was written")
        self.say(
            "followers",
            followers=count,
            log_mb=round(whole / 1e6, 1),
            written_mb_per_s=round(whole / 1e6 / max(ended, 1e-3), 1),
            all_read_s=round(took, 1),
            read_mb_per_s=round(sum(sizes) / 1e6 / took, 1),
            **self.held(),
        )
        box.rmdir()

    def cycles(self, count: int) -> None:
        names = [f"cycle{number}" for number in range(min(self.shells, count))]
        for name in names:
            self.file("containers", name).mkdir()
            # the first process of a container does not hear TERM before it has said what to do then
            config = {"image": "busybox", "command": ["sleep", "1000"], "stop_signal": "SIGKILL"}
            self.file("containers", name, "config.yaml").write_text(json.dumps(config))
        each, warm = max(1, count // len(names)), max(1, count // len(names) // 10)
        self.in_shells(CYCLES, [[name, str(warm)] for name in names])
        before = self.settled()
        seconds = self.in_shells(CYCLES, [[name, str(each)] for name in names])
        after = self.settled()
        done = each * len(names)
        grown = {key: round(after[key] - before[key], 1) for key in before}
        # a thread of the mount stays once it was needed, with its connections to the catalog
        self.check(grown["threads"] <= 32, f"threads: {before['threads']} -> {after['threads']}")
        self.check(grown["fds"] <= 8 + 4 * max(0, grown["threads"]), f"fds: {before['fds']} -> {after['fds']}")
        self.check(grown["rss_mb"] <= 32 + 0.02 * done, f"memory: {before['rss_mb']} -> {after['rss_mb']} MB")
        for key in ("mounts", "cgroups", "processes", "namespaces"):
            self.check(grown[key] <= 0, f"{key}: {before[key]} -> {after[key]}")
        starts = collections.Counter(event.get("name") for event in self.events() if event.get("to") == "running")
        for name in names:
            self.check(
                starts[name] == warm + each, f"{name} was started {warm + each} times, events say {starts[name]}"
            )
            self.file("containers", name).rmdir()
        self.say("cycles", cycles=done, seconds=round(seconds, 1), per_cycle_ms=round(1e3 * seconds / done, 1))
        self.say("held", before=before, after=after)

    # --- what is held -----------------------------------------------------------------------------------------------

    def held(self) -> dict[str, float]:
        """What daemon and containers hold: of this store only, other engines may run beside."""
        assert self.daemon.process is not None
        process = Path("/proc") / str(self.daemon.process.pid)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        words = [str(self.place), *self.ids()]
        points = [f"{point} {kind}" for point, kind, _ in hostmounts.mounts()]
        return {
            "fds": len(os.listdir(process / "fd")),
            "threads": int(status["Threads"]),
            "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
            "mounts": sum(any(word in point for word in words) for point in points),
            "cgroups": sum(any(word in path for word in words) for path in directories("/sys/fs/cgroup")),
            "namespaces": len(namespaces(words)),
            "processes": len(ours(words)),
        }

    def settled(self) -> dict[str, float]:
        """What is held once nothing runs any more: a container is `stopped` a moment before its cgroup is gone."""
        deadline = time.monotonic() + PATIENCE
        while True:
            held = self.held()
            if not (held["cgroups"] or held["namespaces"]) or time.monotonic() > deadline:
                return held
            time.sleep(0.1)

    def ids(self) -> list[str]:
        """Of every container there ever was."""
        found = {
            event["object"].partition("/")[2] for event in self.events() if event["object"].startswith("container/")
        }
        return sorted(found)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file("events").read_bytes().splitlines()]


class Follower(threading.Thread):
    """Reads `events` along, through restarts of the daemon."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self.seen, self.offset, self.over = path, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                with open(self._path, "rb", buffering=0) as file:
                    file.seek(self.offset)
                    while not self.over.is_set():
                        data = file.read(1 << 16)
                        self.seen = zlib.crc32(data, self.seen)
                        self.offset += len(data)
                        if not data:
                            self.over.wait(0.05)
            except OSError:  # the daemon is being restarted
                self.over.wait(0.05)


def is_within(wanted: tuple[str, ...], found: list[str]) -> bool:
    """Whether `wanted` occurs in `found`, in order."""
    rest = iter(found)
    return all(word in rest for word in wanted)


def timed(action: Any) -> tuple[float, Any]:
    begin = time.monotonic()
    result = action()
    return time.monotonic() - begin, result


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    return crc


def directories(top: str) -> list[str]:
    return [path for path, _, _ in os.walk(top)]


def ours(words: list[str]) -> list[str]:
    """Processes whose command line names a container or the place, this one and its children left out."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            line = Path("/proc", entry, "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(word in line for word in words):
            found.append(entry)
    return found


def namespaces(words: list[str]) -> set[str]:
    """Namespaces of processes in our containers' cgroups, by (kind, inode)."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            group = Path("/proc", entry, "cgroup").read_text()
            if any(word in group for word in words):
                found |= {os.readlink(f"/proc/{entry}/ns/{kind}") for kind in os.listdir(f"/proc/{entry}/ns")}
        except OSError:
            continue
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--many", type=int, default=200)
    options.add_argument("--stopped", type=int, default=1000)
    options.add_argument("--followers", type=int, default=100)
    options.add_argument("--rate", type=float, default=50.0, help="MB/s that the followed container prints")
    options.add_argument("--seconds", type=float, default=2.0, help="how long it prints")
    options.add_argument("--cycles", type=int, default=1000)
    options.add_argument("--shells", type=int, default=8)
    options.add_argument("--runtime", choices=("oci", "vm"), default="oci")
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-soak-"))
    soak = Soak(place, given.shells, given.runtime)
    try:
        soak.daemon.start()
        follower = Follower(soak.file("events"))
        follower.start()
        if given.many:
            soak.many(given.many)
        if given.followers:
            soak.followers(given.followers, given.rate, given.seconds)
        if given.cycles:
            soak.cycles(given.cycles)
        if given.stopped:
            soak.stopped(given.stopped)
        sequence = [event["seq"] for event in soak.events()]
        soak.check(sequence == list(range(1, len(sequence) + 1)), "the journal has gaps")
        size = soak.file("events").stat().st_size
        deadline = time.monotonic() + PATIENCE
        while follower.offset < size and time.monotonic() < deadline:
            time.sleep(0.05)
        follower.over.set()
        follower.join()
        soak.check(
            (follower.offset, follower.seen) == (size, crc_of(soak.file("events"))),
            "the follower of events missed some",
        )
        log = soak.daemon.log()
        found = log.find("Traceback")
        soak.check(found < 0, f"the daemon's log has a traceback: {log[max(0, found - 300) : found + 4000]}")
        soak.say("end", events=len(sequence), failures=soak.failures)
    finally:
        soak.daemon.stop()
        shutil.rmtree(place, ignore_errors=True)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
