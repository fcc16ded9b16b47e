"""`exec` of `true` in a running container: through the mount and by the command, against runc, podman and docker.

Prints JSON lines: {"bench": "exec", "who", "median_ms", "p90_ms", "rounds"}. Rows: `runc exec` in the very container;
`mount`: from the write to containers/<n>/exec/ctl until exec/<k>/wait has the exit code; `dutchman exec`: the command,
its start included; `podman exec`, `docker exec`: the same of theirs, in a container of the same root filesystem.
Alternating, so that all see the same machine. A tool that is not there, or cannot run here, is a line with "skipped".
Needs root on Linux, runc, conmon and busybox-static. Usage: python tools/bench/exec.py [--rounds N]
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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox
from logs import rootfs
from mounting import Daemon

from engine import host
from engine.engine import Engine

NAME = "dutchman-bench-exec"


def quiet(*argv: str, seconds: float = 60) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).decode(errors="replace").strip()[-300:])


def through_mount(daemon: Daemon) -> None:
    """One session from the write to its exit code."""
    container = daemon.mount / "containers" / "bench"
    fd = os.open(container / "exec" / "ctl", os.O_RDWR)
    try:
        os.write(fd, b"run true\n")
        number = os.read(fd, 100).decode().strip()
    finally:
        os.close(fd)
    while not (code := (container / number / "wait").read_text()):
        pass
    assert code == "0\n", code


def theirs(tool: str, root: Path) -> Callable[[], None]:
    """A container of podman or docker that sleeps, and the call to be measured. RuntimeError when there is none."""
    if shutil.which(tool) is None:
        raise RuntimeError("not installed")
    if tool == "podman":
        limits = ("--network", "none", "--ulimit", "host")  # its own are more than some hosts grant
        quiet(tool, "run", "-d", "--name", NAME, *limits, "--rootfs", str(root), "/bin/sleep", "3600")
    else:
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            done = subprocess.run([tool, "import", "-", NAME], stdin=tar.stdout, capture_output=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace").strip()[-300:])
        quiet(tool, "run", "-d", "--name", NAME, "--network", "none", NAME, "/bin/sleep", "3600")
    return lambda: quiet(tool, "exec", NAME, "/bin/true")


def clear(tool: str) -> None:
    if shutil.which(tool) is not None:
        subprocess.run([tool, "rm", "-f", NAME], capture_output=True, timeout=60)
        if tool == "docker":
            subprocess.run([tool, "rmi", "-f", NAME], capture_output=True, timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-exec-"))
    (place / "store").mkdir()
    with Engine(place / "store") as engine:
        add_busybox(engine)
    calls: dict[str, Callable[[], None]] = {}
    try:
        with Daemon(place, runtime="oci") as daemon:
            container = daemon.mount / "containers" / "bench"
            container.mkdir()
            (container / "config.yaml").write_text("image: busybox\ncommand: [sleep, '3600']\n")
            (container / "ctl").write_text("start\n")
            id = (container / "id").read_text().strip()
            state = host.runtime_dir() / "oci" / "runtime"
            calls["runc exec"] = lambda: quiet("runc", "--root", str(state), "exec", id, "true")
            calls["mount"] = lambda: through_mount(daemon)
            command = [sys.executable, "-m", "fdfs", "exec", "--mount", str(daemon.mount), "bench", "true"]
            calls["dutchman exec"] = lambda: quiet(*command)
            root = rootfs(place)
            for tool in ("podman", "docker"):
                try:
                    calls[f"{tool} exec"] = theirs(tool, root)
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    print(json.dumps({"bench": "exec", "who": f"{tool} exec", "skipped": str(error)}), flush=True)
            taken: dict[str, list[float]] = {who: [] for who in calls}
            for number in range(rounds + 1):
                for who, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    if number:  # the first round warms up
                        taken[who].append((time.perf_counter() - begin) * 1000)
            (container / "ctl").write_text("kill\n")
            container.rmdir()
        for who, times in taken.items():
            p90 = sorted(times)[int(len(times) * 0.9)]
            row = {"bench": "exec", "who": who, "median_ms": round(statistics.median(times), 1)}
            print(json.dumps(row | {"p90_ms": round(p90, 1), "rounds": rounds}))
    finally:
        for tool in ("podman", "docker"):
            clear(tool)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
