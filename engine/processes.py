"""The processes of a container, from its cgroup and /proc, or as the agent of its virtual machine tells them. Floor 3,
stateless, thread-safe.

Only here: which facts of a process are shown and how, and which processes are a container's that has no cgroup. Nothing
is executed. Sources: proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5), pid_namespaces(7); kernel documentation
admin-guide/cgroup-v2.rst (cgroup.procs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.runtimes import cgroups
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.probing import children
from engine.runtimes.vm.protocol import ProtocolError, Values

MAX_PROCESSES = 4096  # that are shown
MAX_COMMAND = 4096  # bytes of a command line that are shown
TICKS = os.sysconf("SC_CLK_TCK")  # per second
GUEST_TICKS = 100  # per second, of a Linux guest (USER_HZ)


@dataclass(frozen=True, slots=True)
class Process:
    pid: int  # on the host; in a virtual machine, of its guest
    inside: int  # its pid in the container
    parent: int  # as `pid`
    uid: int
    state: str  # one letter, as ps has it
    cpu_seconds: float
    memory_bytes: int  # resident
    command: str  # its words, control characters written as \\n, \\x1b …; [name] when it has none


def processes(id: str, pid: int | None) -> list[Process]:
    """Those in the container's cgroup, nested groups too, by their pid inside.

    `pid`: its first process, which counts also without a cgroup.
    """
    here = Cgroups.detect()
    pids = {pid} if pid is not None else set()
    if here.parent is None and pid is not None:
        pids |= members(pid)
    group = cgroups.path(here, "pids" if here.version == 1 else "", id)
    for base, _, _ in os.walk(group):
        try:
            pids.update(int(word) for word in (Path(base) / "cgroup.procs").read_text().split())
        except OSError:
            continue  # it went away meanwhile
    found = (process(number) for number in sorted(pids)[:MAX_PROCESSES])
    return sorted((item for item in found if item is not None), key=lambda item: item.inside)


def members(pid: int) -> set[int]:
    """The processes of the container whose first process this is: those in its pid namespace, and all below them.

    Where it shares the host's namespace, a process that made itself a daemon is not found. Of processes that this user
    may not ask only their parents are known.
    """
    shared = _namespace("self")
    own = _namespace(str(pid))
    below = children()
    todo = [pid]
    if own is not None and own != shared:
        todo += [other for pids in below.values() for other in pids if _namespace(str(other)) == own]
    found: set[int] = set()
    while todo:
        if (next_ := todo.pop()) not in found:
            found.add(next_)
            todo += below.get(next_, ())
    return found


def _namespace(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None


def process(pid: int) -> Process | None:
    """One process; None when it has ended."""
    place = Path(f"/proc/{pid}")
    try:
        stat = (place / "stat").read_text(errors="replace")
        status = (place / "status").read_text(errors="replace")
        with (place / "cmdline").open("rb") as file:
            words = file.read(MAX_COMMAND).rstrip(b"\0")
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(") ")
    fields = rest.split()  # from field 3, the state, on
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    command = words.decode(errors="replace").replace("\0", " ") or f"[{name}]"
    return Process(
        pid=pid,
        inside=int(facts.get("NSpid", str(pid)).split()[-1]),
        parent=int(fields[1]),
        uid=int(facts["Uid"].split()[1]),
        state=fields[0],
        cpu_seconds=(int(fields[11]) + int(fields[12])) / TICKS,
        memory_bytes=int(facts.get("VmRSS", "0 kB").split()[0]) * 1024,
        command=_shown(command),
    )


def _shown(command: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in command)


def guest_processes(told: Values) -> list[Process]:
    """Those of a container in a virtual machine, from the agent's answer to PS. ProtocolError."""
    return sorted(map(_guest_process, told.all("proc")[:MAX_PROCESSES]), key=lambda item: item.inside)


def _guest_process(data: bytes) -> Process:
    parts = data.split(b"\0", 10)
    if len(parts) != 11 or any(len(part) > 20 or not part.isdigit() for part in (*parts[:4], *parts[5:9])):
        raise ProtocolError(f"not a process: {data[:80]!r}")
    pid, inside, parent, uid = map(int, parts[:4])
    cpu, memory = int(parts[6]), int(parts[7])
    words = parts[10][:MAX_COMMAND].decode(errors="replace").replace("\x1f", " ")
    return Process(
        pid=pid,
        inside=inside,
        parent=parent,
        uid=uid,
        state=_shown(parts[4][:1].decode(errors="replace")) or "?",
        cpu_seconds=cpu / GUEST_TICKS,
        memory_bytes=memory,
        command=_shown(words or f"[{parts[9][:64].decode(errors='replace')}]"),
    )
