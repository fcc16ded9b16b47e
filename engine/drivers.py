"""Which runtime driver runs what. Floor 3.

Only here: the engine's default and the choice per container. Drivers are opened when first needed and kept.
Thread-safe.
"""

from __future__ import annotations

import threading
from pathlib import Path

from engine.errors import EngineError, InvalidArgument
from engine.runtimes.base import Probe, Runtime
from engine.runtimes.select import NAMES, open_runtime, preferred


class Drivers:
    """Drivers for the containers below `directory`; `default` is one of NAMES, and `auto` never falls back to fake:
    a container that only seems to run helps nobody. Where oci cannot run, its probe says why and `start` fails with it.
    """

    def __init__(self, default: str, directory: Path) -> None:
        if default not in NAMES:
            raise InvalidArgument(
                f"runtime: unknown runtime {default!r}", at=default, hint=f"one of {', '.join(NAMES)}"
            )
        self.default = preferred(directory) if default == "auto" else default
        self._directory = directory
        self._lock = threading.Lock()
        self._open: dict[str, Runtime] = {}

    def get(self, name: str = "") -> Runtime:
        """The driver `name`, or the default. Unsupported where this platform has none of that name."""
        name = self.default if name in ("", "auto") else name
        with self._lock:
            if name not in self._open:
                self._open[name] = open_runtime(name, self._directory)
            return self._open[name]

    def probe(self) -> tuple[str, Probe]:
        """The default driver's name, and whether this host can run it."""
        try:
            return self.default, self.get().probe()
        except EngineError as error:
            return self.default, Probe(False, error.reason)

    def close(self) -> None:
        with self._lock:
            for driver in self._open.values():
                driver.close()
