"""What a container uses now, from its cgroup. Floor 3, stateless, thread-safe.

Only here: the names under which both cgroup versions' counters are shown. Sources: kernel documentation
admin-guide/cgroup-v2.rst (memory.current, cpu.stat, pids.current) and cgroup-v1/{memory,cpuacct,pids}.rst.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from engine.runtimes import cgroups
from engine.runtimes.spec import Cgroups


@lru_cache(1)
def _host() -> Cgroups:
    return Cgroups.detect()


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def resources(id: str) -> dict[str, int]:
    """memory_bytes, memory_peak_bytes, memory_limit_bytes, cpu_usec, pids, oom_kills: those this host counts.

    Empty when the container has no cgroup (it does not run, or runs on a driver without).
    """
    here = _host()
    out: dict[str, int | None] = {}
    if here.version == 2:
        group = cgroups.path(here, "", id)
        if not group.is_dir():
            return {}
        out["memory_bytes"] = _number(group / "memory.current")
        out["memory_peak_bytes"] = _number(group / "memory.peak")
        out["memory_limit_bytes"] = _number(group / "memory.max")
        for line in (_text(group / "cpu.stat") or "").splitlines():
            key, _, value = line.partition(" ")
            if key == "usage_usec":
                out["cpu_usec"] = int(value)
        out["pids"] = _number(group / "pids.current")
    else:
        memory = cgroups.path(here, "memory", id)
        out["memory_bytes"] = _number(memory / "memory.usage_in_bytes")
        out["memory_peak_bytes"] = _number(memory / "memory.max_usage_in_bytes")
        limit = _number(memory / "memory.limit_in_bytes")
        out["memory_limit_bytes"] = limit if limit is not None and limit < 1 << 60 else None
        nanos = _number(cgroups.path(here, "cpuacct", id) / "cpuacct.usage")
        out["cpu_usec"] = None if nanos is None else nanos // 1000
        out["pids"] = _number(cgroups.path(here, "pids", id) / "pids.current")
    found = {key: value for key, value in out.items() if value is not None}
    if found:
        found["oom_kills"] = cgroups.oom_kills(here, id)
    return found
