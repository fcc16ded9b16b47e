"""Making grafts fast: what is mounted over them, and when. Floor 6.

Only here: which grafts of the control mount get the real thing mounted over them. Immutable trees (rootfs/ of images,
fs/ of layers; as EROFS images, so the kernel serves them) when they appear and when they are used, at most MAX_BINDS at
a time, the least recently used going first; containers' rootfs/ and volumes' data/ as soon as there is something to
bind. Everything works without: where the host cannot (not root, not Linux, DUTCHMAN_NO_BIND=1) or the process that
mounts is gone, the control mount serves.

Threading: a handler only ever puts a wish in a queue; one thread carries the wishes out through binds.py. No
handler waits for a bind, with one exception: the readlink of a tag may wait for FOLLOW_SECONDS, so that what is about
to be walked does not get covered half way. readlink holds no lock that a bind needs; lookups do, and must not wait.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine import host, userids
from engine.errors import EngineError
from engine.events import Event, Missed
from fdfs import binds
from fdfs.entry import BindSource, Dir, Keys, walk

log = logging.getLogger(__name__)

MAX_BINDS = 64
AGAIN_SECONDS = 1.0  # a directory's mount may be replaced; a wish that failed may be repeated
FOLLOW_SECONDS = 0.1
FOLLOWED = 4  # links to unbound trees within a second; beyond it someone lists links and follows none
READY_SECONDS = 10.0


def possible() -> bool:
    """Whether this host can bind at all and nobody asked not to."""
    if userids.rootless() is not None:
        return False  # what is mounted in a namespace is not seen by the user's shells
    return host.LINUX and host.is_root() and os.environ.get("DUTCHMAN_NO_BIND", "") in ("", "0")


class Binder:
    """Wishes in, orders out. `start` after the control mount serves; `stop` before it is unmounted."""

    def __init__(self, engine: Any, root: Dir, mount: Path) -> None:
        self._engine, self._root, self._mount = engine, root, mount
        self._queue: queue.SimpleQueue[tuple[str, bytes, Dir | None, Keys] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._bound: OrderedDict[bytes, BindSource] = OrderedDict()
        self._asked: dict[bytes, float] = {}
        self._pending: set[bytes] = set()  # wishes of handlers not carried out yet
        self._done = threading.Condition(self._lock)
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._subscription: Any = None
        self._followed: deque[float] = deque(maxlen=FOLLOWED)  # when links to unbound trees were read
        self._alive = False
        self._deaths = 0
        self._ended = threading.Event()

    # --- called by handlers: never blocks ---------------------------------------------------------------------------

    def on_graft(self, path: bytes, row: Dir, keys: Keys) -> None:
        """A graft (or its parent) is being used."""
        if not self._alive:
            return
        now = time.monotonic()
        with self._lock:
            known = self._bound.get(path)
            if known is not None:
                self._bound.move_to_end(path)
                if known.chain:
                    return
            if now - self._asked.get(path, -AGAIN_SECONDS) < AGAIN_SECONDS:
                return
            self._asked[path] = now
            self._pending.add(path)
        self._queue.put(("bind", path, row, keys))

    def before_follow(self, target: bytes) -> None:
        """A symlink to `target` is about to be followed: have its trees bound first, within FOLLOW_SECONDS."""
        if not self._alive or not target.startswith((b"/images/by-digest/", b"/layers/")) or self._listed():
            return
        try:
            found = walk(self._engine, self._root, target)
        except EngineError:
            return
        if not isinstance(found.row, Dir):
            return
        for row in found.row.rows:
            if isinstance(row, Dir) and row.bind is not None:
                path = target.rstrip(b"/") + b"/" + row.name.encode()
                if self._unbound(path):
                    self.on_graft(path, row, found.keys)
                    self._settled(path)

    def _listed(self) -> bool:
        """Whether links are read for their own sake, as `ls -l` does: readlink(2) does not say. A thousand images must
        not be mounted, nor waited for, one after the other; whoever then does go into one has it bound by that."""
        with self._lock:
            now = time.monotonic()
            many = len(self._followed) == FOLLOWED and now - self._followed[0] < 1.0
            if many:
                self._followed.append(now)
            return many

    def _unbound(self, path: bytes) -> bool:
        """Whether it is worth a wish; counts for `_listed`."""
        with self._lock:
            if path in self._bound:
                return False
            self._followed.append(time.monotonic())
            return True

    def _settled(self, path: bytes) -> None:
        deadline = time.monotonic() + FOLLOW_SECONDS
        with self._done:
            while self._alive and path in self._pending and (rest := deadline - time.monotonic()) > 0:
                self._done.wait(rest)

    # --- the thread that carries wishes out -------------------------------------------------------------------------

    def start(self) -> bool:
        """Whether there is a process that mounts. Call from the main thread: it dies with the calling thread."""
        if not possible():
            return False
        if not self._launch():
            return False
        self._subscription = self._engine.journal.subscribe()
        for name, target in (("binder", self._work), ("binder-events", self._listen)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        for path in self._known():
            self._wish(path)
        return True

    def _launch(self) -> bool:
        """Start the process that mounts and have its end noticed. In a thread that lasts: the process dies with it."""
        process = self._process = binds.spawn()
        killer = threading.Timer(READY_SECONDS, process.kill)
        killer.start()
        ready = _answer(process)
        killer.cancel()
        if ready is None or not ready.get("ready"):
            log.warning("no process that mounts: browsing goes through the control mount")
            process.kill()
            process.wait()
            return False
        self._alive = True
        threading.Thread(target=self._watch, args=(process,), name="binder-watch", daemon=True).start()
        return True

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if self._process is process:
            self._alive = False
            self._wish(b"/", "revive")

    def _revive(self) -> None:
        """The process that mounts ended by itself. A new one takes away what it left and mounts again."""
        log.warning("the process that mounts ended; starting another")
        with self._lock:
            dead = list(self._bound)
            self._bound.clear()
            self._asked.clear()
        self._deaths += 1
        if self._deaths > 1:
            self._ended.wait(min(2.0**self._deaths, 60.0))
        if self._ended.is_set() or not self._launch():
            return
        for path in dead:
            self._order({"clear": os.fsdecode(os.fsencode(self._mount) + path)})
        for path in dead:
            self._wish(path)

    def _known(self) -> Iterable[bytes]:
        """What exists now, the most wanted last."""
        for image in sorted(self._engine.images.all(), key=lambda image: image.pulled_ns)[-MAX_BINDS // 2 :]:
            yield f"/images/by-digest/{image.digest}/rootfs".encode()
        for volume in self._engine.volumes.all():
            yield f"/volumes/{volume.name}/data".encode()
        for container in self._engine.containers.all():
            yield f"/containers/{container.name}/rootfs".encode()

    def _wish(self, path: bytes, verb: str = "bind") -> None:
        self._queue.put((verb, path, None, ()))

    def _work(self) -> None:
        while (wish := self._queue.get()) is not None:
            verb, path, row, keys = wish
            try:
                if verb == "revive":
                    self._revive()
                    continue
                if verb == "unbind":
                    self._unbind_below(path)
                    continue
                if row is None:
                    found = walk(self._engine, self._root, path)
                    if not isinstance(found.row, Dir):
                        continue
                    row, keys = found.row, found.keys
                self._carry_out(path, row, keys)
            except EngineError:
                self._unbind_below(path)  # it went away meanwhile
            except Exception:
                log.exception("binding %r", path)
            finally:
                with self._done:
                    self._pending.discard(path)
                    self._done.notify_all()

    def _carry_out(self, path: bytes, row: Dir, keys: Keys) -> None:
        if row.bind is None:
            return
        source: BindSource = row.bind(self._engine, *keys)
        target = os.fsdecode(os.fsencode(self._mount) + path)
        order: dict[str, Any] = {"bind": target}
        if source.chain:
            if path in self._bound:
                return
            trees = self._engine.trees
            order["image"] = str(trees.shown(source.chain, self._origins(row, keys)))
            order["devices"] = [str(path) for path in trees.devices(source.chain)]
        elif source.directory:
            order["directory"] = source.directory
        else:
            self._unbind_below(path)
            return
        answer = self._order(order)
        if answer is None or not answer.get("ok"):
            log.info("not bound: %s: %s", target, (answer or {}).get("reason", "no process that mounts"))
            return
        with self._done:
            self._bound[path] = source
            self._bound.move_to_end(path)
            excess = list(self._bound)[: max(0, len(self._bound) - MAX_BINDS)]
        for old in excess:
            self._unbind_below(old)

    def _origins(self, row: Dir, keys: Keys) -> dict[str, dict[str, str]]:
        """What provenance adds for the layers of an image."""
        from fdfs.tree import images

        return images.origins(self._engine, keys[0]) if row.name == "rootfs" else {}

    def _unbind_below(self, path: bytes) -> None:
        with self._lock:
            gone = [known for known in self._bound if known == path or known.startswith(path + b"/")]
            for known in gone:
                del self._bound[known]
                self._asked.pop(known, None)
        for known in gone:
            self._order({"unbind": os.fsdecode(os.fsencode(self._mount) + known)})

    def _order(self, order: dict[str, Any]) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdin is None:
            return None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):
            return None  # it ended; `_watch` sees to that
        return _answer(process)

    # --- events -----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for event in self._subscription:
            if isinstance(event, Missed):
                continue  # what was missed is bound when it is used, and unbound by the kernel when it is gone
            self._hear(event)

    def _hear(self, event: Event) -> None:
        kind, _, key = event.object.partition("/")
        name = str(event.data.get("name", key))
        if kind == "container":
            path = f"/containers/{name}".encode()
            if event.type == "stateChanged":
                if event.data.get("to") in ("removing", "removed"):
                    self._wish(path, "unbind")
                elif event.data.get("to") == "running":
                    self._wish(path + b"/rootfs")
            elif event.type == "containerRenamed":  # what is mounted may have gone along; it is found by its descriptor
                self._wish(f"/containers/{event.data['from']}".encode(), "unbind")
                self._wish(path + b"/rootfs")
        elif kind == "volume":
            path = f"/volumes/{name}".encode()
            if event.type == "volumeCreated":
                self._wish(path + b"/data")
            elif event.type == "volumeRemoved":
                self._wish(path, "unbind")
        elif kind == "image":
            path = f"/images/by-digest/{key}".encode()
            if event.type == "imageRemoved":
                self._wish(path, "unbind")
            elif event.type not in ("verb", "imageUntagged"):
                self._wish(path + b"/rootfs")

    def stop(self) -> None:
        """Unbind everything and end the process. Idempotent."""
        self._alive = False
        self._ended.set()
        if self._subscription is not None:
            self._subscription.close()
        self._queue.put(None)
        process = self._process
        if process is None:
            return
        self._process = None
        if process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The next line of the process that mounts; None when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        return None
    answer: dict[str, Any] = json.loads(line)
    return answer
