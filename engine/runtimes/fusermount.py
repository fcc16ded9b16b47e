"""FUSE mounts made and taken away as an ordinary user. Floor 2.

Only here: fusermount3, which mounts as root on behalf of a user and hands the descriptor of /dev/fuse over. For the
process outside the namespace of an engine without root, and for taking down what a killed daemon left. Stateless.
Source: util/fusermount.c of libfuse ($_FUSE_COMMFD).
"""

from __future__ import annotations

import array
import socket
import subprocess
from pathlib import Path

from engine import host, hostmounts
from engine.errors import RuntimeFailure, Unsupported
from engine.runtimes.rootless import PATH, SECONDS, tool


def fusermount() -> str:
    found = tool("fusermount3") or tool("fusermount")
    if found is None:
        raise Unsupported("fusermount3 is not installed", hint="apt-get install fuse3")
    return found


def mount_fuse(place: Path, options: str) -> int:
    """Mount FUSE at `place` as this user; the descriptor of /dev/fuse to serve it with. RuntimeFailure says why not."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [fusermount(), "-o", options, "--", str(place)],
            env={"PATH": PATH, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            text = done.stderr.decode(errors="replace").strip().removeprefix("fusermount3: ")
            hint = "as root: echo user_allow_other >> /etc/fuse.conf" if "user_allow_other" in text else None
            raise RuntimeFailure(f"cannot mount at {place}: {text}", hint=hint)
        ours.settimeout(SECONDS)
        return receive_fd(ours)[1]


def unmount_fuse(place: Path) -> None:
    """Detach the FUSE mount at `place`. RuntimeFailure says why not."""
    argv = ["/sbin/umount", "-f", str(place)] if host.MACOS else [fusermount(), "-u", "-z", "-q", "--", str(place)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode and hostmounts.is_mounted(place):
        raise RuntimeFailure(f"cannot unmount {place}: {done.stderr.decode(errors='replace').strip()}")


def receive_fd(source: socket.socket) -> tuple[bytes, int]:
    """One message and the descriptor that came with it (-1 without one)."""
    room = array.array("i", [-1])
    data, more, _, _ = source.recvmsg(4096, socket.CMSG_LEN(room.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in more:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(payload) >= room.itemsize:
            room = array.array("i", payload[: room.itemsize])
    return data, room[0]
