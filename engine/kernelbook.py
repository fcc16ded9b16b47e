"""Which containers use a kernel, and the kernels' part of the journal. Floor 3.

Only here: that a machine that runs uses the kernel it was started with, whatever its config and the default say since;
and the events, each in one transaction with the rename that makes or removes the kernel's directory. The directory is
the truth: what a crash between the two left out is told when the engine comes up (`"found": true`). Thread-safe.

    kernelImported, kernelFetched   {"name", "version", "arch", "digest", "source", "verified"}
    kernelRemoved, kernelChosen     {"name"}    the latter: it is the default now
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import Damaged
from engine.events import Journal
from engine.kernels import Kernels, told
from engine.lifecycle import ALIVE, State
from engine.records import Container
from engine.store.meta import Meta

RUNS = ALIVE | {State.STARTING}


class KernelBook:
    """`root` is the directory of the containers, `default` the runtime of those whose config names none."""

    def __init__(
        self, meta: Meta, journal: Journal, root: Path, all_: Callable[[], list[Container]], default: Callable[[], str]
    ) -> None:
        self._meta, self._journal, self._root, self._all, self._default = meta, journal, root, all_, default

    def users(self, name: str | None) -> list[str]:
        """Containers that name this kernel or run with it; for None those of virtual machines that name none."""
        out = []
        for container in self._all():
            config = container.config
            wants = config.kernel == (name or "") and (name or (config.runtime or self._default()) == "vm")
            if wants or (name and self.running_with(container) == name):
                out.append(container.name)
        return out

    def running_with(self, container: Container) -> str | None:
        """The kernel its virtual machine was started with, while it runs."""
        if container.state not in RUNS or container.runtime not in ("vm", ""):
            return None
        try:
            plan = json.loads((self._root / container.id / "bundle" / "vm.json").read_bytes())
            return Path(plan["machine"]["kernel"]).parent.name
        except (OSError, ValueError, LookupError, TypeError):
            return None  # no machine yet

    @contextmanager
    def record(self, type_: str, name: str, data: Mapping[str, Any]) -> Iterator[None]:
        """The event is there when, and only when, what is done in the block was."""
        with self._meta.tx():
            self._journal.append(type_, f"kernel/{name}", {"name": name, **data})
            yield

    def reconcile(self, kernels: Kernels) -> None:
        """Tell of what is there and not in the journal, and of what is gone."""
        newest: dict[str, str] = {}
        rows: list[sqlite3.Row] = self._meta.query(
            "SELECT object, type FROM events WHERE object >= 'kernel/' AND object < 'kernel0' ORDER BY seq"
        )
        for row in rows:
            newest[str(row["object"]).partition("/")[2]] = str(row["type"])
        here = set(kernels.names())
        for name in sorted(here | set(newest)):
            known = newest.get(name, "kernelRemoved") != "kernelRemoved"
            if known and name not in here:
                self._journal.append("kernelRemoved", f"kernel/{name}", {"name": name, "found": True})
            elif name in here and not known:
                try:
                    facts = told(kernels.get(name))
                except Damaged:
                    facts = {}
                self._journal.append("kernelImported", f"kernel/{name}", {"name": name, **facts, "found": True})
