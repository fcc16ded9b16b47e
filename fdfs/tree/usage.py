"""What a container uses, as numbers, as a list of processes and as a picture. Floor 5."""

from __future__ import annotations

import time
from typing import Any

from fdfs import chart
from fdfs.entry import File
from fdfs.tree.text import flat

COLUMNS = ("PID", "INSIDE", "PARENT", "USER", "STATE", "CPU_SECONDS", "MEMORY_BYTES", "COMMAND")


def stats(engine: Any, name: str) -> str:
    return flat(engine.containers.stats(name))


def stats_svg(engine: Any, name: str) -> str:
    container = engine.containers.get(name)
    samples = engine.containers.monitor.samples.get(container.id)
    now = time.monotonic()
    return chart.usage(
        container.name,
        str(container.state),
        [(sample.at - now, sample.cpu_percent, sample.memory_bytes) for sample in samples],
        memory_limit=container.config.memory,
        cpus=container.config.cpus,
    )


def top(engine: Any, name: str) -> str:
    """Columns a person reads and awk splits; empty when nothing runs."""
    rows = [
        (
            str(process.pid),
            str(process.inside),
            str(process.parent),
            user,
            process.state,
            f"{process.cpu_seconds:.2f}",
            str(process.memory_bytes),
            process.command,
        )
        for process, user in engine.containers.processes(name)
    ]
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in (COLUMNS, *rows)) for column in range(len(COLUMNS) - 1)]
    out = []
    for row in (COLUMNS, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        out.append("  ".join((*cells, row[-1])).rstrip() + "\n")
    return "".join(out)


USAGE = (
    File(
        name="stats",
        doc="what it uses now, flat-keyed: CPU, memory, I/O, processes, network; empty when it does not run",
        wait=stats,  # a virtual machine is asked
    ),
    File(name="stats.svg", doc="a picture of the last ten minutes: CPU and memory", show=stats_svg),
    File(
        name="top",
        doc="its processes: pid on the host (or in its virtual machine) and inside, user, CPU time, memory, command",
        wait=top,
    ),
)
