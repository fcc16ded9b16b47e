"""Files of a running machine through the mount, and the same on the host's own file system in between.

Prints JSON lines: {"bench": "guestfiles", "what", "where": "machine" | "stopped" | "host" | "tmpfs", …}: `write` and
`read` of a big file in MB/s (write: cp, which ends when close(2) has said that all is there; `cold` is the first read,
of a file that is in no cache of the guest), `cp -a` in, `cp -a` out and `rm -r` of small files in files a second;
medians. `stopped` is the container's disk on the host, by the same mount; `host` and `tmpfs` are directories of it.
With --tar also `tar_in` and `tar_out`: as one archive, by `dutchman cp` and by tar(1) run in the machine (`exec`).
What was copied is compared, metadata too, before it is told. CPU: seconds of the daemon, of the owner, of QEMU.
Needs root on Linux, runc, conmon, QEMU, busybox-static and a kernel: --kernel FILE, else what tools/setup test fetched.
Usage: python tools/bench/guestfiles.py [--megabytes N] [--files N] [--rounds N] [--tar] [--kernel FILE]
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

import manyfiles
from guestkernel import stocked
from mounting import Daemon

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


def same(small: Path, back: Path) -> None:
    if manyfiles.facts(back) != manyfiles.facts(small):
        raise SystemExit(f"{back} is not what was copied")


def once(target: Path, big: Path, small: Path, back: Path) -> dict[str, float]:
    """Seconds of each; what came back is what was given."""
    out = {"write": timed("cp", big, target / "big"), "cold": timed("cp", target / "big", back)}
    subprocess.run(["cmp", big, back], check=True)
    os.unlink(back)
    out["read"] = timed("cp", target / "big", "/dev/null")
    out["in"] = timed("cp", "-a", small, target / "small")
    out["out"] = timed("cp", "-a", target / "small", back)
    same(small, back)
    out["rm"] = timed("rm", "-r", target / "small")
    shutil.rmtree(back)
    os.unlink(target / "big")
    return out


def tars(mount: Path, small: Path, back: Path) -> dict[str, dict[str, float]]:
    """The same files as an archive, by each way: seconds."""
    ours = f"{sys.executable} -m fdfs"
    ways = {
        "cp": (f"{ours} cp - c:/tars", f"{ours} cp c:/tars/. -"),
        "exec": (f"{ours} exec -i c busybox tar -C /tars -xf -", f"{ours} exec c busybox tar -C /tars -cf - ."),
    }
    environment = os.environ | {"DUTCHMAN_MOUNT": str(mount), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    taken: dict[str, dict[str, float]] = {}
    for way, (into, out_of) in ways.items():
        target = mount / "containers/c/rootfs/tars"
        for folder in (target, back):
            folder.mkdir()
        taken[way] = {}
        for what, command in (
            ("tar_in", f"tar -C {small} -c . | {into}"),
            ("tar_out", f"{out_of} | tar -C {back} -xp"),
        ):
            begin = time.perf_counter()
            subprocess.run(["bash", "-ec", f"set -o pipefail; {command}"], check=True, env=environment)
            taken[way][what] = time.perf_counter() - begin
        subprocess.run(["diff", "-r", "--no-dereference", small, back], check=True)
        for folder in (target, back):
            subprocess.run(["rm", "-r", folder], check=True)
    return taken


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tar", action="store_true")
    options.add_argument("--kernel", type=Path)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    big, small, native = place / "big", place / "small", place / "native"
    big.write_bytes(os.urandom(given.megabytes * 1_000_000))
    memory = Path(tempfile.mkdtemp(prefix="dutchman-bench-", dir="/dev/shm"))
    native.mkdir()
    manyfiles.make(small, given.files)
    kernel = stocked(place / "store", given.kernel)
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
        taken: dict[str, list[dict[str, float]]] = {"machine": [], "host": [], "tmpfs": [], "stopped": []}
        before = cpu(pids)
        for _ in range(given.rounds):
            for where, target in (("machine", container / "rootfs"), ("host", native), ("tmpfs", memory)):
                taken[where].append(once(target, big, small, place / "back"))
        used = [round((after - was) / given.rounds, 2) for after, was in zip(cpu(pids), before, strict=True)]
        say(what="cpu of a round", seconds=dict(zip(("daemon", "owner", "qemu"), used, strict=True)))
        for way, seconds in (tars(daemon.mount, small, place / "back") if given.tar else {}).items():
            for what, each in seconds.items():
                say(what=what, where="machine", by=way, files_s=round(given.files / each, 1))
        (container / "ctl").write_text("stop 0\n")
        state(container, "stopped")
        for _ in range(given.rounds):
            taken["stopped"].append(once(container / "rootfs", big, small, place / "back"))
        for where, rounds in taken.items():
            for what in rounds[0]:
                seconds = statistics.median(each[what] for each in rounds)
                big_one = what in ("write", "cold", "read")
                unit, count = ("mb_s", given.megabytes) if big_one else ("files_s", given.files)
                spread = [round(count / each[what], 1) for each in rounds]
                say(what=what, where=where, **{unit: round(count / seconds, 1)}, rounds=spread)
    except BaseException:
        print(daemon.log()[-4000:], file=sys.stderr)
        raise
    finally:
        daemon.run("echo kill > containers/c/ctl")
        daemon.stop()
        for folder in (place, memory):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
