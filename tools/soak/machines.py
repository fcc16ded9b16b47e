"""Endurance of virtual machines: N starts in one daemon, each ended in another way; nothing may be left behind.

Prints JSON lines: every `--look` starts, with nothing running, what is held (of this store only: other engines may run
beside); the last line has "failures". Exit status 1 when a machine did not end as it should, or something leaked.
Three containers take turns: one without networks, one in a network with a port and a volume (both from a template and
the machine that stands by), one that boots; each is removed and made anew now and then.
On a machine that is shared: --after FILE begins no cycle while somebody has FILE locked (flock(2)), --within FILE
holds a shared lock on FILE meanwhile.
Needs root on Linux and what tools/setup test installs. Usage: python tools/soak/machines.py [--cycles 500]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from guestkernel import copy_kernels
from test_7_networks import Harbour

from engine import host, hostmounts

MARK = "DUTCHMAN_SOAK"  # in the environment of the daemon and of all it starts
PATIENCE = 120.0  # seconds for anything that should take one
LIFE = """trap 'echo bye; exit 6' TERM
echo up
while ! [ -e /end ]; do sleep 0.1; done
exit 7"""
COMMON: dict[str, Any] = {"image": "busybox", "memory": "64m", "stop_grace_period": 60, "command": ["sh", "-c", LIFE]}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"networks": ["none"]},
    "linked": {"networks": ["dutchman"], "ports": ["127.0.0.1:8181:80"], "volumes": ["data:/data"]},
    "cold": {"networks": ["none"], "fast_start": False},
}
ENDS = {  # how a run ends, and its exit codes then
    "stop": {6},
    "kill": {137},
    "exit": {7},
    "kill-qemu": {137},
    "pause-stop": {6},
    "kill-owner": {137},
    "exec-stop": {6},
    "pause-kill": {137},
    "kill-conmon": {137, 255},
    "pause-resume-exit": {7},
    "restart-kill": {137},
}
# what must be as it was; of the others more may be held, within bounds
EXACT = ("processes", "zombies", "mounts", "cgroups", "namespaces", "links", "loops", "boot_files", "shm")


class Machines:
    def __init__(self, place: Path, after: Path | None, within: Path | None) -> None:
        self.place, self.after, self.within, self.failures = place, after, within, list[str]()
        self.daemon = Harbour(place, runtime="vm")
        self.daemon._env |= {MARK: str(os.getpid()), "DUTCHMAN_STANDBY": "1"}
        copy_kernels(place / "store")
        self.begin = time.monotonic()
        self.begun = collections.Counter[str]()
        self.how = collections.Counter[str]()  # machines came to be
        self.fds: dict[str, list[int]] = collections.defaultdict(list)  # of processes of a running machine

    def say(self, what: str, **facts: Any) -> None:
        print(json.dumps({"soak": what, "at_s": round(time.monotonic() - self.begin, 1), **facts}), flush=True)

    def file(self, *parts: str) -> Path:
        return self.daemon.mount.joinpath(*parts)

    def read(self, *parts: str) -> str:
        return self.file(*parts).read_text().strip()

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {self.daemon.log()[-3000:]}")
            time.sleep(0.05)

    def tell(self, name: str, verb: str) -> None:
        try:
            self.file("containers", name, "ctl").write_text(f"{verb}\n")
        except OSError as error:
            said = self.read("containers", name, "error")
            raise RuntimeError(f"{verb} of {name}: {error}: {said}") from error

    def state(self, name: str, wanted: str) -> None:
        self.until(lambda: self.read("containers", name, "state") == wanted, f"{name} is not {wanted}")

    # --- one run ----------------------------------------------------------------------------------------------------

    def make(self, name: str) -> None:
        self.file("containers", name).mkdir()
        self.file("containers", name, "config.yaml").write_text(json.dumps(COMMON | SHAPES[name]))

    def runs(self, name: str) -> Path:
        """It prints, so its trap is set. Where its run's files are."""
        run = self.place / "store" / "containers" / self.read("containers", name, "id") / "run"
        self.begun[name] += 1
        log, wanted = self.file("containers", name, "logs", "stdout"), self.begun[name]
        self.until(lambda: log.read_bytes().count(b"up\n") >= wanted, f"{name} does not print")
        self.state(name, "running")
        self.how[(run / "vm" / "how").read_text().split()[0].rstrip(":")] += 1
        return run

    def cycle(self, name: str, end: str) -> None:
        box = self.file("containers", name)
        try:
            self.tell(name, "start")
        except RuntimeError as error:
            if "still has its disk mounted" not in str(error) or str(self.place) in str(error).partition("(")[2]:
                raise
            self.say("kept", by=str(error)[-300:])  # somebody else's process: they may have copies of all mounts
            time.sleep(5)
            self.tell(name, "start")
        run = self.runs(name)
        facts = json.loads((run / "facts.json").read_text())
        pids = {"conmon": facts["conmon"], "owner": facts["pid"], "qemu": int((run / "vm" / "qemu.pid").read_text())}
        for kind, pid in pids.items():
            self.fds[f"{name} {kind}"].append(len(os.listdir(f"/proc/{pid}/fd")))
        (box / "rootfs" / "note").write_text(end)
        first, _, last = end.partition("-")
        if first == "exec":
            (box / "exec" / "ctl").write_text("run echo hello\n")
            (number,) = [entry for entry in os.listdir(box / "exec") if entry.isdigit()]
            self.until(lambda: (box / "exec" / number / "state").read_text() == "stopped\n", "exec does not end")
            (box / "exec" / number).rmdir()
        elif first == "pause":
            self.tell(name, "pause")
            if last.startswith("resume"):
                self.tell(name, "resume")
        elif first == "restart":
            self.tell(name, "restart")
            self.runs(name)
        if last in pids:
            os.kill(pids[last], signal.SIGKILL)
        elif "exit" in (first, last.removeprefix("resume-")):
            (box / "rootfs" / "end").touch()
        else:
            self.tell(name, last or first)
        self.state(name, "stopped")
        code = int(self.read("containers", name, "exit_code"))
        if code not in ENDS[end]:
            self.failures.append(f"{name} {end}: exit code {code}: {self.read('containers', name, 'error')}")
        why = json.loads(self.read("containers", name, "events").splitlines()[-1]).get("reason", "")
        if last in pids and "ended" not in why and "was killed" not in why:
            self.failures.append(f"{name} {end}: its end is told as {why!r}")
        if last not in pids and end != "pause-kill":  # else it is lost what the guest had not written out
            note = (box / "rootfs" / "note").read_text()
            if note != end:
                self.failures.append(f"{name} {end}: what was written is gone: {note!r}")
        (box / "rootfs" / "end").unlink(missing_ok=True)

    # --- what is held -----------------------------------------------------------------------------------------------

    def held(self) -> dict[str, float]:
        assert self.daemon.process is not None
        process = Path("/proc") / str(self.daemon.process.pid)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        mine = self.mine()
        words = [str(self.place), *self.ids()]
        points = self.points()
        spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in mine if os.path.exists(f"/proc/{pid}/ns/net")}
        named = [point for point, _, _ in hostmounts.mounts() if point.startswith(str(self.daemon.state))]
        backing = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
        store = [path for path, _, _ in os.walk(self.place / "store")]
        boot = [path for top in (host.runtime_dir() / "vm", self.daemon.state) for path in top.glob("**/*")]
        return {
            "processes": len(mine),
            "zombies": sum(is_zombie(pid) for pid in mine),
            "mounts": len(points),
            "cgroups": sum(any(word in path for word in words) for path, _, _ in os.walk("/sys/fs/cgroup")),
            "namespaces": len(spaces) + len(named),
            "links": len(self.daemon.host("ip -br link").splitlines()),
            "loops": sum(str(self.place) in name for name in backing),
            "boot_files": sum(any(word in str(path) for word in (*words, str(self.daemon.state))) for path in boot),
            "shm": len(os.listdir("/dev/shm")),
            "store_files": sum(len(os.listdir(path)) for path in store if os.path.isdir(path)),
            "fds": len(os.listdir(process / "fd")),
            "threads": int(status["Threads"]),
            "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        }

    def points(self) -> list[str]:
        words = [str(self.place), *self.ids()]
        found = [f"{point} {kind}" for point, kind, _ in hostmounts.mounts()]
        return [point for point in found if any(word in point for word in words)]

    def mine(self) -> list[str]:
        """Processes that the daemon has started, and theirs, and itself."""
        wanted, found = f"{MARK}={os.getpid()}".encode(), []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    environment = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                    parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:  # it has just ended
                    continue
                assert self.daemon.process is not None
                # one that has ended has no environment any more
                if wanted in environment or (environment == [b""] and parent == str(self.daemon.process.pid)):
                    found.append(entry)
        return found

    def ids(self) -> set[str]:
        """Of every container there ever was."""
        return set(re.findall(r'"object": ?"container/([0-9a-f]+)"', self.file("events").read_text()))

    def settled(self, base: dict[str, float] | None) -> dict[str, float]:
        """Once what is to stand by does so, and what ends has ended; or when that takes too long."""
        deadline = time.monotonic() + PATIENCE / 2
        while True:
            ready = "standbys 1:" in self.read("status") and "is being made" not in self.read("status")
            held = self.held()
            if ready and (base is None or all(held[key] <= base[key] for key in EXACT)):
                return held
            if time.monotonic() > deadline:
                return held | {"unsettled": 1}
            time.sleep(0.5)

    # --- all of it --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """In the block it is this soak's turn."""
        with contextlib.ExitStack() as stack:
            for path in (self.after, self.within):
                if path is not None:
                    file = stack.enter_context(path.open())
                    fcntl.flock(file, fcntl.LOCK_SH)
                    if path == self.after:
                        fcntl.flock(file, fcntl.LOCK_UN)
            yield

    def run(self, cycles: int, look: int, warm: int) -> None:
        base = None
        names, ends = list(SHAPES), list(ENDS)
        for name in names:
            self.make(name)
        for number in range(-warm, cycles):
            name = "cold" if number % 20 == 9 else names[number // 10 % 2]
            end = ends[number % len(ends)]
            with self.turn():
                began = time.monotonic()
                self.cycle(name, end)
            time.sleep(0.1)  # who waits for the lock gets it
            self.say("cycle", number=number, name=name, end=end, seconds=round(time.monotonic() - began, 2))
            if number >= 0 and (number % 40 == 35 or number % 80 == 69):  # its name comes again, its id never
                self.file("containers", name).rmdir()
                self.make(name)
                self.begun[name] = 0
            if number == -1:
                base = self.rest(None)
                self.say("held", starts=0, **base)
                self.say("mounts", points=self.points())
            elif base is not None and number % look == look - 1:
                self.compare(base, number + 1)
        assert base is not None
        self.compare(base, cycles)
        for name in names:
            self.file("containers", name).rmdir()
        self.say("ended", how=dict(self.how), fds={name: [min(all_), max(all_)] for name, all_ in self.fds.items()})
        log = self.daemon.log()
        if (found := log.find("Traceback")) >= 0:
            self.failures.append(f"the daemon's log has a traceback: {log[max(0, found - 300) : found + 4000]}")

    def rest(self, base: dict[str, float] | None) -> dict[str, float]:
        """What is held when nothing runs, always in the same case: all disks shown, the same shape stands by."""
        with self.turn():
            self.cycle("linked", "stop")
        for name in SHAPES:
            root = self.file("containers", name, "rootfs")
            self.until(lambda root=root: "bin" in os.listdir(root), f"the files of {name} are not shown")  # type: ignore[misc]
        return self.settled(base)

    def compare(self, base: dict[str, float], starts: int) -> None:
        now = self.rest(base)
        self.say("held", starts=starts, **now)
        self.say("mounts", points=self.points())
        wrong = [key for key in EXACT if now[key] > base[key]]
        wrong += ["rss_mb"] if now["rss_mb"] > base["rss_mb"] + 24 else []
        wrong += ["threads"] if now["threads"] > base["threads"] + 16 else []
        wrong += ["fds"] if now["fds"] > base["fds"] + 8 + 4 * max(0, now["threads"] - base["threads"]) else []
        wrong += ["store_files"] if now["store_files"] > base["store_files"] + 40 else []
        self.failures += [f"after {starts}: {key}: {base[key]} -> {now[key]}" for key in wrong]


def is_zombie(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cycles", type=int, default=500)
    options.add_argument("--warm", type=int, default=22, help="starts before what is held is looked at first")
    options.add_argument("--look", type=int, default=50)
    options.add_argument("--after", type=Path)
    options.add_argument("--within", type=Path)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-machines-"))
    soak = Machines(place, given.after, given.within)
    try:
        soak.daemon.start()
        soak.run(given.cycles, given.look, given.warm)
        soak.say("end", failures=soak.failures)
    finally:
        for pid in soak.mine():  # it has failed in the middle of something
            if soak.daemon.process is not None and pid != str(soak.daemon.process.pid):
                os.kill(int(pid), signal.SIGKILL)
        soak.daemon.stop()
        shutil.rmtree(place, ignore_errors=True)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
