"""Start, run, stop and log throughput beside podman and docker, in the same run.

Prints JSON lines: {"bench": "lifecycle", "what", "who", "median_ms", "rounds"}, and for logs "lines_per_second". What:
`start` from the command to the first line of a container made before, attached; `run` the whole of `run --rm … echo`;
`stop` of a shell that ends on TERM; `logs` from the start until a follower has all lines, or ends without. Who: `files`
is the mount itself (a write to ctl, a read of the log), `dutchman` the command, `podman` and `docker` theirs, none with
a network.
A dockerd of our own is started in directories of its own, without bridge and iptables; podman has a store of its own.
What is missing is left out, with the reason. Needs root on Linux, runc, conmon and busybox-static.
Usage: python tools/bench/lifecycle.py [--rounds N] [--lines N]
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox
from mounting import ROOT, Daemon
from ociimages import busybox_rootfs_tar

from engine.engine import Engine

WAITS = "trap 'exit 0' TERM; echo ready; while :; do sleep 60 & wait; done"
LINE = "x" * 79


def said(command: list[str], **more: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, **more).stdout


class Peer:
    """podman or docker by their command."""

    def __init__(self, name: str, command: list[str], flags: list[str], environment: dict[str, str]) -> None:
        self.name, self.command, self.flags = name, command, ["--network", "none", *flags]
        self.environment = {**os.environ, **environment}

    def do(self, *arguments: str) -> str:
        return said([*self.command, *arguments], env=self.environment)

    def prepare(self, tar: Path) -> None:
        self.do("import", str(tar), "busybox:latest")

    def create(self, name: str, script: str) -> None:
        self.do("create", "--name", name, *self.flags, "busybox:latest", "sh", "-c", script)

    def start(self, name: str) -> float:
        begin = time.perf_counter()
        with subprocess.Popen(
            [*self.command, "start", "-a", name], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as attached:
            assert attached.stdout is not None
            line = attached.stdout.readline()
            seconds = time.perf_counter() - begin
            attached.terminate()
        assert line.startswith(b"ready"), line
        return seconds

    def stop(self, name: str) -> None:
        self.do("stop", name)

    def remove(self, name: str) -> None:
        self.do("rm", "-f", name)

    def run(self, name: str) -> None:
        assert self.do("run", "--rm", "--name", name, *self.flags, "busybox:latest", "echo", "hello") == "hello\n"

    def logs(self, name: str, lines: int) -> int:
        self.do("start", name)
        follow = f"{' '.join(self.command)} logs -f {name} | wc -l"
        return int(said(["bash", "-c", follow], env=self.environment))


class Files:
    """The mount."""

    name = "files"

    def __init__(self, mount: Path) -> None:
        self.mount = mount

    def at(self, name: str, *parts: str) -> Path:
        return self.mount.joinpath("containers", name, *parts)

    def create(self, name: str, script: str) -> None:
        self.at(name).mkdir()
        config = {"image": "busybox", "command": ["sh", "-c", script], "networks": ["none"]}
        self.at(name, "config.yaml").write_text(json.dumps(config))

    def start(self, name: str) -> float:
        begin = time.perf_counter()
        self.at(name, "ctl").write_text("start\n")
        while not self.at(name, "logs/stdout").read_bytes().startswith(b"ready"):
            time.sleep(0.0005)
        return time.perf_counter() - begin

    def stop(self, name: str) -> None:
        self.at(name, "ctl").write_text("stop 10\n")

    def remove(self, name: str) -> None:
        self.at(name).rmdir()

    def run(self, name: str) -> None:
        self.create(name, "echo hello")
        self.at(name, "ctl").write_text("start\n")
        while not self.at(name, "wait").read_text():
            pass
        assert self.at(name, "logs/stdout").read_text() == "hello\n"
        self.remove(name)

    def logs(self, name: str, lines: int) -> int:
        self.at(name, "ctl").write_text("start\n")
        seen = 0
        with open(self.at(name, "logs/stdout"), "rb", buffering=0) as file:
            while seen < lines:
                data = file.read(1 << 20)
                seen += data.count(b"\n")
                if not data:
                    time.sleep(0.01)
        return seen


class Command(Files):
    """`dutchman`, where it has a command for it."""

    name = "dutchman"

    def do(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "fdfs", *arguments]
        return said(command, env={**os.environ, "PYTHONPATH": str(ROOT), "DUTCHMAN_MOUNT": str(self.mount)})

    def stop(self, name: str) -> None:
        self.do("stop", name)

    def run(self, name: str) -> None:
        assert (
            self.do("run", "--rm", "--network", "none", "--name", name, "busybox", "--", "echo", "hello") == "hello\n"
        )


def row(what: str, who: str, seconds: list[float], **more: Any) -> None:
    facts = {"bench": "lifecycle", "what": what, "who": who, "rounds": len(seconds)}
    print(json.dumps(facts | {"median_ms": round(1e3 * statistics.median(seconds), 1)} | more), flush=True)


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def dockerd(place: Path) -> subprocess.Popen[bytes]:
    """A daemon in directories of its own; RuntimeError with its last words."""
    command = ["dockerd", "--host", f"unix://{place}/sock", "--data-root", f"{place}/data", "--pidfile", f"{place}/pid"]
    command += ["--exec-root", f"{place}/exec", "--iptables=false", "--ip6tables=false", "--bridge=none"]
    place.mkdir()
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    environment = {**os.environ, "DOCKER_HOST": f"unix://{place}/sock"}
    while subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise RuntimeError((place / "log").read_text()[-300:])
        time.sleep(0.2)
    return process


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--lines", type=int, default=300_000)
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dutchman-bench-"))
    with Engine(place / "store", runtime="oci") as engine:
        add_busybox(engine)
    daemon = Daemon(place, runtime="oci")
    who: list[Peer | Files] = [Files(daemon.mount), Command(daemon.mount)]
    server = None
    try:
        daemon.start()
        tar = place / "busybox.tar"
        tar.write_bytes(busybox_rootfs_tar())
        if shutil.which("podman"):
            command = ["podman", "--root", f"{place}/podman", "--runroot", f"{place}/podrun"]
            command += ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--log-level", "error"]
            who.append(
                Peer(
                    "podman",
                    command,
                    ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--log-driver", "k8s-file"],
                    {},
                )
            )
        if shutil.which("dockerd") and shutil.which("docker"):
            try:
                server = dockerd(place / "docker")
                who.append(Peer("docker", ["docker"], [], {"DOCKER_HOST": f"unix://{place}/docker/sock"}))
            except RuntimeError as error:
                print(json.dumps({"bench": "lifecycle", "who": "docker", "left_out": str(error)}))
        for peer in who:
            if isinstance(peer, Peer):
                peer.prepare(tar)
        times: dict[tuple[str, str], list[float]] = {}
        for number in range(given.rounds):
            for peer in who:  # alternating, so that all see the same machine
                name = f"{peer.name}{number}"
                peer.create(name, WAITS)
                times.setdefault(("start", peer.name), []).append(peer.start(name))
                times.setdefault(("stop", peer.name), []).append(timed(lambda p=peer, n=name: p.stop(n)))  # type: ignore[misc]
                peer.remove(name)
                times.setdefault(("run", peer.name), []).append(timed(lambda p=peer, n=name: p.run(f"r{n}")))  # type: ignore[misc]
        lost: dict[str, int] = {}
        for number in range(max(1, given.rounds // 5)):
            for peer in who:
                if isinstance(peer, Command):
                    continue
                name = f"log{number}"
                peer.create(name, f"yes {LINE} | head -n {given.lines}")
                begin = time.perf_counter()
                seen = peer.logs(name, given.lines)
                times.setdefault(("logs", peer.name), []).append(time.perf_counter() - begin)
                lost[peer.name] = lost.get(peer.name, 0) + given.lines - seen
                if isinstance(peer, Files):
                    while not peer.at(name, "wait").read_text():
                        pass
                peer.remove(name)
        for (what, name), seconds_of in sorted(times.items()):
            if (what, name) == ("start", "dutchman"):
                continue  # the same as `files`
            more = {}
            if what == "logs":
                more = {
                    "lines_per_second": round(given.lines / statistics.median(seconds_of)),
                    "lost_lines": lost[name],
                }
            row(what, name, seconds_of, **more)
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        daemon.stop()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if f"{place}/" in line:
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
