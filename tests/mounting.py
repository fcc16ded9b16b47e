"""A daemon on a temporary store and mount, as a person would start it, for tests that use real shell commands.

    with Daemon(tmp_path) as daemon:
        daemon.sh("echo start > containers/web/ctl")

`sh` runs in the mount's directory. Leaving the block stops the daemon by its pid and unmounts whatever is left.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import hostmounts

ROOT = Path(__file__).parents[1]


def can_mount() -> str | None:
    """Why FUSE mounts cannot be made here; None when they can."""
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    try:
        import fuse  # noqa: F401
    except (ImportError, OSError) as error:
        return f"no libfuse: {error}"
    return None


PATIENCE = float(os.environ.get("DUTCHMAN_TEST_PATIENCE", "0"))  # seconds: no wait gives up earlier; for slow machines


class Daemon:
    """`python -m fdfs.daemon` on `place`/store and `place`/mnt. `env` is added to the environment.

    `within` is put before every command: a program that runs another in its own place, such as nsenter.
    """

    def __init__(
        self,
        place: Path,
        *,
        runtime: str = "fake",
        binds: bool = True,
        allow_other: bool = False,
        env: dict[str, str] | None = None,
        within: list[str] | None = None,
    ) -> None:
        self.store = place / "store"
        self.mount = place / "mnt"
        self._runtime = runtime
        self._more = ["--allow-other"] if allow_other else []
        self._within = within or []
        self._program = ["-m", "fdfs.daemon"]
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "DUTCHMAN_NO_BIND": "0" if binds else "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.expect_errors = False  # tests that provoke a bug's traceback set this

    def start(self, seconds: float = max(60, PATIENCE)) -> Daemon:
        self.mount.parent.mkdir(parents=True, exist_ok=True)
        self.store.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        command = [*self._within, sys.executable, *self._program]
        command += ["--store", str(self.store), "--mount", str(self.mount)]
        command += ["--runtime", self._runtime, "--ready-fd", str(writing), *self._more]
        with open(self.store / "engine.log", "ab") as output:
            self.process = subprocess.Popen(
                command,
                env=self._env,
                cwd="/",
                pass_fds=(writing,),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            said = pipe.read(4096) if select.select([pipe], [], [], seconds)[0] else b"(nothing)"
        if not (said or b"").startswith(b"ready"):
            self.stop()
            raise RuntimeError(f"the daemon did not start: {(said or b'').decode()}\n{self.log()[-4000:]}")
        return self

    def log(self) -> str:
        path = self.store / "engine.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        """kill -9: leaves a dead mount behind."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        """SIGTERM and wait; whatever is still mounted below the place is unmounted."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(15)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
            self.process = None
        self.unmount()

    def unmount(self) -> None:
        for base in (self.mount, self.store):
            # the highest first: what lies below a dead mount can be reached no more, and goes with it
            while points := [point for point, _, _ in hostmounts.mounts() if f"{point}/".startswith(f"{base}/")]:
                hostmounts.unmount(Path(min(points, key=len)))

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, kind: Any, *_: object) -> None:
        self.stop()
        if kind is None and not self.expect_errors:
            assert "Traceback" not in self.log(), self.log()[-6000:]

    def run(self, command: str, *, timeout: float = 60, shell: str = "bash") -> subprocess.CompletedProcess[str]:
        """Run a shell command in the mount; never raises for its exit status."""
        done = subprocess.run(
            [*self._within, shell, "-c", command],
            cwd=self.mount,
            capture_output=True,
            timeout=max(timeout, PATIENCE),
            env={**self._env, "LC_ALL": "C"},
        )
        return subprocess.CompletedProcess(
            command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def sh(self, command: str, *, timeout: float = 60) -> str:
        """Output of a command that must succeed."""
        done = self.run(command, timeout=timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{self.log()[-3000:]}"
        return done.stdout

    def refused(self, command: str, errno_text: str, *, timeout: float = 60) -> str:
        """stderr of a command that must fail with this errno's text."""
        done = self.run(command, timeout=timeout)
        assert done.returncode != 0, f"{command} succeeded:\n{done.stdout}"
        assert re.search(errno_text, done.stderr), f"{command}: {done.stderr}"
        return done.stderr

    def until(self, command: str, wanted: str, *, seconds: float = 40) -> str:
        """Repeat a command until its output holds `wanted`."""
        deadline = time.monotonic() + max(seconds, PATIENCE)
        while True:
            out = self.run(command).stdout
            if wanted in out:
                return out
            assert time.monotonic() < deadline, f"{command} never showed {wanted!r} but {out!r}"
            time.sleep(0.05)

    def bound(self, path: str) -> bool:
        """Whether something is bound over a path of the mount."""
        return hostmounts.is_mounted(self.mount / path)
