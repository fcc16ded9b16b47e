"""The real thing for tests: the `dutchman` command, a daemon in its own process, a real mount, a store of its own.

with Dutchman(tmp_path) as engine:
    engine.up()
    engine.cli("load", str(archive))
    engine.sh("echo start > containers/web/ctl")

On leaving, containers are removed, the daemon is ended, nothing stays mounted, and the daemon's log must hold no
warning and no traceback beyond those announced with `expect`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from mounting import PATIENCE

from engine import host, hostmounts
from fdfs.cli_daemon import holder

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]
ALARM = re.compile(r"WARNING|ERROR|CRITICAL|Traceback")


def needs_oci() -> None:
    """Skip where containers cannot run."""
    if not host.LINUX or not host.is_root() or not os.path.exists("/dev/fuse"):
        pytest.skip("needs Linux, root and /dev/fuse")
    if not shutil.which("conmon") or not shutil.which("runc"):
        pytest.skip("needs runc and conmon")


@functools.cache
def demo_archive() -> Path:
    """The demo images as a docker-archive, made once per session."""
    path = Path(tempfile.mkdtemp(prefix="dutchman-demo-")) / "demo.tar"
    atexit.register(shutil.rmtree, path.parent)
    subprocess.run([sys.executable, str(ROOT / "tools" / "demo_image.py"), str(path)], check=True, timeout=60)
    return path


def wait_for(condition: Callable[[], Any], seconds: float = 40.0, what: str = "") -> Any:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + max(seconds, PATIENCE)
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.03)


def unmount_below(place: Path) -> None:
    """Detach everything mounted at or below a place, the highest first: what is below goes with it."""
    while points := [point for point, _, _ in hostmounts.mounts() if f"{point}/".startswith(f"{place}/")]:
        hostmounts.unmount(Path(min(points, key=len)))


class Dutchman:
    def __init__(self, base: Path, *, runtime: str = "oci", store: Path | None = None) -> None:
        self.home = base / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self.mount = self.home / "FlyingDutchman"
        self.store = store or base / "store"
        self.runtime = runtime
        self.expected: list[str] = []
        # `dutchman` itself is on the PATH of scripts
        self.bin = base / "bin"
        self.bin.mkdir(exist_ok=True)
        script = self.bin / "dutchman"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fdfs "$@"\n')
        script.chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("DUTCHMAN", "XDG"))}
        self.env = kept | {
            "HOME": str(self.home),
            "DUTCHMAN_STORE": str(self.store),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
        }

    # --- the command and the shell ----------------------------------------------------------------------------------

    def cli(
        self, *words: str, code: int | None = 0, timeout: float = 60, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `dutchman WORDS`; checks the exit code (None: any), and that no traceback ever reaches a person."""
        command = [sys.executable, "-m", "fdfs", *words]
        done = subprocess.run(
            command,
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(timeout, 2 * PATIENCE),
            stdin=subprocess.DEVNULL,
            **more,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def sh(self, script: str, *, code: int | None = 0, timeout: float = 60) -> Done:
        """Run a shell script in the mount."""
        done = subprocess.run(
            ["bash", "-c", f"cd {self.mount} && {script}"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=max(timeout, 2 * PATIENCE),
            stdin=subprocess.DEVNULL,
        )
        assert code is None or done.returncode == code, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    # --- the daemon -------------------------------------------------------------------------------------------------

    def up(self, *words: str) -> None:
        self.cli("up", "--runtime", self.runtime, *words)

    @property
    def pid(self) -> int:
        held = holder(self.store)
        return held.pid if held else 0

    def kill(self) -> None:
        """kill -9 of the daemon; returns when it is gone and the store is free."""
        pid = self.pid
        assert pid, "no daemon to kill"
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: holder(self.store) is None, what="the lock is free")

    def expect(self, pattern: str) -> None:
        """Announce lines the daemon's log may hold, as a regular expression."""
        self.expected.append(pattern)

    def alarms(self) -> list[str]:
        """Lines of the daemon's log that nobody announced."""
        log = self.store / "engine.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return [
            line
            for line in lines
            if ALARM.search(line) and not any(re.search(pattern, line) for pattern in self.expected)
        ]

    # --- files ------------------------------------------------------------------------------------------------------

    def read(self, path: str) -> str:
        return (self.mount / path).read_text(errors="replace").rstrip("\n")

    def write(self, path: str, text: str) -> None:
        """As `echo TEXT > PATH`: an errno of the write is raised."""
        fd = os.open(self.mount / path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, text.encode() + b"\n")
        finally:
            os.close(fd)

    def state(self, name: str) -> str:
        return self.read(f"containers/{name}/state")

    def await_state(self, name: str, *states: str, seconds: float = 40) -> None:
        wait_for(lambda: self.state(name) in states, seconds, f"{name} {states}")

    def make(self, name: str, script: str, image: str = "demo:1") -> None:
        """A container that runs a shell script; not started."""
        (self.mount / "containers" / name).mkdir()
        import json

        (self.mount / "containers" / name / "config.yaml").write_text(
            json.dumps({"image": image, "command": ["/bin/sh", "-c", script], "stop_grace_period": 2})
        )

    def job(self, verb: str, seconds: float = 60) -> tuple[str, str]:
        """A verb of images/ that becomes a job: its state and error when it has ended."""
        return self.job_of("images", verb, seconds)

    def job_of(self, directory: str, verb: str, seconds: float = 60) -> tuple[str, str]:
        fd = os.open(self.mount / directory / "ctl", os.O_RDWR)
        try:
            os.write(fd, verb.encode() + b"\n")
            number = os.read(fd, 4096).decode().split("jobs/")[1].split()[0]
        finally:
            os.close(fd)
        wait_for(lambda: self.read(f"jobs/{number}/state") != "running", seconds, verb)
        return self.read(f"jobs/{number}/state"), self.read(f"jobs/{number}/error")

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        try:
            if self.pid:
                names = self.cli("ps", "-a", "-q", code=None).stdout.split()
                if names:
                    self.cli("rm", "-f", *names, code=None)
                self.cli("down", code=None)
        finally:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            unmount_below(self.mount)
            unmount_below(self.store)

    def __enter__(self) -> Dutchman:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if kind is None:
            assert not self.alarms(), "\n".join(self.alarms()[:20])
