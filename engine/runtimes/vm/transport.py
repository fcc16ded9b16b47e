"""How the process that owns a machine is connected with the agent in it: `vm_transport`. Floor 2.

Only here: what each way needs of the host, what QEMU is told for it, and how the connection comes about.

    serial   one end of a socket pair is QEMU's, the agent's frames go through a virtio-serial port. Works everywhere
    hybrid   vhost-device-vsock, a process of the machine's own beside QEMU, carries the guest's vsock to a unix socket.
             It sees the machine's memory, which is shared with it: that excludes snapshots (templates.py)
    vsock    the host's kernel carries the guest's vsock (AF_VSOCK), to a context id taken for this machine alone

With the latter two the agent listens at Port.AGENT and is dialled until it answers, since nobody says when it is there.
The protocol is the same over all. Source: <linux/vhost.h>; vhost-device's README; QEMU's hw/virtio/vhost-vsock.c.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from engine import host
from engine.errors import DeadlineExceeded, EngineError, RuntimeFailure, Unsupported
from engine.programs import find
from engine.runtimes.vm import vsock

SERIAL, HYBRID, VSOCK = "serial", "hybrid", "vsock"
PROGRAM = "vhost-device-vsock"
VHOST, GUEST = "vhost.sock", "guest.vsock"  # in QEMU's working directory: for QEMU, for who dials
VHOST_CID = 3  # of a guest that has no other beside it: the daemon is this machine's alone
DEVICE = Path("/dev/vhost-vsock")
SET_GUEST_CID = 0x4008AF60  # VHOST_VSOCK_SET_GUEST_CID
FIRST_CID, CIDS = 3, (1 << 32) - 4  # the others have meanings: vsock(7)
TRIES = 100
READY_SECONDS = 10.0  # for the daemon to listen
ATTEMPT_SECONDS = 3.0  # for one connection; before the agent listens it is refused, or hangs while the guest boots
PAUSE = 0.02
PATIENCE = 0.5  # the daemon's sockets are closed a moment before it has ended
LISTENS = 0x10000  # SO_ACCEPTCON in /proc/net/unix


def choose(wanted: str, features: Collection[str]) -> str:
    """SERIAL, HYBRID or VSOCK for a kernel with these features (none: not known). Unsupported says what is missing."""
    if wanted in ("", "auto", SERIAL):
        return SERIAL
    where, again = f"vm_transport: {wanted}", "echo auto > config/vm_transport"
    if features and "vsock" not in features:
        raise Unsupported(f"{where}: the guest's kernel has no vsock", at=wanted, hint=f"another kernel, or {again}")
    if not host.LINUX:
        raise Unsupported(f"{where} needs a Linux host", at=wanted, hint=again)
    if wanted == HYBRID and find(PROGRAM) is None:
        hint = f"install it (a package of that name, or cargo install {PROGRAM}), or {again}"
        raise Unsupported(f"{where}: {PROGRAM} is not installed", at=wanted, hint=hint)
    if wanted == VSOCK and (why := no_vhost()):
        raise Unsupported(f"{where}: {why}", at=wanted, hint=f"modprobe vhost_vsock, or {again}")
    return wanted


def no_vhost() -> str:
    """Why the host's kernel cannot carry a guest's vsock; empty when it can."""
    if not DEVICE.exists():
        return f"this host has no {DEVICE}"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by this user"
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        return f"this host has no AF_VSOCK: {error.strerror}"
    return ""


class Way(Protocol):
    """To the agent of one machine."""

    values: dict[str, Any]  # of qemu.Machine
    fds: list[int]  # that QEMU inherits

    def launched(self) -> None:
        """QEMU runs, or could not be started: what is its own is closed here."""

    def connect(self, ended: Callable[[], bool], seconds: float) -> socket.socket:
        """To the agent, or to where it will be. RuntimeFailure when the machine `ended` first, DeadlineExceeded."""

    def lost(self, patience: float = PATIENCE) -> str:
        """What of the host broke the connection; empty when nothing did, or is seen to within `patience` seconds."""

    def close(self) -> None:
        """With the machine. Idempotent."""


def open_way(kind: str, place: Path, prepare: Callable[[], None]) -> Way:
    """For a machine with its files in `place`; `prepare` runs in processes that are started for it. RuntimeFailure."""
    if kind == HYBRID:
        return HybridWay(place, prepare)
    return VsockWay() if kind == VSOCK else SerialWay()


class SerialWay:
    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.fds = [self._theirs.fileno()]
        self.values: dict[str, Any] = {"agent": self._theirs.fileno()}

    def launched(self) -> None:
        self._theirs.close()

    def connect(self, ended: Callable[[], bool], seconds: float) -> socket.socket:
        return self.ours

    def lost(self, patience: float = PATIENCE) -> str:
        return ""

    def close(self) -> None:
        pass


class HybridWay:
    def __init__(self, place: Path, prepare: Callable[[], None]) -> None:
        program, self._place, self.fds = find(PROGRAM), place, list[int]()
        if program is None:
            raise RuntimeFailure(f"{PROGRAM} is not installed any more")
        self.values: dict[str, Any] = {"vsock": VHOST, "append": f"fd.vsock={vsock.Port.AGENT.value}"}
        for name in (VHOST, GUEST):
            (place / name).unlink(missing_ok=True)
        argv = [program, "--guest-cid", str(VHOST_CID), "--socket", VHOST, "--uds-path", GUEST]
        try:
            with open(place / "vhost.log", "wb") as words:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    cwd=place,
                    umask=0o177,
                    preexec_fn=prepare,
                )
        except OSError as error:
            raise RuntimeFailure(f"{PROGRAM}: {error}") from error
        until = time.monotonic() + READY_SECONDS
        while not listens(self._process.pid, VHOST):
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                said = " ".join((place / "vhost.log").read_text(errors="replace").split())[-300:]
                raise RuntimeFailure(f"{PROGRAM} does not listen: {said}", hint="echo auto > config/vm_transport")
            time.sleep(PAUSE)

    def launched(self) -> None:
        pass

    def connect(self, ended: Callable[[], bool], seconds: float) -> socket.socket:
        return _dialled(vsock.Hybrid(self._place / GUEST).connect, ended, self.lost, seconds)

    def lost(self, patience: float = PATIENCE) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"{PROGRAM}, which carries its vsock, ended with status {self._process.wait(patience)}"
        return ""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class VsockWay:
    """The descriptor is opened here, for the context id is this machine's as long as it is open (as Kata has it)."""

    def __init__(self) -> None:
        try:
            self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeFailure(f"{DEVICE}: {error.strerror}", hint="echo auto > config/vm_transport") from error
        try:
            self._cid = take_cid(self._device)
        except BaseException:
            os.close(self._device)
            raise
        self.fds = [self._device]
        append = f"fd.vsock={vsock.Port.AGENT.value}"
        self.values: dict[str, Any] = {"cid": self._cid, "vhost": self._device, "append": append}

    def launched(self) -> None:
        os.close(self._device)

    def connect(self, ended: Callable[[], bool], seconds: float) -> socket.socket:
        return _dialled(vsock.Vsock(self._cid).connect, ended, self.lost, seconds)

    def lost(self, patience: float = PATIENCE) -> str:
        return ""

    def close(self) -> None:
        pass


