"""Pausing a machine: its container's processes are frozen by the agent, then QEMU stops its CPUs. Floor 2.

Only here: QEMU's monitor socket, and what pausing leaves for a later daemon, `kill -9` in the middle of it included:

    run/vm/paused   while it is paused; `frozen` in it: the agent froze the processes
    run/vm/unsure   while one of the verbs below is carried out; found by another daemon, QEMU is asked what is true

For the processes are frozen, not only the CPUs stopped, a paused machine can go on for a while, to take new limits or
to tell of its files, without any of them running. Thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from engine import hostfiles
from engine.errors import Busy, EngineError, RuntimeFailure
from engine.runtimes.vm import shim

log = logging.getLogger(__name__)

QMP_SECONDS = 10.0
FREEZE_SECONDS = 5.0  # for the agent to answer; it gives the processes one
AWAKE = "limits"  # in `unsure`; what it was needed for first


class Pausing:
    """`place` tells where the files of a container's machine are."""

    def __init__(self, place: Callable[[str], Path]) -> None:
        self._place = place
        self._lock = threading.Lock()  # of the four below; never held over I/O
        self._turns = WeakValueDictionary[str, threading.Lock]()  # whose it is to tell QEMU what to do
        self._working: Counter[str] = Counter()  # calls of this daemon: it knows what is true
        self._awake: Counter[str] = Counter()  # how many want a paused one to go on
        self._ending: set[str] = set()  # woken to end: they do not sleep again

    def pause(self, id: str) -> None:
        """RuntimeFailure with QEMU's words. A mute agent freezes nothing; the CPUs stop all the same."""
        with self._unsure(id, "pause"):
            self._ending.discard(id)
            frozen = self._freeze(id, 1)
            (self._place(id) / "paused").write_text("frozen" if frozen else "")
            if not (frozen and self._awake[id]):  # from the pause before; the last of those has it sleep
                self._qmp(id, "stop")

    def resume(self, id: str) -> None:
        """RuntimeFailure when QEMU, or the agent, does not do it: it is paused then as before."""
        with self._unsure(id, "resume"):
            self._qmp(id, "cont")
            self._thaw(id)

    def wake(self, id: str) -> None:
        """The machine goes on, its processes frozen as they were: so they can be killed, and it ends in good order.
        RuntimeFailure with QEMU's words."""
        with self._unsure(id, "kill"):
            self._ending.add(id)
            self._qmp(id, "cont")

    @contextlib.contextmanager
    def awake(self, id: str) -> Iterator[None]:
        """In the block the agent of a paused machine answers, and its processes are frozen as they were. Busy when they
        are not; at the end also when somebody let them go on meanwhile, which does not wait for the block."""
        with self._working_on(id):
            turn = self._turn(id)
            with turn:
                before = self._frozen(id)
                if before is None:
                    raise Busy("its processes could not be frozen when it was paused", hint="resume it first")
                if not self._awake[id]:
                    (self._place(id) / "unsure").write_text(AWAKE)
                    self._qmp(id, "cont")
                self._awake[id] += 1
            try:
                yield
            finally:
                with turn:
                    self._awake[id] -= 1
                    if not self._awake[id]:
                        del self._awake[id]
                        self._sleep(id)
            if self._frozen(id) != before:
                raise Busy("the container went on meanwhile", hint="try again")

    def paused(self, id: str) -> bool:
        """Of one that runs. Files are looked at alone, but for the first look after a daemon was killed."""
        if self._left(id):
            with self._turn(id):
                if self._left(id):
                    self._settle(id, self._place(id) / "unsure")
        return (self._place(id) / "paused").exists()

    # --- pieces -------------------------------------------------------------------------------------------------

    def _turn(self, id: str) -> threading.Lock:
        with self._lock:
            turn = self._turns.get(id)
            if turn is None:
                turn = self._turns[id] = threading.Lock()
            return turn

    @contextlib.contextmanager
    def _working_on(self, id: str) -> Iterator[None]:
        with self._lock:
            self._working[id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[id] -= 1
                if not self._working[id]:
                    del self._working[id]

    @contextlib.contextmanager
    def _unsure(self, id: str, verb: str) -> Iterator[None]:
        unsure = self._place(id) / "unsure"
        with self._working_on(id), self._turn(id):
            unsure.write_text(verb)
            yield
            if self._awake[id] and self._frozen(id) and id not in self._ending:
                unsure.write_text(AWAKE)
            else:
                unsure.unlink(missing_ok=True)

    def _left(self, id: str) -> bool:
        """Whether an earlier call, or daemon, left it to be found out what is true."""
        with self._lock:
            return id not in self._working and (self._place(id) / "unsure").exists()

    def _frozen(self, id: str) -> tuple[int, int] | None:
        """Which pause it is in, its processes frozen; None when it is in none."""
        try:
            with open(self._place(id) / "paused", encoding="utf-8") as note:
                found = os.fstat(note.fileno())
                return (found.st_ino, found.st_mtime_ns) if note.read() == "frozen" else None
        except FileNotFoundError:
            return None

    def _sleep(self, id: str) -> None:
        """Nobody wants it awake any more."""
        unsure = self._place(id) / "unsure"
        if id not in self._ending and (self._place(id) / "paused").exists():  # else it was resumed, or is gone
            try:
                self._qmp(id, "stop")
            except RuntimeFailure as error:  # `unsure` stays: who looks next tries again, unless it has ended
                log.warning("container %s: its machine is not paused again: %s", id[:12], error)
                return
        unsure.unlink(missing_ok=True)

    def _settle(self, id: str, unsure: Path) -> None:
        """What an earlier call left undone becomes what the machine does; one that was awake for a moment sleeps on."""
        try:
            if unsure.read_text() == AWAKE:
                self._qmp(id, "stop")
            elif self._qmp(id, "query-status")["status"] == "paused":
                (self._place(id) / "paused").touch()
            else:
                self._thaw(id)
        except (EngineError, FileNotFoundError) as error:  # it has ended, or hangs: the files are believed
            log.warning("container %s: whether it is paused is not certain: %s", id[:12], error)
        unsure.unlink(missing_ok=True)

    def _freeze(self, id: str, state: int) -> bool:
        """Whether the agent did it."""
        try:
            link = shim.connect(self._place(id))
            try:
                link.call("FREEZE", {"state": state, "keep": 1}, deadline=FREEZE_SECONDS)
                return True
            finally:
                link.close()
        except (EngineError, OSError) as error:
            log.info("container %s: its processes are not %s: %s", id[:12], "frozen" if state else "thawed", error)
            return False

    def _thaw(self, id: str) -> None:
        note = self._place(id) / "paused"
        if note.exists() and note.read_text() == "frozen" and not self._freeze(id, 0):
            raise RuntimeFailure("the machine's agent does not let its processes go on", hint="kill it, and start it")
        note.unlink(missing_ok=True)

    def _qmp(self, id: str, command: str) -> Any:
        """QEMU's answer to one command. RuntimeFailure with its words."""
        from qemu.qmp import QMPClient, QMPError  # takes a while to import, and few need it

        async def ask(path: str) -> object:
            client = QMPClient(f"dutchman {id[:12]}")
            await client.connect(path)
            try:
                return await client.execute(command)
            finally:
                await client.disconnect()

        try:
            with hostfiles.socket_address(self._place(id) / "qmp.sock") as path:
                return asyncio.run(asyncio.wait_for(ask(path), QMP_SECONDS))
        except (QMPError, OSError, TimeoutError) as error:
            raise RuntimeFailure(f"QEMU: {command}: {error or type(error).__name__}") from error
