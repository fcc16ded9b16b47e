"""Whose files are in a running virtual machine, and who serves them. Floor 3. Thread-safe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import Busy, Unreachable
from engine.execution import Execution
from engine.lifecycle import ALIVE, State
from engine.records import Container
from engine.runtimes.vm.guestfiles import GuestFiles, Machines
from engine.runtimes.vm.guestupper import GuestUpper

FREEZE_SECONDS = 15.0  # for processes in the middle of something to stop


class Guests:
    """Of the store's containers, whose directories are in `root`."""

    def __init__(self, root: Path, execution: Execution) -> None:
        self._execution = execution
        self._machines = Machines(root)

    def files(self, container: Container) -> GuestFiles | None:
        """Its files as the agent of its virtual machine serves them while that runs; None when they are on the host.

        Never waits. Busy while nobody has them: the machine starts or is paused.
        """
        starts = container.state is State.STARTING
        if not starts and container.state not in ALIVE:
            return None
        if (self._execution.driver_of(container).name if starts else container.runtime) != "vm":
            return None
        if container.state is State.PAUSED:
            raise Busy("its virtual machine is paused", hint="resume it first: echo resume > ctl")
        if starts:
            raise Busy("its virtual machine starts", hint="try again in a moment")
        return self._machines.of(container.id)

    @contextmanager
    def still(self, container: Container) -> Iterator[GuestUpper]:
        """What it changed, with its processes held still in the running machine. Should this daemon end meanwhile, the
        machine's owner lets them go on (relay.py)."""
        files = self.files(container)
        assert files is not None
        files.call("FREEZE", {"state": 1}, FREEZE_SECONDS)
        try:
            yield GuestUpper(files)
        finally:
            with suppress(Unreachable):  # it has ended meanwhile
                files.call("FREEZE", {"state": 0}, FREEZE_SECONDS)

    def close(self) -> None:
        self._machines.close()
