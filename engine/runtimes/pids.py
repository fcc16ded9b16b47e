"""Processes of this host, each by its pid and its start time, for pids are used again. Floor 2; stateless.

Only here: how a process is told from a later one of the same pid, held, waited for, signalled and looked up. On Linux
by pidfds and proc(5); on macOS by kqueue(2) (EVFILT_PROC), libproc's proc_pidinfo and sysctl KERN_PROCARGS2.
Structures: XNU's <sys/proc_info.h>, <sys/event.h>, <sys/sysctl.h>.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

from engine import host

KEVENT = struct.Struct("=QhHIqQ")  # ident, filter, flags, fflags, data, udata
EVFILT_PROC, EV_ADD, NOTE_EXIT = -5, 1, 0x80000000
BSDINFO = struct.Struct("=12I16s32s5Ii2Q")  # struct proc_bsdinfo
STATUS, PPID, SECONDS, MICROSECONDS = 1, 4, 20, 21  # its fields
PROC_ALL_PIDS, PROC_PIDTBSDINFO, SZOMB = 1, 3, 5
CTL_KERN, KERN_PROCARGS2 = 1, 49
MAX_ARGUMENTS = 1 << 20  # bytes of a command line and its environment (ARG_MAX)

_libc = ctypes.CDLL(None, use_errno=True)


class Held(int):
    """A descriptor, to be closed, that is readable once its process has ended."""

    pid: int
    started: int


@functools.cache
def boot_id() -> str:
    """Of this boot of the host."""
    if host.LINUX:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    told = subprocess.run(["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, timeout=5)
    return told.stdout.decode(errors="replace").strip()


def start_time(pid: int) -> int | None:
    """When `pid` started, in a unit that only compares: clock ticks since boot (proc(5) stat field 22), microseconds on
    macOS. None when it is gone or a zombie."""
    if not host.LINUX:
        info = _bsdinfo(pid)
        return None if info is None or info[STATUS] == SZOMB else info[SECONDS] * 1_000_000 + info[MICROSECONDS]
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


class Waker:
    """Wakes who waits for its descriptor to be readable. Thread-safe."""

    def __init__(self) -> None:
        self._reading = self._writing = -1  # until somebody wants to wait

    def fileno(self) -> int:
        if self._reading < 0:
            self._reading, self._writing = os.pipe()
            for fd in (self._reading, self._writing):
                os.set_blocking(fd, False)
        return self._reading

    def wake(self) -> None:
        try:
            os.write(self._writing, b"1")
        except BlockingIOError:
            pass  # it is awake

    def clear(self) -> None:
        try:
            os.read(self._reading, 1 << 16)
        except BlockingIOError:
            pass  # it was something else

    def close(self) -> None:
        for fd in (self._reading, self._writing):
            os.close(fd)
        self._reading = self._writing = -1


def hold(pid: int) -> Held:
    """A child that has not been waited for: its pid cannot be another's."""
    held = Held(os.pidfd_open(pid) if host.LINUX else _watch_child(pid))
    held.pid, held.started = pid, start_time(pid) or 0
    return held


def open_process(pid: int, started: int) -> Held | None:
    """Exactly the process that had `pid` and that start time; None when it has ended."""
    try:
        fd = os.pidfd_open(pid) if host.LINUX else _watch(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return None
        raise
    if start_time(pid) != started:  # checked with the fd open: from here on the pid cannot be another's
        os.close(fd)
        return None
    held = Held(fd)
    held.pid, held.started = pid, started
    return held


def send(held: Held, signum: int) -> None:
    """Signal it. ProcessLookupError when it has ended."""
    if host.LINUX:
        signal.pidfd_send_signal(held, signum)
    elif ended(held, 0) or start_time(held.pid) != held.started:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    else:  # between the look and the signal it may end, but a pid is not given away that soon
        os.kill(held.pid, signum)


def ended(fd: int, seconds: float) -> bool:
    """Wait up to `seconds` for what `fd` (a Held, or a pidfd) stands for to end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, int(seconds * 1000))))


def words(pid: int) -> list[bytes]:
    """Its command line; nothing when it has ended, or belongs to somebody else."""
    if not host.LINUX:
        return arguments(_procargs(pid))
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def everybody() -> list[int]:
    """The pids of all processes."""
    if host.LINUX:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    size = _libproc().proc_listpids(PROC_ALL_PIDS, 0, None, 0) + 4096  # more may come meanwhile
    buffer = ctypes.create_string_buffer(size)
    size = _libproc().proc_listpids(PROC_ALL_PIDS, 0, buffer, size)
    return [pid for pid in struct.unpack(f"={max(0, size) // 4}i", buffer.raw[: max(0, size) // 4 * 4]) if pid > 0]


def parent(pid: int) -> int:
    """The pid of its parent; 0 when it has ended."""
    if not host.LINUX:
        info = _bsdinfo(pid)
        return 0 if info is None else int(info[PPID])
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[1])


# --- macOS ------------------------------------------------------------------------------------------------------------


@functools.cache
def _libproc() -> Any:
    return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)


def _bsdinfo(pid: int) -> tuple[Any, ...] | None:
    """struct proc_bsdinfo; None when there is no such process, or a zombie."""
    buffer = ctypes.create_string_buffer(BSDINFO.size)
    size = _libproc().proc_pidinfo(pid, PROC_PIDTBSDINFO, ctypes.c_uint64(0), buffer, BSDINFO.size)
    return BSDINFO.unpack(buffer.raw) if size == BSDINFO.size else None


def _watch(pid: int) -> int:
    """A kqueue that is readable once `pid` has ended. OSError ESRCH."""
    queue = _libc.kqueue()
    change = KEVENT.pack(pid, EVFILT_PROC, EV_ADD, NOTE_EXIT, 0, 0)
    if queue < 0 or _libc.kevent(queue, change, 1, None, 0, None) < 0:
        number = ctypes.get_errno()
        if queue >= 0:
            os.close(queue)
        raise OSError(number, os.strerror(number))
    os.set_inheritable(queue, False)
    return int(queue)


def _watch_child(pid: int) -> int:
    """The same; of one that has ended, a pipe that is at its end."""
    try:
        return _watch(pid)
    except ProcessLookupError:
        reading, writing = os.pipe()
        os.close(writing)
        return reading


def _procargs(pid: int) -> bytes:
    names = (ctypes.c_int * 3)(CTL_KERN, KERN_PROCARGS2, pid)
    buffer, size = ctypes.create_string_buffer(MAX_ARGUMENTS), ctypes.c_size_t(MAX_ARGUMENTS)
    if _libc.sysctl(names, 3, buffer, ctypes.byref(size), None, 0) < 0:
        return b""
    return buffer.raw[: size.value]


def arguments(block: bytes) -> list[bytes]:
    """The command line in what KERN_PROCARGS2 answers: how many words, the program's path, NULs, the words, the
    environment."""
    if len(block) < 4:
        return []
    (count,) = struct.unpack("=i", block[:4])
    _, _, rest = block[4:].partition(b"\0")
    return rest.lstrip(b"\0").split(b"\0")[: max(0, count)]
