"""Files of a running machine through the mount, and the same on the host's own file system in between.

Prints JSON lines: {"bench": "guestfiles", "what", "where": "machine" | "stopped" | "host", …}: `write` and `read` of a
big file in MB/s (write: cp, which ends when close(2) has said that all is there), `cp -a` in, `cp -a` out and `rm -r`
of small files in files a second; medians. `stopped` is the container's disk on the host, by the same mount. What was
copied is compared before anything is printed. CPU is in seconds of the daemon, of the machine's owner, of QEMU.
Needs root on Linux, runc, conmon, QEMU, busybox-static and a kernel: --kernel FILE, else what tools/setup test fetched.
Usage: python tools/bench/guestfiles.py [--megabytes N] [--files N] [--rounds N] [--kernel FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox
from guestkernel import package
from mounting import Daemon

from engine.engine import Engine

SECONDS = 240.0  # for whatever is waited for
CONFIG = "image: busybox\nruntime: vm\ncommand: [sleep, '100000']\nnetworks: [none]\n"


def say(**facts: Any) -> None:
    print(json.dumps({"bench": "guestfiles"} | facts), flush=True)


def timed(*command: str | Path) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - begin


def cpu(pids: list[int]) -> list[float]:
    """Seconds each process has used."""
    out = []
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        out.append(sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"))
    return out


def state(container: Path, wanted: str) -> None:
    end = time.monotonic() + SECONDS
    while (found := (container / "state").read_text().strip()) != wanted:
        if time.monotonic() > end:
            raise SystemExit(f"it is {found}, not {wanted}: {(container / 'error').read_text()}")
        time.sleep(0.02)


def once(target: Path, big: Path, small: Path, back: Path) -> dict[str, float]:
    """Seconds of each; what came back is what was given."""
    out = {"write": timed("cp", big, target / "big"), "read": timed("cmp", big, target / "big")}
    out["in"] = timed("cp", "-a", small, target / "small")
    out["out"] = timed("cp", "-a", target / "small", back)
    subprocess.run(["diff", "-r", small, back], check=True)
    out["rm"] = timed("rm", "-r", target / "small")
    shutil.rmtree(back)
    os.unlink(target / "big")
    return out


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--kernel", type=Path)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    big, small, native = place / "big", place / "small", place / "native"
    big.write_bytes(os.urandom(given.megabytes * 1_000_000))
    native.mkdir()
    for number in range(given.files):
        file = small / f"d{number % 20}" / f"f{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(number * 37 % 5000))
        os.utime(file, ns=(10**18 + number, 10**18 + number))
    with Engine(place / "store", runtime="oci") as engine:
        add_busybox(engine)
        kernel = engine.kernels.import_(given.kernel or package())
    daemon = Daemon(place, runtime="oci")
    try:
        daemon.start()
        container = daemon.mount / "containers" / "c"
        container.mkdir()
        (container / "config.yaml").write_text(CONFIG)
        (container / "ctl").write_text("start\n")
        state(container, "running")
        machine = place / "store/containers" / (container / "id").read_text().strip() / "run/vm"
        qemu = int((machine / "qemu.pid").read_text())
        owner = int(Path(f"/proc/{qemu}/stat").read_text().rpartition(")")[2].split()[1])
        assert daemon.process is not None
        pids = [daemon.process.pid, owner, qemu]
        say(kernel=kernel.version, cpus=os.cpu_count(), load=os.getloadavg()[0], megabytes=given.megabytes)
        taken: dict[str, list[dict[str, float]]] = {"machine": [], "host": [], "stopped": []}
        before = cpu(pids)
        for _ in range(given.rounds):
            for where, target in (("machine", container / "rootfs"), ("host", native)):
                taken[where].append(once(target, big, small, place / "back"))
        used = [round((after - was) / given.rounds, 2) for after, was in zip(cpu(pids), before, strict=True)]
        say(what="cpu of a round", seconds=dict(zip(("daemon", "owner", "qemu"), used, strict=True)))
        (container / "ctl").write_text("stop 0\n")
        state(container, "stopped")
        for _ in range(given.rounds):
            taken["stopped"].append(once(container / "rootfs", big, small, place / "back"))
        for where, rounds in taken.items():
            for what in rounds[0]:
                seconds = statistics.median(each[what] for each in rounds)
                unit, count = ("mb_s", given.megabytes) if what in ("write", "read") else ("files_s", given.files)
                spread = [round(count / each[what], 1) for each in rounds]
                say(what=what, where=where, **{unit: round(count / seconds, 1)}, rounds=spread)
    except BaseException:
        print(daemon.log()[-4000:], file=sys.stderr)
        raise
    finally:
        daemon.run("echo kill > containers/c/ctl")
        daemon.stop()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
