"""What a container may use: the limits that can change while it runs, and their OCI form.

Floor 2. Only here: which limits there are, which of them exclude each other, and how they become `linux.resources`
(runtime-spec config-linux.md#control-groups), for a start and for an update. Rules as moby daemon_unix.go,
verifyPlatformContainerResources. Pure but for the list of CPUs that are online.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ContainerConfig
from engine.errors import InvalidArgument, Unsupported
from engine.options import UNLIMITED, cpu_numbers

CPU_PERIOD = 100_000  # µs
CPU_SHARES = 1024  # the kernel's default
MIN_MEMORY = 6 << 20  # bytes: with less no container starts
MAX_MEMORY = (1 << 63) - 1
ONLINE = Path("/sys/devices/system/cpu/online")


@dataclass(frozen=True, slots=True)
class Resources:
    """None (and "" for cpuset): no limit, or the default. Sizes in bytes."""

    memory: int | None = None
    memory_swap: int | None = None  # memory and swap together; UNLIMITED; None: twice `memory`
    memory_reservation: int | None = None
    cpus: float | None = None
    cpu_shares: int | None = None
    cpuset: str = ""
    pids: int | None = None

    @staticmethod
    def of(config: ContainerConfig) -> Resources:
        return Resources(
            config.memory,
            config.memory_swap,
            config.memory_reservation,
            config.cpus,
            config.cpu_shares,
            config.cpuset,
            config.pids,
        )

    def check(self) -> None:
        """InvalidArgument names the field that cannot be."""
        if self.memory is not None and self.memory < MIN_MEMORY:
            raise InvalidArgument("memory: at least 6 MiB", at="memory")
        if self.memory_swap not in (None, UNLIMITED):
            assert self.memory_swap is not None
            if self.memory is None:
                raise InvalidArgument("memory_swap: set memory as well", at="memory_swap")
            if self.memory_swap < self.memory:
                raise InvalidArgument("memory_swap: below memory: it limits memory and swap together", at="memory_swap")
        if self.memory is not None and (self.memory_reservation or 0) > self.memory:
            raise InvalidArgument("memory_reservation: above memory", at="memory_reservation")
        if self.cpuset:
            beyond = cpu_numbers(self.cpuset) - cpu_numbers(online_cpus())
            if beyond:
                raise InvalidArgument(
                    f"cpuset: this host has no CPU {min(beyond)}", at=self.cpuset, hint=f"it has {online_cpus()}"
                )

    def _swap(self, accounted: bool) -> int | None:
        """Memory and swap together, as the kernel is told. Unsupported when it would have to be counted and is not."""
        if not accounted:
            if self.memory_swap not in (None, UNLIMITED):
                raise Unsupported(
                    "memory_swap: this kernel does not account swap", at="memory_swap", hint="boot with swapaccount=1"
                )
            return None
        if self.memory_swap is not None or self.memory is None:
            return self.memory_swap
        return min(2 * self.memory, MAX_MEMORY)

    def oci(self, *, swap: bool) -> dict[str, Any]:
        """`linux.resources` of a start: what is set. `swap`: whether this host accounts it."""
        self.check()
        memory = {"limit": self.memory, "swap": self._swap(swap), "reservation": self.memory_reservation}
        cpu: dict[str, Any] = {"shares": self.cpu_shares, "cpus": self.cpuset or None}
        if self.cpus is not None:
            cpu.update(quota=self._quota(self.cpus), period=CPU_PERIOD)
        out = {"memory": memory, "cpu": cpu, "pids": {"limit": self.pids}}
        set_ = {key: {name: item for name, item in part.items() if item is not None} for key, part in out.items()}
        return {key: part for key, part in set_.items() if part}

    def update(self, *, swap: bool, cpus: str) -> dict[str, Any]:
        """The same with what is not set undone, for a container that runs. `cpus`: those it has without a cpuset."""
        self.check()
        memory = {"limit": UNLIMITED if self.memory is None else self.memory}
        total = self._swap(swap)
        if swap:
            memory["swap"] = UNLIMITED if total is None else total
        memory["reservation"] = UNLIMITED if self.memory_reservation is None else self.memory_reservation
        return {
            "memory": memory,
            "cpu": {
                "shares": self.cpu_shares or CPU_SHARES,
                "quota": UNLIMITED if self.cpus is None else self._quota(self.cpus),
                "period": CPU_PERIOD,
                "cpus": self.cpuset or cpus,
            },
            "pids": {"limit": UNLIMITED if self.pids is None else self.pids},
        }

    @staticmethod
    def _quota(cpus: float) -> int:
        return max(1000, round(cpus * CPU_PERIOD))  # µs in each period; the kernel's least is 1 ms


def online_cpus() -> str:
    """A list such as 0-3."""
    return ONLINE.read_text().strip() if ONLINE.exists() else f"0-{(os.cpu_count() or 1) - 1}"
