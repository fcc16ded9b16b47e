"""The process that mounts: what people see of images, containers and volumes, laid over the control mount.

Floor 6. `python -m fdfs.binds`. Only here: the process and the orders on its stdin, JSON lines, answered by one JSON
line each on stdout:

    {"bind": TARGET, "image": EROFS, "devices": [DATA, …]}    an immutable tree, served by the kernel itself
    {"bind": TARGET, "directory": SOURCE}                     a directory, as it is
    {"unbind": TARGET}      {"clear": TARGET}                 the latter: what a killed predecessor left there

It is a process of its own because mount(2) on TARGET makes the kernel ask the daemon, which must not wait for itself,
and because it outlives the daemon by a moment: at end of stdin, or SIGTERM, everything made here is unmounted. A
mounted target is kept as an O_PATH descriptor, so it can be unmounted by /proc/self/fd without asking anyone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from engine import host, hostmounts

log = logging.getLogger(__name__)

MS_NOSUID_NODEV = hostmounts.MS_NOSUID | hostmounts.MS_NODEV


class Binds:
    """What this process has mounted over the control mount. Thread-safe."""

    def __init__(self) -> None:
        self._bound: dict[str, int] = {}  # target -> O_PATH descriptor of what is mounted there
        self._lock = threading.Lock()

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; the answer names what failed."""
        try:
            with self._lock:
                if "bind" in order:
                    return {"ok": True, "bound": self._bind(order)}
                if "unbind" in order:
                    self._unbind(order["unbind"])
                elif "clear" in order:
                    hostmounts.unmount(Path(order["clear"]))
            return {"ok": True}
        except (OSError, KeyError, ValueError) as error:
            return {"ok": False, "reason": str(error)}

    def _bind(self, order: dict[str, Any]) -> bool:
        """Whether anything had to be done."""
        target = order["bind"]
        known = self._bound.get(target)
        if "image" in order:
            if known is not None:
                return False
            devices = [Path(device) for device in order["devices"]]
            hostmounts.mount_erofs(Path(order["image"]), devices, Path(target), inert=True)
        else:
            source = Path(order["directory"])
            if known is not None:
                here, there = os.fstat(known), os.stat(source)
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return False
                self._unbind(target)
            hostmounts.bind(source, Path(target))
        try:
            if "directory" in order:
                hostmounts.mount(
                    "none", Path(target), "none", hostmounts.MS_BIND | hostmounts.MS_REMOUNT | MS_NOSUID_NODEV
                )
            self._bound[target] = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            hostmounts.unmount(Path(target))
            raise
        return True

    def _unbind(self, target: str) -> None:
        fd = self._bound.pop(target, None)
        if fd is None:
            return
        try:
            hostmounts.unmount(Path(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            for target in reversed(list(self._bound)):
                try:
                    self._unbind(target)
                except OSError as error:
                    log.warning("unbinding %s: %s", target, error)


def serve() -> None:
    """Answer `ready` on stdout, obey until stdin ends or SIGTERM comes, unmount. Never returns."""
    # blocked in every thread and waited for in one: a handler could interrupt an order, or the unmounting itself
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    host.die_with_parent()
    binds = Binds()

    def end() -> None:
        binds.close()
        os._exit(0)  # the other thread may sit in read(2) or sigwait(3); there is nothing left to save

    def terminated() -> None:
        signal.sigwait({signal.SIGTERM})
        end()

    threading.Thread(target=terminated, name="signals", daemon=True).start()
    try:
        print('{"ok": true, "ready": true}', flush=True)
        for line in sys.stdin:
            print(json.dumps(binds.obey(json.loads(line))), flush=True)
    except (OSError, ValueError) as error:
        log.info("orders end: %s", error)  # the daemon was killed: its end of the pipes is gone
    end()


def spawn(log_to: Any = None) -> subprocess.Popen[bytes]:
    """Start the process. Call from a thread that lives as long as the daemon: the child dies with that thread."""
    command = [sys.executable, "-m", "fdfs.binds"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log_to,
        cwd="/",
        env=os.environ | {"PYTHONPATH": _root()},
    )


def _root() -> str:
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s binds %(message)s")
    serve()
