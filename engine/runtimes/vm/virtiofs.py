"""virtiofsd: what a guest's mounts name, served faster than QEMU's own 9p does. Floor 2.

Only here: finding and starting it. It shares the guest's memory, which excludes starting from a template (templates.py:
a snapshot's memory is private), so machines that may do that have 9p. It ends with QEMU's connection, and is told to
die with the process that owns the machine. Both programs of this name take these options: QEMU's own (to 7.2) and the
one in Rust that followed it.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from engine import host, userids
from engine.errors import RuntimeFailure
from engine.runtimes.vm.qemu import VIRTIOFS

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")  # Debian has it in none of $PATH


def find() -> str:
    """The program; '' where there is none, or where it cannot work: it needs root to keep to its directory."""
    if not host.LINUX or not host.is_root() or userids.rootless() is not None:
        return ""
    return shutil.which("virtiofsd") or next((place for place in PLACES if os.access(place, os.X_OK)), "")


def serve(program: str, place: Path, shared: Path, prepare: Callable[[], None]) -> None:
    """Start it for `shared`; it takes a connection at VIRTIOFS in `place`. `prepare` runs in it. RuntimeFailure."""
    (place / VIRTIOFS).unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    try:
        with host.directory_fd(place) as here:  # the path may be longer than an address
            server.bind(f"/proc/self/fd/{here}/{VIRTIOFS}")
        server.listen(1)
        limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 20)
        # not --socket-path: QEMU's own makes a lock of its name for the whole host
        argv = [program, f"--fd={server.fileno()}", f"--rlimit-nofile={limit}", "-o", f"source={shared}"]
        argv += ["-o", "cache=auto", "-o", "xattr", "-o", "announce_submounts"]
        with open(place / "virtiofsd.log", "wb") as words:
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd=place,
                pass_fds=[server.fileno()],
                preexec_fn=prepare,
            )
    except OSError as error:
        raise RuntimeFailure(f"virtiofsd: {error}", hint="echo true > config/fast_start: 9p is used") from error
    finally:
        server.close()  # when virtiofsd has ended QEMU is told so
