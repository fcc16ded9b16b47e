"""The data plane: a second process with a second mount, serving immutable trees only, at the kernel's cache speed.

Floor 6. `python -m fdfs.data STORE MOUNTPOINT`. Only here: the process, its trees, and the orders on stdin. It serves
<store>/run/data/<hex of chain id>/…, through /dev/fuse itself (devfuse.py) or libfuse (treefuse.py; asked for by
DUTCHMAN_DATA=libfuse). Orders are JSON lines on stdin, answered by one JSON line each on stdout:

    {"bind": TARGET, "chain": HEX, "origins": {diff_id: {...}}}    a tree, read-only, over TARGET
    {"bind": TARGET, "directory": SOURCE}                          a directory, as it is, over TARGET
    {"unbind": TARGET}      {"clear": TARGET}                      the latter: what a killed predecessor left there
    {"drop": HEX}                                                  forget a tree that was removed

Orders run in a thread of their own: mount(2) on TARGET makes the kernel ask the daemon, and on a tree it asks the loop
of this process, which goes on meanwhile. A mounted target is kept as an O_PATH descriptor, so it can be unmounted by
/proc/self/fd without asking anyone. At end of stdin (the daemon is gone) everything made here is unmounted.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from engine import host
from engine.store.tree import Handle, Tree
from fdfs import treefuse
from fdfs.devfuse import Connection
from fdfs.rootfs import salt, xattrs

log = logging.getLogger(__name__)

MAX_TREES = 128
MS_NOSUID_NODEV = host.MS_NOSUID | host.MS_NODEV


class Forest:
    """The trees of the store by hex chain id, opened when first asked for. Used by the loop's thread and by orders."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._trees: dict[bytes, tuple[Tree, int]] = {}
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        self.origins: dict[bytes, dict[str, dict[str, str]]] = {}

    def _data(self, diff_id: str) -> Handle:
        handle = self._handles.get(diff_id)
        if handle is None:
            handle = Handle(self._store / "layers" / "sha256" / diff_id.removeprefix("sha256:") / "data")
            self._handles[diff_id] = handle
        return handle

    def get(self, name: bytes) -> tuple[Tree, int]:
        """(tree, what is mixed into its inode numbers). KeyError when there is none of that name."""
        known = self._trees.get(name)
        if known is not None:
            return known
        if not re.fullmatch(rb"[0-9a-f]{64}", name):
            raise KeyError(name)
        try:
            tree = Tree(self._store / "trees" / "sha256" / name.decode(), self._data)
        except FileNotFoundError:
            raise KeyError(name) from None
        if len(self._trees) >= MAX_TREES:
            self._trees.pop(next(iter(self._trees)), None)
        entry = self._trees[name] = (tree, salt("sha256:" + name.decode()))
        return entry

    def xattrs(self, tree: Tree, nid: int, name: bytes) -> dict[bytes, bytes]:
        """The xattrs of one node, provenance included."""
        return xattrs(tree, nid, self.origins.get(name, {}))

    def drop(self, name: bytes) -> None:
        self._trees.pop(name, None)
        self.origins.pop(name, None)


class Binds:
    """What this process has bound over the control mount."""

    def __init__(self, forest: Forest, data: Path) -> None:
        self._forest, self._data = forest, data
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
                    host.unmount(Path(order["clear"]))
                elif "drop" in order:
                    self._forest.drop(order["drop"].encode())
            return {"ok": True}
        except (OSError, KeyError, ValueError) as error:
            return {"ok": False, "reason": str(error)}

    def _bind(self, order: dict[str, Any]) -> bool:
        """Whether anything had to be done."""
        target, chain = order["bind"], order.get("chain")
        if chain:
            self._forest.origins[chain.encode()] = order.get("origins", {})
            if target in self._bound:
                return False
            source = self._data / chain
        else:
            source = Path(order["directory"])
            known = self._bound.get(target)
            if known is not None:
                here, there = os.fstat(known), os.stat(source)
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return False
                self._unbind(target)
        host.bind(source, Path(target))
        try:
            flags = host.MS_BIND | host.MS_REMOUNT | MS_NOSUID_NODEV | (host.MS_RDONLY if chain else 0)
            host.mount("none", Path(target), "none", flags)
            self._bound[target] = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            host.unmount(Path(target))
            raise
        return True

    def _unbind(self, target: str) -> None:
        fd = self._bound.pop(target, None)
        if fd is None:
            return
        try:
            host.unmount(Path(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            for target in reversed(list(self._bound)):
                try:
                    self._unbind(target)
                except OSError as error:
                    log.warning("unbinding %s: %s", target, error)


def transport(forest: Forest, mountpoint: Path) -> Callable[[], None]:
    """Mount by the fastest way this host has; the returned function serves until it is unmounted."""
    if host.LINUX and host.is_root() and os.environ.get("DUTCHMAN_DATA", "") != "libfuse":
        try:
            return Connection(forest, mountpoint, forest.xattrs).serve
        except OSError as error:
            log.warning("no mount by /dev/fuse itself: %s", error)
    return treefuse.mounted(forest, mountpoint)


def serve(store: Path, mountpoint: Path) -> None:
    """Mount, answer `ready` on stdout, obey until stdin ends, unmount. Runs in the main thread."""
    host.die_with_parent()
    if host.is_mounted(mountpoint):
        host.unmount(mountpoint)  # left by a killed one
    mountpoint.mkdir(parents=True, exist_ok=True)
    os.chmod(mountpoint.parent, 0o700)
    forest = Forest(store)
    loop = transport(forest, mountpoint)
    binds = Binds(forest, mountpoint)

    def orders() -> None:
        try:
            print('{"ok": true, "ready": true}', flush=True)
            for line in sys.stdin:
                print(json.dumps(binds.obey(json.loads(line))), flush=True)
        except (OSError, ValueError) as error:
            log.warning("orders end: %s", error)
        finally:
            binds.close()
            host.unmount(mountpoint)  # ends the loop below

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    # SIGTERM (the daemon was killed): the loop may sit in C, so a thread waits for the signal instead of a handler
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def terminated() -> None:
        signal.sigwait({signal.SIGTERM})
        binds.close()
        host.unmount(mountpoint)

    threading.Thread(target=orders, name="orders", daemon=True).start()
    threading.Thread(target=terminated, name="signals", daemon=True).start()
    gc.collect()
    gc.freeze()
    loop()
    binds.close()
    os._exit(0)  # threads may sit in read(2) of stdin; there is nothing left to save


def spawn(store: Path, mountpoint: Path, log_to: Any = None) -> subprocess.Popen[bytes]:
    """Start the process. Call from a thread that lives as long as the daemon: the child dies with that thread."""
    command = [sys.executable, "-m", "fdfs.data", str(store), str(mountpoint)]
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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s data %(message)s")
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
