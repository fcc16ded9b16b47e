"""Files in a running guest, as its agent serves them: what the mount shows of a virtual machine's container.

Floor 2. Only here: one connection per container, made when first needed and again after it broke; the deadline of every
call; and that a mute guest is asked by few at a time, then not at all for a moment, then by one until it answers, so it
cannot take the threads of who asks. What was told a moment ago is believed (beliefs.py); what is changed through here
is never answered from what was before. A small file's content comes with its open; that a handle is not needed any more
is said with the next call. So `cp -a` waits four times for a small file it brings, once for one it takes. Thread-safe.

Errors: OSError with the guest's errno; DeadlineExceeded; Unreachable when nobody answers at the socket; ProtocolError.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import Busy, DeadlineExceeded, EngineError, TooLarge, Unreachable
from engine.hostfiles import socket_address
from engine.runtimes.vm import protocol
from engine.runtimes.vm.beliefs import USES, Beliefs
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.openfile import AHEAD, GuestFile
from engine.runtimes.vm.protocol import Attr, Values, Words
from engine.runtimes.vm.scratch import Piece, Scratch
from engine.runtimes.vm.streams import Late
from engine.runtimes.vm.verbs import FILES
from engine.walk import MAX_ENTRIES

log = logging.getLogger(__name__)

DEADLINE = 5.0  # seconds of one call; a guest under load answers in milliseconds
MUTE_SECONDS = 3.0  # how long a guest that missed a deadline is not asked again
AT_ONCE = 16  # calls of one guest that may be under way: the agent's file workers are fewer
PIPELINES = AT_ONCE // 2  # of them, for as long as somebody wants them: calls come between
MAX_DONE = 64  # handles said with one call
DONE_SECONDS = 0.005  # for a call to come that takes along which handles are done with
ROOT_SECONDS = 1.0  # how long the attributes of a root are shown before they are asked for anew
ROOTS = {
    "container": "",
    "upper": "/run/disk/upper",
}  # root -> its directory, where the agent must be told it
ROOT_ATTR = Attr(stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0)  # of a root nothing is known of yet


@dataclass(slots=True)
class Opened:
    """A file of the guest that is open here."""

    handles: list[int]
    version: int = 0  # of its content, as far as it is changed here


class GuestFiles:
    """Of the machine whose agent answers at `path`; in `awake` also when it is paused."""

    def __init__(
        self,
        path: Path,
        connect: Callable[[], socket.socket] | None = None,
        awake: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._path = path
        self._connect = connect or self._dial
        self.awake = awake
        self._lock = threading.Lock()  # connecting; held for as long as that takes
        self._client: AgentClient | None = None
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self.pipelines = threading.BoundedSemaphore(PIPELINES)
        self._mute_until = 0.0  # 0: it answered last
        self._tried = False  # one caller finds out whether a mute guest answers again; guarded by _guard
        self._guard = threading.Lock()  # of all below; never held over I/O
        self._done: list[int] = []  # handles that are not needed any more
        self._done_thread = False  # whether one waits for a call to take them along
        self._roots: dict[str, tuple[float, Attr, tuple[bytes, ...]]] = {}  # when told, attributes, xattrs' names
        self._asking: set[str] = set()  # roots whose attributes are being asked for
        self.beliefs = Beliefs()
        self.scratch = Scratch(path.parents[2], self.call)
        self.pool = ThreadPoolExecutor(AHEAD, "guest-files")  # threads come when needed
        self.dirty: set[GuestFile] = set()  # written behind
        self.opened: dict[tuple[int, int], Opened] = {}  # by dev, ino

    # --- calls ----------------------------------------------------------------------------------------------------

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(DEADLINE)
            with socket_address(self._path) as address:
                sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            raise Unreachable(
                f"the agent of its virtual machine cannot be reached: {error.strerror or error}",
                hint="it is starting or ending, or its engine was killed: read state",
            ) from error

    def connected(self) -> AgentClient:
        client = self._client
        if client is not None and not client.closed:
            return client
        if not self._lock.acquire(timeout=DEADLINE):
            raise DeadlineExceeded("the guest's agent does not answer")
        try:
            if self._client is None or self._client.closed:
                client = AgentClient(self._connect(), deadline=DEADLINE)
                try:
                    client.call("CLOSE", {"all": 1}, deadline=DEADLINE)  # of an engine before this one
                    for name, path in ROOTS.items():
                        if path:
                            client.call("ROOT", {"name": name, "path": path}, deadline=DEADLINE)
                except BaseException:
                    client.close()
                    raise
                self.scratch.renew()
                with self._guard:
                    self.opened.clear()
                    self._done.clear()
                self._client = client
            return self._client
        finally:
            self._lock.release()

    @contextmanager
    def slot(self, deadline: float) -> Iterator[None]:
        with self._guard:
            mute = self._mute_until > 0
            if mute and (self._tried or time.monotonic() < self._mute_until):
                raise DeadlineExceeded(
                    "its virtual machine did not answer a moment ago", hint="it may hang: kill, start"
                )
            self._tried = mute
        try:
            if not self._slots.acquire(timeout=deadline):
                raise DeadlineExceeded("its virtual machine answers too slowly", hint="it may hang: kill, start")
            try:
                yield
                self._mute_until = 0.0
            except OSError:  # that is an answer
                self._mute_until = 0.0
                raise
            except DeadlineExceeded:
                self._mute_until = time.monotonic() + MUTE_SECONDS
                raise
            finally:
                self._slots.release()
        finally:
            if mute:
                with self._guard:
                    self._tried = False

    def call(self, verb: str, words: Words, deadline: float = DEADLINE, late: Late = None) -> Values:
        """`late` as the client's; also when the guest was not asked."""
        not_asked = late
        try:
            with self.slot(deadline), self.awake():
                client = self.connected()
                if self._done and verb in FILES:
                    with self._guard:
                        done, self._done = self._done[:MAX_DONE], self._done[MAX_DONE:]
                    words = {**words, "done": done}
                not_asked = None
                return client.call(verb, words, deadline=deadline, late=late)
        except (Busy, DeadlineExceeded, Unreachable, protocol.ProtocolError):
            raise
        except EngineError as error:
            raise Unreachable(error.reason, hint=error.hint) from error
        finally:
            if not_asked is not None:
                not_asked()

    def write(self, handle: int, offset: int, data: bytes | Piece) -> Values:
        """Verb WRITE. A piece is given back."""
        words: Words = {"handle": handle, "offset": offset}
        if not isinstance(data, Piece):
            return self.call("WRITE", {**words, "data": data})
        return self.call("WRITE", {**words, "from": data.place, "size": data.size}, late=data.release)

    def done(self, handle: int) -> None:
        """Not needed any more: the next call says so, or one of its own when none comes at once. Never waits."""
        with self._guard:
            self._done.append(handle)
            if self._done_thread:
                return
            self._done_thread = True
        threading.Thread(target=self._say_done, name="guest-done", daemon=True).start()

    def _say_done(self) -> None:
        waited = -1
        while True:
            time.sleep(DONE_SECONDS)
            with self._guard:
                if not self._done:
                    self._done_thread = False
                    return
                alone, waited = waited == self._done[0], self._done[0]
            if alone:  # no call came
                with suppress(EngineError, OSError):  # the connection is over, and its handles with it
                    self.call("CLOSE", {})

    def close(self) -> None:
        """Idempotent. Calls under way fail."""
        client = self._client
        if client is not None:
            client.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.scratch.close()

    def settle(self) -> None:
        """Wait for what is written behind; its errors are told to who wrote it, at its next call."""
        for file in list(self.dirty):
            file.arrived()

    @property
    def closed(self) -> bool:
        """Whether a connection there was has ended."""
        client = self._client
        return client is not None and client.closed

    # --- reading --------------------------------------------------------------------------------------------------

    def stat(self, root: str, path: bytes) -> Attr:
        """Of a root: never waits for the guest, and may be a moment old."""
        if not path:
            return self._root(root)[0]
        self.settle()
        found = self.beliefs.attr(root, path)
        if found is not None:
            return found
        if self.beliefs.absent(root, path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        turn = self.beliefs.turn
        return self.beliefs.told(turn, root, path, self.call("STAT", {"root": root, "path": path}))

    def _root(self, root: str) -> tuple[Attr, tuple[bytes, ...]]:
        """Attributes and xattrs' names of a root, for who looks at the directory it is in: as they were told last."""
        with self._guard:
            told, attr, names = self._roots.get(root, (0.0, ROOT_ATTR, ()))
            ask = time.monotonic() - told > ROOT_SECONDS and root not in self._asking
            if ask:
                self._asking.add(root)
        if ask:
            try:
                self.pool.submit(self._ask_root, root)
            except RuntimeError:  # closed
                self._asking.discard(root)
        found = self.beliefs.attr(root, b"")
        return found or attr, self.beliefs.xattrs(root, b"") or names

    def _ask_root(self, root: str) -> None:
        try:
            turn = self.beliefs.turn
            values = self.call("STAT", {"root": root, "path": b""})
            attr = self.beliefs.told(turn, root, b"", values)
            with self._guard:
                self._roots[root] = time.monotonic(), attr, protocol.parse_names(values.get("names") or b"")
        except (EngineError, OSError) as error:  # who goes into it is told
            log.debug("attributes of a root: %s", error)
        finally:
            self._asking.discard(root)

    def list(self, root: str, path: bytes) -> Iterator[tuple[bytes, Attr]]:
        """Names with attributes; the order is the guest's. TooLarge for more than MAX_ENTRIES."""
        self.settle()
        words: Words = {"root": root, "path": path}
        count, handle = 0, None
        try:
            while True:
                turn = self.beliefs.turn
                values = self.call("LIST", words)
                entries, handle = protocol.parse_page(values)
                count += len(entries)
                if count > MAX_ENTRIES:
                    raise TooLarge(f"a directory of more than {MAX_ENTRIES} entries", at=os.fsdecode(path))
                prefix = path + b"/" if path else b""
                self.beliefs.learn(turn, root, [(prefix + name, attr, names) for name, attr, names in entries])
                if handle is None and "handle" not in words:
                    self.beliefs.listed(turn, root, path, {name for name, _, _ in entries}, values)
                yield from ((name, attr) for name, attr, _ in entries)
                if handle is None:
                    return
                words = {"handle": handle}
        finally:
            if handle is not None:  # who asked has seen enough
                self.done(values.number("handle"))

    def xattr_names(self, root: str, path: bytes) -> tuple[bytes, ...]:
        if not path:
            return self._root(root)[1]
        known = self.beliefs.xattrs(root, path)
        if known is not None:
            return known
        turn = self.beliefs.turn
        values = self.call("STAT", {"root": root, "path": path})
        attr = self.beliefs.told(turn, root, path, values)
        if values.get("names") is not None:
            return protocol.parse_names(values.need("names"))
        names = tuple(self.call("LISTXATTR", {"root": root, "path": path}).all("name"))
        self.beliefs.learn(turn, root, [(path, attr, names)])
        return names

    def change(self, verb: str, root: str, path: bytes, words: Words, *others: bytes) -> Values:
        """A verb that modifies `path` (and `others`)."""
        self.settle()
        names = verb in ("RENAME", "LINK")
        turn = self.beliefs.forget(root, path, *others, names=names)
        try:
            values = self.call(verb, {"root": root, "path": path, **words})
        except BaseException:
            self.beliefs.forget(root, path, *others, names=True)
            raise
        alone = turn == self.beliefs.turn
        turn = self.beliefs.forget(root, path, *others, names=names)  # a listing may have come between
        if verb in ("RENAME", "RMDIR"):
            for each in (path, *others):
                self.beliefs.forget_below(root, each)
            turn = self.beliefs.turn
        self.beliefs.entry(root, path, values, there=verb not in ("UNLINK", "RMDIR"))
        if alone and not others and values.get("attr") is not None:
            attr = self.beliefs.told(turn, root, path, values, USES)
            if verb == "MKDIRAT":
                self.beliefs.made(turn, root, path, attr)
            if not path:
                with self._guard:
                    self._roots[root] = time.monotonic(), attr, protocol.parse_names(values.get("names") or b"")
        if verb == "TRUNCATE":
            self.changed(protocol.parse_attr(values.need("attr")))
        return values

    # --- open files -----------------------------------------------------------------------------------------------

    def open(self, root: str, path: bytes, letters: str, words: Words | None = None) -> GuestFile:
        """`letters` as verb OPEN has them."""
        words = {"flags": letters, **(words or {})}
        if letters == "r":
            self.settle()
            turn = self.beliefs.turn
            try:
                values = self.call("OPEN", {"root": root, "path": path, "early": protocol.EARLY, **words})
            except OSError:
                self.beliefs.forget(root, path, names=True)
                raise
            attr = self.beliefs.told(turn, root, path, values)
        else:
            values = self.change("OPEN", root, path, words)
            attr = protocol.parse_attr(values.need("attr"))
        handle = values.number("handle")
        identity = attr.dev, attr.ino
        with self._guard:
            opened = self.opened.setdefault(identity, Opened([]))
            opened.handles.append(handle)
        if "t" in letters:
            self.changed(attr)
        file = GuestFile(self, root, path, handle, identity)
        if letters == "r":
            file.early(values.get("data"), attr.size)
        return file

    def handle_of(self, identity: tuple[int, int]) -> int | None:
        """An open handle of a file."""
        with self._guard:
            opened = self.opened.get(identity)
            return opened.handles[-1] if opened is not None else None

    def version(self, identity: tuple[int, int]) -> int:
        """Of the content of an open file."""
        with self._guard:
            opened = self.opened.get(identity)
            return opened.version if opened is not None else -1

    def changed(self, file: Attr | tuple[int, int]) -> None:
        """The content of a file is another: who read ahead in it reads again."""
        identity = (file.dev, file.ino) if isinstance(file, Attr) else file
        with self._guard:
            opened = self.opened.get(identity)
            if opened is not None:
                opened.version += 1

    def dropped(self, identity: tuple[int, int], handle: int) -> bool:
        """Whether that was its last handle."""
        with self._guard:
            opened = self.opened.get(identity)
            if opened is None:
                return True
            if handle in opened.handles:
                opened.handles.remove(handle)
            if opened.handles:
                return False
            del self.opened[identity]
            return True


class Machines:
    """The machines of a store, by container."""

    def __init__(self, containers: Path) -> None:
        self._containers = containers
        self._lock = threading.Lock()
        self._files: dict[str, GuestFiles] = {}

    def of(self, id: str, awake: Callable[[], AbstractContextManager[None]]) -> GuestFiles:
        """Files of the running container `id`. Connects only when asked for some."""
        with self._lock:
            files = self._files.get(id)
            if files is None:
                for other in [key for key, known in self._files.items() if known.closed]:
                    self._files.pop(other).close()
                files = self._files[id] = GuestFiles(self._containers / id / "run" / "vm" / "agent.sock", awake=awake)
            return files

    def close(self) -> None:
        with self._lock:
            files: Sequence[GuestFiles] = list(self._files.values())
            self._files.clear()
        for each in files:
            each.close()
