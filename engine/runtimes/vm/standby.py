"""Taking over a machine that stands by (standbys.py): restored, warmed up, and stopped. Floor 2.

Only here: what the driver and the owner say to its keeper (standbykeeper.py).

The driver engages it: who connects first to the socket of a standby has it, and nobody else ever. Its directory becomes
the container's run/vm. With the container's plan, its disk, its network namespace and what it shares the keeper does
what an owner does after a boot, up to RUN: meanwhile conmon and the owner come up. The owner then takes it at another
socket in that directory, with the descriptors of agent, console and monitor. The keeper, QEMU's parent, kills it when
the end of the connection of who has it, the driver's and then the owner's, is closed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import host, hostmounts
from engine.errors import RuntimeFailure
from engine.hostfiles import socket_address

NAME = ".standby-"  # and the key of its template, in the directory of the templates
SOCKET, OWNERS = "keeper.sock", "owner.sock"
MAX_LINE = 1 << 20
MOST_SHARES = 200  # descriptors go in one message, which holds 253
SECONDS = 10.0
SET_UP_SECONDS = 90.0  # for the guest to be set up, on a busy host


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

    def close(self) -> None:
        """It is nothing to this process any more."""
        os.close(self._pidfd)


class Engaged(NamedTuple):
    """By the driver."""

    machine: Machine
    keeper: socket.socket  # to be kept open until the owner has it: its end is the machine's
    pids: tuple[int, int]  # of the keeper, of QEMU
    started: int  # QEMU, in clock ticks since boot

    def leave(self) -> None:
        """Unless the owner has it, it ends now."""
        self.keeper.close()
        self.machine.close()

    def end(self) -> None:
        """The same; returns when it has ended. RuntimeFailure when it has not."""
        self.keeper.close()
        try:
            self.machine.wait(SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeFailure(f"QEMU {self.pids[1]} does not end") from error
        finally:
            self.machine.close()


class Taken(NamedTuple):
    """By the owner."""

    machine: Machine
    agent: socket.socket
    console: socket.socket
    watch: socket.socket
    keeper: socket.socket  # to be kept open: its end is the machine's
    hello: bytes
    stream: int  # of RUN
    refused: tuple[int, str, str] | None  # what the guest said to RUN: values of GuestError


def engage(directory: Path, key: str) -> Engaged | None:
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
        known, fds = receive(keeper)
        if not known:  # somebody was quicker
            keeper.close()
            return None
        return Engaged(Machine(known["pid"], fds[0]), keeper, (known["keeper"], known["pid"]), known["started"])
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, NotADirectoryError):
        keeper.close()
        return None
    except BaseException:
        keeper.close()
        raise


def set_up(
    engaged: Engaged, place: Path, plan: Mapping[str, Any], document: Mapping[str, Any], upper: int,
    sources: Mapping[str, bool],
) -> None:  # fmt: skip
    """Have its keeper begin to set the guest up for the container whose run/vm is to be `place`. RuntimeFailure."""
    if len(sources) > MOST_SHARES:
        raise RuntimeFailure(f"{len(sources)} shares")
    fds: list[int] = []
    try:
        if plan["taps"]:
            fds.append(os.open(plan["netns"], os.O_RDONLY | os.O_CLOEXEC))
        shares = []
        for source, writable in sources.items():
            fds.append(hostmounts.open_tree(source))
            shares.append([os.path.isdir(source), writable])
        request = {"place": str(place), "plan": plan, "document": document, "shares": shares}
        send(engaged.keeper, request, [upper, *fds])
        if not receive(engaged.keeper)[0]:
            raise RuntimeFailure("its keeper ended")
    finally:
        for fd in fds:
            os.close(fd)


def take(place: Path) -> Taken:
    """The machine whose files are at `place`, as far as RUN, once its keeper has come to that. RuntimeFailure."""
    keeper = socket.socket(socket.AF_UNIX)
    try:
        keeper.settimeout(SET_UP_SECONDS)
        with socket_address(place / OWNERS) as address:
            keeper.connect(address)
        known, fds = receive(keeper)
        if len(fds) != 4:
            raise RuntimeFailure(str(known.get("failed") or "its keeper ended"))
        agent, console, watch = (socket.socket(fileno=fd) for fd in fds[:3])
        machine, refused = Machine(known["pid"], fds[3]), known["refused"]
        refused = None if refused is None else (int(refused[0]), str(refused[1]), str(refused[2]))
        return Taken(
            machine, agent, console, watch, keeper, bytes.fromhex(known["hello"]), int(known["stream"]), refused
        )
    except BaseException:
        keeper.close()
        raise


def send(connection: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode() + b"\n"
    connection.sendall(data[socket.send_fds(connection, [data], fds) :])


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A line, and what came with it; nothing at the connection's end. ValueError for what is too long."""
    data, fds = b"", []
    while not data.endswith(b"\n"):
        more, came, _, _ = socket.recv_fds(connection, 1 << 16, MOST_SHARES + 8)
        for fd in came:
            os.set_inheritable(fd, False)
        fds += came
        data += more
        if not more:
            return {}, fds
        if len(data) > MAX_LINE:
            raise ValueError("a line without end")
    message: dict[str, Any] = json.loads(data)
    return message, fds


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


def end(pid: int, started: int) -> None:
    """The QEMU of a machine that was engaged, and cannot be taken: it must not have the container's disk any more."""
    from engine.runtimes.pids import open_process  # few need it

    if (pidfd := open_process(pid, started)) is None:
        return
    machine = Machine(pid, pidfd)
    machine.kill()
    try:
        machine.wait(SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure(f"QEMU {pid} does not end") from error
    finally:
        machine.close()


def _over(command: str) -> bytes:
    raise RuntimeFailure(f"QEMU ended before it answered to {command}")


def ordinary(pid: int, cpus: set[int] | None) -> None:
    """Its threads run as this process's own do, on those CPUs."""
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        if host.is_root():
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, 0))
        if cpus is not None:
            os.sched_setaffinity(thread, cpus)
