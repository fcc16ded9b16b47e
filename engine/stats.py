"""What a container uses now, from its cgroup and its network namespace: of this host, or of its virtual machine as the
agent there tells it. Floor 3, stateless, thread-safe.

Only here: the names under which both cgroup versions' counters are shown, and what is made of its processes' own
counters where it has no cgroup. Sources: kernel documentation admin-guide/cgroup-v2.rst,
cgroup-v1/{memory,cpuacct,pids,blkio-controller}.rst, scheduler/sched-bwc.rst; proc_pid_net(5) for `dev`,
proc_pid_stat(5), proc_pid_io(5), proc_pid_smaps(5) for `smaps_rollup`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from engine.processes import TICKS, members
from engine.runtimes import cgroups
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.vm.protocol import Values

NO_LIMIT = 1 << 60  # version 1 writes a number of this size for none
IO = {"read_bytes": "io_read_bytes", "write_bytes": "io_written_bytes"}  # of /proc/<pid>/io
Found = dict[str, int | None]


@lru_cache(1)
def _host() -> Cgroups:
    return Cgroups.detect()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _int(text: str) -> int | None:
    """A counter of the kernel; a guest may say anything."""
    text = text.strip()
    return int(text) if len(text) <= 20 and text.isascii() and text.isdigit() else None


def _number(path: Path) -> int | None:
    return _int(_text(path))


def _keyed(text: str) -> dict[str, int]:
    """The text of a flat-keyed file."""
    pairs = (line.split() for line in text.splitlines())
    found = {pair[0]: _int(pair[1]) for pair in pairs if len(pair) == 2}
    return {key: value for key, value in found.items() if value is not None}


def _percent(quota: str, period: str) -> int | None:
    share, whole = _int(quota), _int(period)
    return round(100 * share / whole) if share is not None and whole else None


def _version2(text: Callable[[str], str]) -> Found:
    """`text` gives a file of the group, empty when it is not there."""
    cpu, memory = _keyed(text("cpu.stat")), _keyed(text("memory.stat"))
    quota, _, period = text("cpu.max").strip().partition(" ")
    out: Found = {
        "cpu_usec": cpu.get("usage_usec"),
        "cpu_user_usec": cpu.get("user_usec"),
        "cpu_system_usec": cpu.get("system_usec"),
        "cpu_throttled_usec": cpu.get("throttled_usec"),
        "cpu_throttled_periods": cpu.get("nr_throttled"),
        "cpu_limit_percent": _percent(quota, period),
        "memory_bytes": _int(text("memory.current")),
        "memory_peak_bytes": _int(text("memory.peak")),
        "memory_limit_bytes": _int(text("memory.max")),
        "memory_anon_bytes": memory.get("anon"),
        "memory_file_bytes": memory.get("file"),
        "swap_bytes": _int(text("memory.swap.current")),
        "pids": _int(text("pids.current")),
        "pids_limit": _int(text("pids.max")),
    }
    if io := text("io.stat"):
        names = {"rbytes": "io_read_bytes", "wbytes": "io_written_bytes", "rios": "io_reads", "wios": "io_writes"}
        words = [word.partition("=") for word in io.split()]
        for key, name in names.items():
            out[name] = sum(_int(value) or 0 for word, _, value in words if word == key)
    return out


def _version1(id: str) -> Found:
    memory, cpu, account, pids, block = (
        cgroups.path(Cgroups(1, False), controller, id) for controller in ("memory", "cpu", "cpuacct", "pids", "blkio")
    )
    stat, throttled = _keyed(_text(memory / "memory.stat")), _keyed(_text(cpu / "cpu.stat"))
    limit = _number(memory / "memory.limit_in_bytes")
    out: Found = {
        "cpu_usec": _usec(_number(account / "cpuacct.usage")),
        "cpu_user_usec": _usec(_number(account / "cpuacct.usage_user")),
        "cpu_system_usec": _usec(_number(account / "cpuacct.usage_sys")),
        "cpu_throttled_usec": _usec(throttled.get("throttled_time")),
        "cpu_throttled_periods": throttled.get("nr_throttled"),
        "cpu_limit_percent": _percent(
            _text(cpu / "cpu.cfs_quota_us").strip(), _text(cpu / "cpu.cfs_period_us").strip()
        ),
        "memory_bytes": _number(memory / "memory.usage_in_bytes"),
        "memory_peak_bytes": _number(memory / "memory.max_usage_in_bytes"),
        "memory_limit_bytes": limit if limit is not None and limit < NO_LIMIT else None,
        "memory_anon_bytes": stat.get("total_rss"),
        "memory_file_bytes": stat.get("total_cache"),
        "swap_bytes": stat.get("total_swap"),
        "pids": _number(pids / "pids.current"),
        "pids_limit": _number(pids / "pids.max"),
    }
    for file, read, write in (
        ("service_bytes", "io_read_bytes", "io_written_bytes"),
        ("serviced", "io_reads", "io_writes"),
    ):
        path = block / f"blkio.throttle.io_{file}"
        if path.exists():
            rows = [line.split() for line in _text(path).splitlines()]
            for word, name in (("Read", read), ("Write", write)):
                out[name] = sum(int(row[2]) for row in rows if len(row) == 3 and row[1] == word)
    return out


def _usec(nanoseconds: int | None) -> int | None:
    return None if nanoseconds is None else nanoseconds // 1000


def network(lines: Iterable[str]) -> dict[str, int]:
    """Sums over the interfaces of /proc/<pid>/net/dev, loopback left out."""
    names = ("network_received_bytes", "network_received_packets", "network_sent_bytes", "network_sent_packets")
    out = dict.fromkeys(names, 0)
    for line in lines:
        interface, colon, rest = line.partition(":")
        row = rest.split()
        if colon and interface.strip() != "lo" and len(row) >= 16:
            for name, column in zip(names, (0, 1, 8, 9), strict=True):
                out[name] += _int(row[column]) or 0
    return out


def _network_of(pid: int) -> dict[str, int]:
    """Those of a process; empty when it has ended, or shares the network of the host: that is not its traffic."""
    try:
        if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            return {}
        return network(Path(f"/proc/{pid}/net/dev").read_text().splitlines())
    except OSError:
        return {}


def _of_processes(pid: int) -> Found:
    """Sums over a container's processes, for want of a cgroup.

    Time and io of a process that has ended are in its parent's counters; those of a session's first process are gone
    with it. Memory is shared out among who has it (PSS), so the page cache is in it only as far as it is mapped.
    """
    ticks, tasks = 0, 0
    memory, io = dict.fromkeys(("Pss", "Pss_Anon", "Pss_File", "SwapPss"), 0), dict.fromkeys(IO, 0)
    for one in members(pid):
        stat = _text(Path(f"/proc/{one}/stat")).rpartition(") ")[2].split()  # from field 3 on
        if len(stat) < 18 or stat[0] in "ZX":
            continue
        ticks += sum(int(word) for word in stat[11:15])  # utime stime cutime cstime
        tasks += int(stat[17])
        for line in _text(Path(f"/proc/{one}/smaps_rollup")).splitlines():
            key, _, rest = line.partition(":")
            if key in memory:
                memory[key] += int(rest.split()[0]) * 1024
        for line in _text(Path(f"/proc/{one}/io")).splitlines():
            key, _, rest = line.partition(":")
            if key in io:
                io[key] += int(rest)
    if not tasks:
        return {}
    return {
        "cpu_usec": ticks * 1_000_000 // TICKS,
        "memory_bytes": memory["Pss"],
        "memory_anon_bytes": memory["Pss_Anon"],
        "memory_file_bytes": memory["Pss_File"],
        "swap_bytes": memory["SwapPss"],
        "pids": tasks,
        **{name: io[key] for key, name in IO.items()},
    }


def resources(id: str, pid: int | None = None) -> dict[str, int]:
    """cpu_*, memory_*, swap_*, io_*, pids, network_* and oom_kills: those this host counts, limits that are set.

    `pid`: its first process, for the network. Empty when it does not run, or runs on a driver that does not count.
    """
    here = _host()
    if here.parent is None:
        out = _of_processes(pid) if pid is not None else {}
    elif here.version == 2:
        group = cgroups.path(here, "", id)
        out = _version2(lambda name: _text(group / name)) if group.is_dir() else {}
    else:
        out = _version1(id)
    found = {key: value for key, value in out.items() if value is not None}
    if found:
        if pid is not None:
            found.update(_network_of(pid))
        if here.parent is not None:
            found["oom_kills"] = cgroups.oom_kills(here, id)
    return found


def guest_resources(told: Values) -> dict[str, int]:
    """The same of a container in a virtual machine, from the agent's answer to STATS; memory_machine_bytes is all the
    machine has. What is no number is left out."""
    found = {key: value for key, value in _version2(told.text).items() if value is not None}
    found.update(network(told.text("net.dev").splitlines()))
    found["oom_kills"] = _keyed(told.text("memory.events")).get("oom_kill", 0)
    total = [line.split() for line in told.text("meminfo").splitlines() if line.startswith("MemTotal:")]
    if total and len(total[0]) == 3 and (size := _int(total[0][1])) is not None:
        found["memory_machine_bytes"] = size * 1024
    return found


def quick(id: str, pid: int | None = None) -> tuple[int, int] | None:
    """(CPU time used in µs, memory in bytes) for pictures: two small files where it has a cgroup. None: not known."""
    here = _host()
    if here.parent is None:
        out = _of_processes(pid) if pid is not None else {}
        cpu, memory = out.get("cpu_usec"), out.get("memory_bytes")
    elif here.version == 2:
        group = cgroups.path(here, "", id)
        cpu, memory = _keyed(_text(group / "cpu.stat")).get("usage_usec"), _number(group / "memory.current")
    else:
        cpu = _usec(_number(cgroups.path(here, "cpuacct", id) / "cpuacct.usage"))
        memory = _number(cgroups.path(here, "memory", id) / "memory.usage_in_bytes")
    return None if cpu is None or memory is None else (cpu, memory)
