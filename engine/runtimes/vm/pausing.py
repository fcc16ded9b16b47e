"""Pausing a machine: its container's processes are frozen by the agent, then QEMU stops its CPUs. Floor 2.

Only here: QEMU's monitor socket, and what pausing leaves for a later daemon, `kill -9` in the middle of it included:

    run/vm/paused   while it is paused; `frozen` in it: the agent froze the processes
    run/vm/unsure   while one of the verbs below is carried out; found by another daemon, QEMU is asked what is true

For the processes are frozen, not only the CPUs stopped, a paused machine can go on for a moment to take new limits
without any of them running. Thread-safe; calls for one container are serialised by the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import hostfiles
from engine.errors import Busy, EngineError, RuntimeFailure
from engine.runtimes.vm import shim

log = logging.getLogger(__name__)

QMP_SECONDS = 10.0
FREEZE_SECONDS = 5.0  # for the agent to answer; it gives the processes one


class Pausing:
    """`place` tells where the files of a container's machine are."""

    def __init__(self, place: Callable[[str], Path]) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._working: set[str] = set()  # by this daemon: it knows what is true

    def pause(self, id: str) -> None:
        """RuntimeFailure with QEMU's words. A mute agent freezes nothing; the CPUs stop all the same."""
        with self._unsure(id, "pause"):
            frozen = self._freeze(id, 1)
            (self._place(id) / "paused").write_text("frozen" if frozen else "")
            self._qmp(id, "stop")

    def resume(self, id: str) -> None:
        """RuntimeFailure when QEMU, or the agent, does not do it: it is paused then as before."""
        with self._unsure(id, "resume"):
            self._qmp(id, "cont")
            self._thaw(id)

    @contextlib.contextmanager
    def awake(self, id: str) -> Iterator[None]:
        """In the block its agent answers, and its processes are frozen as they were. Busy when they are not."""
        if (self._place(id) / "paused").read_text() != "frozen":
            raise Busy("its virtual machine is paused, and sets no limits", hint="resume it first")
        with self._unsure(id, "limits"):
            self._qmp(id, "cont")
            try:
                yield
            finally:
                self._qmp(id, "stop")

    def paused(self, id: str) -> bool:
        """Of one that runs. Files are looked at alone, but for the first look after a daemon was killed."""
        unsure = self._place(id) / "unsure"
        with self._lock:
            settle = id not in self._working and unsure.exists()
        if settle:
            self._settle(id, unsure)
        return (self._place(id) / "paused").exists()

    # --- pieces -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _unsure(self, id: str, verb: str) -> Iterator[None]:
        unsure = self._place(id) / "unsure"
        with self._lock:
            self._working.add(id)
        try:
            unsure.write_text(verb)
            yield
            unsure.unlink(missing_ok=True)
        finally:
            with self._lock:
                self._working.discard(id)

    def _settle(self, id: str, unsure: Path) -> None:
        """What an earlier call left undone becomes what the machine does; one that was awake for a moment sleeps on."""
        try:
            if unsure.read_text() == "limits":
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
