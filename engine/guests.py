"""Whose files are in a running virtual machine, and who serves them. Floor 3. Thread-safe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import Busy, Unreachable
from engine.execution import Execution
from engine.lifecycle import ALIVE, State
from engine.records import Container
from engine.runtimes.vm.guestfiles import GuestFiles, Machines
from engine.runtimes.vm.guestupper import GuestUpper
from engine.runtimes.vm.leases import Leases
from engine.runtimes.vm.machinefacts import facts

if TYPE_CHECKING:
    from engine.runtimes.vm.driver import VmRuntime

FREEZE_SECONDS = 15.0  # for processes in the middle of something to stop


class Guests:
    """Of the store's containers, whose directories are in `root`."""

    def __init__(self, root: Path, execution: Execution) -> None:
        self._execution, self._root = execution, root
        self._machines = Machines(root)
        self._leases = Leases()

    def has(self, container: Container) -> bool:
        """Whether a machine has its files, or is about to. Never waits."""
        if container.state is State.STARTING:
            return self._execution.driver_of(container).name == "vm"
        return container.state in ALIVE and container.runtime == "vm"

    def files(self, container: Container) -> GuestFiles | None:
        """Its files as the agent of its virtual machine serves them while that runs; None when they are on the host. A
        paused machine goes on while it is asked for them, its processes frozen.

        Never waits. Busy while nobody has them: the machine starts.
        """
        if not self.has(container):
            return None
        if container.state is State.STARTING:
            raise Busy("its virtual machine starts", hint="try again in a moment")
        return self._files(container)

    def _files(self, container: Container) -> GuestFiles:
        id = container.id
        paused = self._root / id / "run" / "vm" / "paused"

        def awake() -> AbstractContextManager[None]:
            if not paused.exists():
                return nullcontext()
            return self._leases.of(id, lambda: self._driver(container).awake(id))

        return self._machines.of(id, awake)

    @contextmanager
    def changed(self, container: Container, seconds: float = 0.0) -> Iterator[GuestUpper | None]:
        """What it changed, as its machine tells it, with `seconds` for all of it; None when that is on the host. A
        paused machine goes on for that, while its processes stay frozen. Busy while it starts."""
        if container.state is State.PAUSED and self.has(container):
            with self._awake(container) as files:
                yield GuestUpper(files, seconds)
            return
        found = self.files(container)
        yield None if found is None else GuestUpper(found, seconds)

    def _driver(self, container: Container) -> VmRuntime:
        from engine.runtimes.vm.driver import VmRuntime  # few engines need it

        driver = self._execution.driver_of(container)
        assert isinstance(driver, VmRuntime)
        return driver

    @contextmanager
    def _awake(self, container: Container) -> Iterator[GuestFiles]:
        with self._driver(container).awake(container.id):
            yield self._files(container)

    def machine(self, container: Container) -> dict[str, str]:
        """What is known of its virtual machine while it has one."""
        if container.state not in ALIVE or container.runtime != "vm":
            return {}
        return facts(self._root / container.id)

    @contextmanager
    def still(self, container: Container) -> Iterator[GuestUpper]:
        """What it changed, with its processes held still in the running machine. Should this daemon end meanwhile, the
        machine's owner lets them go on (relay.py); those of a paused one stay paused."""
        if container.state is State.PAUSED:
            with self._awake(container) as files:
                yield GuestUpper(files)
            return
        found = self.files(container)
        assert found is not None
        found.call("FREEZE", {"state": 1}, FREEZE_SECONDS)
        try:
            yield GuestUpper(found)
        finally:
            with suppress(Unreachable):  # it has ended meanwhile
                found.call("FREEZE", {"state": 0}, FREEZE_SECONDS)

    def close(self) -> None:
        self._leases.close()
        self._machines.close()
