"""This host's cgroups, and the few files the oci driver reads and writes itself: freezer, OOM counters, leftovers.

Floor 2. Both hierarchies: version 1 (one tree per controller) and version 2 (one tree); kernel documentation
admin-guide/cgroup-v1/{memory,freezer-subsystem}.rst and cgroup-v2.rst. Stateless, thread-safe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine import host, userids
from engine.errors import RuntimeFailure
from engine.runtimes import delegation
from engine.runtimes.resources import online_cpus

ROOT = Path("/sys/fs/cgroup")
MONITOR = "monitors"  # where conmon lives, away from the daemon's own group and its fate
CGROUP_PARENT = "/dutchman"
NOWHERE = Path("/proc/self/none")  # of a container without a group: nothing is there, and nothing can be made there


@dataclass(frozen=True, slots=True)
class Cgroups:
    """What this host offers: version 1 (also hybrid) or 2, and whether swap is accounted."""

    version: int
    swap: bool
    parent: str | None = CGROUP_PARENT  # of containers' groups; None without root where none is the user's to use
    controllers: frozenset[str] | None = None  # those containers' groups have; None: all

    @staticmethod
    def detect(root: Path = Path("/sys/fs/cgroup")) -> Cgroups:
        if not host.LINUX:
            return Cgroups(2, False, None, frozenset())
        two = (root / "cgroup.controllers").exists()
        swap = any(root.glob("*/memory.swap.max")) if two else (root / "memory/memory.memsw.limit_in_bytes").exists()
        if userids.rootless() is None:
            return Cgroups(2 if two else 1, swap)
        parent = delegation.parent()
        return Cgroups(2 if two else 1, swap, parent, frozenset() if parent is None else delegation.controllers(parent))

    def counts(self, controller: str) -> bool:
        """Whether containers have this controller: memory, cpu …"""
        return self.controllers is None or controller in self.controllers


def path(cgroups: Cgroups, controller: str, id: str) -> Path:
    if cgroups.parent is None:
        return NOWHERE
    below = f"{cgroups.parent}/{id}".lstrip("/")
    return ROOT / below if cgroups.version == 2 else ROOT / controller / below


def frozen(cgroups: Cgroups, id: str) -> bool:
    """Whether the container is paused."""
    try:
        if cgroups.version == 2:
            return (path(cgroups, "", id) / "cgroup.freeze").read_text().strip() == "1"
        return (path(cgroups, "freezer", id) / "freezer.state").read_text().strip() in ("FROZEN", "FREEZING")
    except OSError:
        return False  # no cgroup: nothing is left to be frozen


def thaw(cgroups: Cgroups, id: str) -> None:
    try:
        if cgroups.version == 2:
            (path(cgroups, "", id) / "cgroup.freeze").write_text("0")
        else:
            (path(cgroups, "freezer", id) / "freezer.state").write_text("THAWED")
    except OSError:
        pass  # gone with its last process


def all_cpus(cgroups: Cgroups) -> str:
    """The CPUs a container without a cpuset may run on: those of the group above."""
    above = path(cgroups, "cpuset", "")
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        try:
            if cpus := (above / name).read_text().strip():
                return cpus
        except OSError:
            continue  # another version's name, or the group is not made yet
    return online_cpus()


def drop_reservation(cgroups: Cgroups, id: str) -> None:
    """Version 2 has no value of `runc update` for none: 0 means unchanged, -1 everything."""
    if cgroups.version == 2:
        try:
            (path(cgroups, "memory", id) / "memory.low").write_text("0")
        except FileNotFoundError:
            return  # without the memory controller there is nothing to reserve
        except OSError as error:
            raise RuntimeFailure(f"memory_reservation: {error.strerror}") from error


def make_room(cgroups: Cgroups, id: str, memory: int | None) -> None:
    """RuntimeFailure when the container has more than `memory` bytes in use that cannot be given back.

    Version 1 refuses such a limit by itself. Version 2 takes it and kills; runc before 1.2 and crun do not look either
    (`checkBeforeUpdate`). What is cache only is given back first, where the kernel can be asked to (memory.reclaim,
    Linux 5.19).
    """
    if cgroups.version != 2 or memory is None:
        return
    group = path(cgroups, "memory", id)
    try:
        if (used := int((group / "memory.current").read_text())) <= memory:
            return
        try:
            (group / "memory.reclaim").write_text(str(used - memory))
        except OSError:
            pass  # not all of it, or an older kernel
        if (used := int((group / "memory.current").read_text())) > memory:
            raise RuntimeFailure(f"memory: {used} bytes are in use", at="memory", hint="give it more than that")
    except FileNotFoundError:
        return  # without the memory controller nothing is limited


def oom_kills(cgroups: Cgroups, id: str) -> int:
    """Processes of the container the kernel killed for memory. The counters live until the cgroup is removed."""
    name = "memory.events" if cgroups.version == 2 else "memory.oom_control"
    try:
        text = (path(cgroups, "memory", id) / name).read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill" and value.isdigit():
            return int(value)
    return 0


def own_group(cgroups: Cgroups) -> str:
    """The cgroup of this process in the tree by which a service manager kills (proc(5), /proc/pid/cgroup)."""
    wanted = "0::" if cgroups.version == 2 else ":name=systemd:"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith(wanted) or (cgroups.version == 1 and wanted in line):
            return line.split(":", 2)[2]
    return "/"


def adopt_monitor(cgroups: Cgroups, pid: int) -> None:
    """Move conmon out of the daemon's cgroup, so that stopping the daemon's service does not kill it. Best effort.

    Takes some 10 ms (the kernel waits for all CPUs). Nothing to do where the daemon is in the root group.
    """
    group = path(cgroups, "systemd", MONITOR)
    if cgroups.parent is None or own_group(cgroups) == "/":
        return
    if cgroups.version == 1 and not (ROOT / "systemd").is_dir():
        return
    try:
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        pass  # no right to (delegated or read-only cgroups): conmon stays where it is, which only systemd would notice


def remove(cgroups: Cgroups, id: str) -> None:
    """Remove empty cgroups the runtime left (it does so itself unless its state was lost)."""
    controllers = [""] if cgroups.version == 2 else [entry.name for entry in ROOT.iterdir() if entry.is_dir()]
    for controller in controllers:
        try:
            os.rmdir(path(cgroups, controller, id))
        except OSError:
            pass
