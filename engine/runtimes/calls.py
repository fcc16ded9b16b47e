"""Calling a runtime (runc, crun) or its helpers once, with a deadline. Floor 2; stateless."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from engine import host
from engine.errors import DeadlineExceeded, RuntimeFailure, Unsupported
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


def search_path() -> str:
    """Where runtimes and their helpers are looked for."""
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def find_conmon() -> tuple[str, tuple[str, ...]]:
    """conmon's path, and those of conmon.FLAGS that it knows. Unsupported says what is missing."""
    if not host.LINUX:
        raise Unsupported("needs a Linux host")
    if not host.is_root():
        raise Unsupported("needs root, or subordinate ids of your own (dutchman doctor)")
    monitor = shutil.which("conmon", path=search_path())
    if monitor is None:
        raise Unsupported("conmon is not installed (apt-get install conmon)")
    known = call([monitor, "--help"], 5.0).stdout.decode(errors="replace")
    return monitor, tuple(flag for flag in conmon.FLAGS if flag in known)
