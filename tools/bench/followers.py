"""A hundred `tail -f` of one log that grows by 50 MB/s: how far they lag behind, on a plain file and on ours.

Prints JSON lines: {"bench", "who", "followers", "written_mb", "written_s", "all_read_s", "lag_s", "behind"}.
`plain` is a file of the temporary directory that a process writes, `ours` is logs/stdout of a container that prints the
same. Both are read by as many GNU tails into /dev/null; how far each is the kernel says (/proc/PID/fdinfo). `lag_s` is
from the last byte written until the last tail has read it; `behind` counts those that never did. Needs root on Linux,
runc, conmon and busybox-static.
Usage: python tools/bench/followers.py [--followers N] [--rate MB] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from mounting import Daemon
from ociimages import busybox_rootfs_tar

PATIENCE = 300.0  # seconds for all to have read all
LINE = "x" * 99


def position(pid: int, path: str) -> int:
    """Bytes of `path` the process has read; 0 while it has not opened it."""
    place = f"/proc/{pid}/fd"
    for name in os.listdir(place):
        if os.path.realpath(f"{place}/{name}") == path:
            return int(Path(f"/proc/{pid}/fdinfo/{name}").read_text().split()[1])
    return 0


def follow(path: Path, who: str, given: argparse.Namespace, write: Callable[[], None]) -> None:
    """`write` returns when everything is written."""
    real = os.path.realpath(path)
    tails = [
        subprocess.Popen(["tail", "-c", "+1", "-f", real], stdout=subprocess.DEVNULL) for _ in range(given.followers)
    ]
    try:
        began = time.monotonic()
        write()
        written = time.monotonic() - began
        size, waiting = os.stat(real).st_size, list(tails)
        while waiting and time.monotonic() < began + PATIENCE:
            waiting = [tail for tail in waiting if position(tail.pid, real) < size]
            time.sleep(0.05)
        took = time.monotonic() - began
    finally:
        for tail in tails:
            tail.kill()
            tail.wait()
    row = {"bench": "followers", "who": who, "followers": given.followers, "written_mb": round(size / 1e6, 1)}
    row |= {"written_s": round(written, 1), "all_read_s": round(took, 1), "lag_s": round(took - written, 1)}
    print(json.dumps(row | {"behind": len(waiting)}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--followers", type=int, default=100)
    options.add_argument("--rate", type=float, default=50.0, help="MB/s")
    options.add_argument("--seconds", type=float, default=2.0)
    given = options.parse_args()
    rounds, lines = max(1, int(given.seconds * 10)), int(given.rate * 1e6 / 10 / 100)
    script = f"i=0; while [ $i -lt {rounds} ]; do yes {LINE} | head -n {lines}; i=$((i+1)); usleep 40000; done"
    place = Path(tempfile.mkdtemp(prefix="dutchman-followers-"))
    try:
        plain = place / "plain"
        plain.touch()
        busybox = ["busybox", "sh", "-c", script]

        def by_itself() -> None:
            with plain.open("ab") as out:
                subprocess.run(busybox, stdout=out, check=True)

        follow(plain, "plain", given, by_itself)
        with Daemon(place, runtime="oci") as daemon:
            (place / "rootfs.tar").write_bytes(busybox_rootfs_tar())
            daemon.sh(f"echo 'import {place}/rootfs.tar box:1' > images/ctl")
            daemon.until("ls images", "box:1", seconds=60)
            box = daemon.mount / "containers" / "loud"
            box.mkdir()
            (box / "config.yaml").write_text(json.dumps({"image": "box:1", "command": ["sh", "-c", f"read x; {script}"],
                                                         "stdin": True}))  # fmt: skip
            (box / "ctl").write_text("start\n")

            def contained() -> None:
                (box / "stdin").write_text("\n")
                while (box / "state").read_text() != "stopped\n":
                    time.sleep(0.05)

            follow(box / "logs" / "stdout", "ours", given, contained)
            box.rmdir()
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
