"""Taking over a machine that stands by (standbys.py): restored, warmed up, and stopped. Floor 2.

Only here: the owner's side of it. Who connects first to the socket of a standby has it, and nobody else ever. It comes
with the descriptors of its agent, console and monitor; its directory becomes the container's run/vm; its keeper moves
its taps into the run's network namespace, and attaches what is shared. Then its disks are exchanged for the container's
and it goes on. The keeper, QEMU's parent, kills it when this process's end of the connection is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import host
from engine.errors import RuntimeFailure
from engine.hostfiles import socket_address

NAME = ".standby-"  # and the key of its template, in the directory of the templates
SOCKET = "keeper.sock"
MAX_LINE = 1 << 20
MOST_SHARES = 200  # descriptors go in one message, which holds 253
SECONDS = 10.0
# <linux/mount.h>, <linux/fcntl.h>; the same on every architecture
SYS_OPEN_TREE, OPEN_TREE_CLONE, AT_RECURSIVE, AT_FDCWD = 428, 1, 0x8000, -100


class Machine:
    """A QEMU that is another process's child, as subprocess.Popen has its own."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd

    def poll(self) -> int | None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return 0 if poll.poll(0) else None

    def wait(self, timeout: float | None = None) -> int:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("qemu", timeout or 0)
        return 0

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return


@dataclass(frozen=True, slots=True)
class Taken:
    machine: Machine
    agent: socket.socket
    console: socket.socket
    watch: socket.socket
    keeper: socket.socket  # to be kept open: its end is the machine's
    hello: bytes


def take(directory: Path, key: str) -> Taken | None:
    """The machine that stands by for this template, which is the caller's from here on; None when there is none."""
    place = directory / f"{NAME}{key}"
    keeper = socket.socket(socket.AF_UNIX)
    try:
        there = os.lstat(place)
        if there.st_uid != os.geteuid() or there.st_mode & 0o077:
            raise RuntimeFailure(f"{place.name} is not this user's alone")
        keeper.settimeout(SECONDS)
        with socket_address(place / SOCKET) as address:
            keeper.connect(address)
        data, fds, _, _ = socket.recv_fds(keeper, MAX_LINE, 8)
        for fd in fds:
            os.set_inheritable(fd, False)
        if len(fds) != 4:
            raise RuntimeFailure("what stands by gave itself not away")
        known = json.loads(data)
        agent, console, watch = (socket.socket(fileno=fd) for fd in fds[:3])
        return Taken(Machine(known["pid"], fds[3]), agent, console, watch, keeper, bytes.fromhex(known["hello"]))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        keeper.close()
        return None
    except BaseException:
        keeper.close()
        raise


def give(taken: Taken, netns: str, taps: int, sources: Mapping[str, bool]) -> None:
    """What the container shares, and the run's network namespace, are its keeper's to attach. RuntimeFailure with its
    words."""
    if len(sources) > MOST_SHARES:
        raise RuntimeFailure(f"{len(sources)} shares")
    fds: list[int] = []
    try:
        if taps:
            fds.append(os.open(netns, os.O_RDONLY | os.O_CLOEXEC))
        shares = []
        for source, writable in sources.items():
            fds.append(open_tree(source))
            shares.append([os.path.isdir(source), writable])
        request = json.dumps({"taps": taps, "shares": shares}).encode() + b"\n"
        socket.send_fds(taken.keeper, [request], fds)
        answer = taken.keeper.recv(MAX_LINE)
    finally:
        for fd in fds:
            os.close(fd)
    if answer != b"ok\n":
        raise RuntimeFailure(f"its keeper: {answer.decode(errors='replace').strip() or 'ended'}")


def open_tree(path: str) -> int:
    """A copy of the mounts at `path`, attached nowhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE
    words = (ctypes.c_long(SYS_OPEN_TREE), ctypes.c_long(AT_FDCWD), ctypes.c_char_p(os.fsencode(path)))
    fd = int(libc.syscall(*words, ctypes.c_long(flags)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd


def go_on(watch: socket.socket, image: str, upper: int) -> None:
    """With these disks. QEMU gets a duplicate of `upper`, so what locks that file does so until QEMU has ended.
    RuntimeFailure with QEMU's words."""
    file = {"driver": "file", "node-name": "upper", "filename": "/dev/fdset/1", "discard": "unmap"}
    extents = {"driver": "file", "filename": image, "read-only": True}
    disks = [
        {"driver": "raw", "node-name": "disk0", "read-only": True, "file": "image"},
        {"driver": "raw", "node-name": "disk1", "discard": "unmap", "detect-zeroes": "unmap", "file": "upper"},
    ]
    ask(watch, "add-fd", {"fdset-id": 1}, upper)
    ask(watch, "blockdev-add", file)
    ask(watch, "blockdev-add", {"driver": "vmdk", "node-name": "image", "read-only": True, "file": extents})
    ask(watch, "blockdev-reopen", {"options": disks})
    ask(watch, "cont")


def ask(watch: socket.socket, command: str, arguments: Mapping[str, Any] | None = None, fd: int = -1) -> None:
    """One command of QEMU's monitor, and its answer; what else it says meanwhile is dropped."""
    line = json.dumps({"execute": command, "arguments": dict(arguments or {}), "id": command}).encode() + b"\n"
    watch.settimeout(SECONDS)
    try:
        socket.send_fds(watch, [line], [] if fd < 0 else [fd])
        said, done = b"", False
        while True:
            said += watch.recv(1 << 16) or _over(command)
            while b"\n" in said:
                one, _, said = said.partition(b"\n")
                answer = json.loads(one)
                if answer.get("id") != command:
                    continue
                if "error" in answer:
                    raise RuntimeFailure(f"QEMU: {command}: {answer['error'].get('desc')}")
                done = True
            if done and not said:
                return
    except (OSError, ValueError) as error:
        raise RuntimeFailure(f"QEMU: {command}: {error}") from error
    finally:
        watch.settimeout(None)


def _over(command: str) -> bytes:
    raise RuntimeFailure(f"QEMU ended before it answered to {command}")


def ordinary(pid: int, cpus: set[int] | None) -> None:
    """Its threads run as this process's own do, on those CPUs."""
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        if host.is_root():
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, 0))
        if cpus is not None:
            os.sched_setaffinity(thread, cpus)
