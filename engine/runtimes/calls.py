"""Calling a runtime (runc, crun) or its helpers once, with a deadline. Floor 2; stateless."""

from __future__ import annotations

import subprocess
import tempfile

from engine.errors import DeadlineExceeded, RuntimeFailure
from engine.runtimes import conmon


def call(argv: list[str], deadline: float) -> subprocess.CompletedProcess[bytes]:
    """One call of the runtime. Its output goes to a file: a pipe would be inherited by what it leaves running."""
    with tempfile.TemporaryFile() as out:
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=deadline, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"{' '.join(argv[:1] + argv[3:4])} took longer than {deadline:.0f} s") from error
        except OSError as error:
            raise RuntimeFailure(f"cannot run {argv[0]}: {error}") from error
        out.seek(0)
        return subprocess.CompletedProcess(argv, done.returncode, out.read(conmon.MAX_MESSAGE))


def words(done: subprocess.CompletedProcess[bytes]) -> str:
    return conmon.clean(done.stdout.decode(errors="replace"))


def first_line(argv: list[str]) -> str:
    """The first line a tool prints, for versions."""
    return (call(argv, 5.0).stdout.decode(errors="replace").splitlines() or ["unknown"])[0]
