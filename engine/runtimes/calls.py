"""Calling a runtime (runc, crun) or its helpers once, with a deadline. Floor 2; stateless."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import host
from engine.errors import DeadlineExceeded, InvalidArgument, RuntimeFailure, Unsupported
from engine.runtimes import conmon

OWN = "DUTCHMAN_MONITOR"  # in the environment: own or conmon
MAX_SHEBANG = 120  # bytes of a script's first line that every system reads
MODULE = f"""import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from engine.runtimes.{{name}} import main
sys.exit(main(sys.argv[1:]))
"""


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


def program(directory: Path, name: str, module: str) -> Path:
    """A file to be executed that is `main` of the module engine/runtimes/`module`, wherever this interpreter and the
    engine are. Its name tells its content, for other engines may have theirs there."""
    first = f"#!{sys.executable} -SE\n"
    if " " in sys.executable or len(first) > MAX_SHEBANG:  # a line for sh that is a string for Python
        first = f"#!/bin/sh\n'''exec' {shlex.quote(sys.executable)} -SE \"$0\" \"$@\"\n' '''\n"
    text = (first + MODULE.format(name=module)).encode()
    path = directory / f"{name}-{hashlib.sha256(text).hexdigest()[:8]}"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        host.write_atomic(path, text, 0o700)
    return path


def find_monitor(directory: Path) -> tuple[str, tuple[str, ...]]:
    """What keeps the process of a virtual machine: conmon, as `find_conmon` finds it, or where that does not exist
    monitor.py; $DUTCHMAN_MONITOR names the other one. `directory` takes its program."""
    named = os.environ.get(OWN, "")
    if named not in ("", "own", "conmon"):
        raise InvalidArgument(f"{OWN}: {named!r}", hint="own or conmon")
    if named == "conmon" or (host.LINUX and not named):
        return find_conmon()
    return str(program(directory, "dutchman-monitor", "monitor")), conmon.FLAGS


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
