"""Running a small program of the host for its answer. Floor 0, no state.

Only here: a program's run with bounds: its input, its time and the bytes it may answer; where programs for
administrators are, which an ordinary user's PATH leaves out, and Homebrew's links, too. Thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

PLACES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
# Homebrew on Apple silicon and on Intel; MacPorts
MAC_PLACES = ":".join(f"{root}/{place}" for root in ("/opt/homebrew", "/usr/local", "/opt/local")
                      for place in ("bin", "sbin", "opt/e2fsprogs/sbin"))  # fmt: skip


def find(name: str) -> str | None:
    """The path of a program, in PATH or where systems keep those for administrators; None when it is not there."""
    return shutil.which(name) or shutil.which(name, path=f"{PLACES}:{MAC_PLACES}")


def advice(package: str) -> str:
    """How to install a package that has one name everywhere."""
    return f"brew install {package}" if sys.platform == "darwin" else f"apt-get install {package}"


def run_helper(
    argv: Sequence[str], stdin: bytes, timeout: float, limit: int, environ: Mapping[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    """(exit status, standard output, standard error) of a program given `stdin`.

    TimeoutError after `timeout` seconds, OverflowError beyond `limit` bytes of either output (the program and what it
    started are killed then), OSError when it cannot be run. `stdin` must fit a pipe (64 KiB).
    """
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=None if environ is None else dict(environ),
        cwd="/",
        start_new_session=True,
    )
    try:
        assert process.stdin and process.stdout and process.stderr
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stdin)
            process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        deadline = time.monotonic() + timeout
        out: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        with selectors.DefaultSelector() as waiting:
            for fd in out:
                waiting.register(fd, selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select(max(0.0, deadline - time.monotonic())):
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        waiting.unregister(key.fd)
                    out[key.fd] += piece
                    if len(out[key.fd]) > limit:
                        raise OverflowError(f"more than {limit} bytes")
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no answer within {timeout:g} s")
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no end within {timeout:g} s") from error
        return code, bytes(out[process.stdout.fileno()]), bytes(out[process.stderr.fileno()])
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
