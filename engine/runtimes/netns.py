"""Network namespaces with a name: made before the container's process is, kept by a bind mount. Floor 2.

Only here: how one is made, what runs inside one, and what is done to a bridge by hand: its removal where nobody else
removed it, and that it keeps its address. Linux, root (or root of a user namespace that owns the network).
Thread-safe, no state.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine import host, hostmounts

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCBRDELBR = 0x8913, 0x8914, 0x89A1  # <linux/sockios.h>
SIOCGIFHWADDR, SIOCSIFHWADDR = 0x8927, 0x8924
IFF_UP = 1


def make(path: Path) -> None:
    """A new, empty network namespace bound at `path` (a file is made there). OSError when the kernel refuses."""
    remove(path)
    for again in (True, False):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            break
        except FileNotFoundError:  # the directory was removed as the last namespace went
            if not again:
                raise

    def work() -> None:
        hostmounts.unshare(hostmounts.CLONE_NEWNET)
        hostmounts.bind(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net"), path)

    try:
        on_a_thread(work)
    except BaseException:
        remove(path)
        raise


def on_a_thread(work: Callable[[], None]) -> None:
    """Run what enters a namespace on a thread of its own: only that is in it, and it ends right after."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def inside(namespace: Path, work: Callable[[], None]) -> None:
    """Run `work` in the network namespace at a path."""

    def enter() -> None:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            hostmounts.enter(fd, hostmounts.CLONE_NEWNET)
        finally:
            os.close(fd)
        work()

    on_a_thread(enter)


def remove(path: Path) -> None:
    """Let go of the namespace at `path`; interfaces in it end with its last process. Idempotent."""
    if host.LINUX:
        hostmounts.unmount(path)
    path.unlink(missing_ok=True)


def leave(directory: Path) -> None:
    """Remove the directory of a store's namespaces, and the one above it, unless they are in use."""
    for empty in (directory, directory.parent):
        with suppress(OSError):
            empty.rmdir()


def present(path: Path) -> bool:
    """Whether a namespace is bound at `path` (a plain file is none)."""
    try:
        return os.stat(path).st_dev != os.stat(path.parent).st_dev
    except FileNotFoundError:
        return False


def delete_bridge(name: str) -> None:
    """Take a bridge down and delete it (ioctl(2), as `brctl delbr`). Idempotent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH14x", name.encode()[:15], 0)
        try:
            flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode()[:15], flags & ~IFF_UP))
            fcntl.ioctl(control, SIOCBRDELBR, struct.pack("16s", name.encode()[:15]))
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENXIO):
                raise


def pin_address(bridge: str) -> None:
    """Have a bridge keep the hardware address it has. OSError when there is none of that name.

    The kernel gives a bridge the lowest address of its ports until somebody sets one, be it the same. When that port
    goes, everybody else would send to the gateway's address of old until their neighbour entry is doubted: packets
    are lost for half a minute and longer.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        answer = fcntl.ioctl(control, SIOCGIFHWADDR, struct.pack("16s24x", bridge.encode()[:15]))
        fcntl.ioctl(control, SIOCSIFHWADDR, answer)