def take_cid(device: int) -> int:
    """A context id that no other guest of this host has. RuntimeFailure."""
    for _ in range(TRIES):
        cid = FIRST_CID + int.from_bytes(os.urandom(8), "little") % CIDS
        try:
            fcntl.ioctl(device, SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise RuntimeFailure(f"{DEVICE}: a context id: {error.strerror}") from error
        else:
            return cid
    raise RuntimeFailure(f"{DEVICE}: no context id is free")


def listens(pid: int, name: str) -> bool:
    """Whether that process accepts connections at the unix socket it bound as `name`."""
    try:
        own = {os.readlink(entry) for entry in os.scandir(f"/proc/{pid}/fd")}
        with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
            rows = [line.split(maxsplit=7) for line in table]
    except OSError:  # it ends
        return False
    return any(
        len(row) == 8 and row[7].rstrip("\n") == name and f"socket:[{row[6]}]" in own and int(row[3], 16) & LISTENS
        for row in rows[1:]
    )


def _dialled(
    dial: Callable[[int, float], socket.socket], ended: Callable[[], bool], lost: Callable[[float], str], seconds: float
) -> socket.socket:
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            return dial(vsock.Port.AGENT, max(0.0, min(ATTEMPT_SECONDS, left)))
        except EngineError as error:
            if ended():
                raise RuntimeFailure("the machine ended before its agent listened") from error
            if why := lost(0.0):
                raise RuntimeFailure(why) from error
            if left <= 0:
                raise DeadlineExceeded(
                    f"the agent did not listen in time: {error.reason}", hint="the guest may hang; see its console log"
                ) from error
        time.sleep(PAUSE)
