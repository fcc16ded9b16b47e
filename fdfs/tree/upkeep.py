"""Files of a container that tell whether it is well and when it starts again. Floor 5."""

from __future__ import annotations

import json
import math
from typing import Any

from fdfs.entry import File
from fdfs.tree.text import line


def reason(engine: Any, name: str) -> str:
    container = engine.containers.get(name)
    due = engine.containers.restarts.due(container.id)
    return line("; ".join(filter(None, [_due(due), engine.agents.waits(container.id), container.reason])))


def _due(seconds: float | None) -> str:
    return "" if seconds is None else f"restarts in {math.ceil(seconds)}s"


def restarting(engine: Any, name: str) -> str:
    return line(engine.containers.restarts.due(engine.containers.get(name).id) is not None)


def health(engine: Any, name: str) -> str:
    return line(engine.containers.health.of(engine.containers.get(name)))


def health_log(engine: Any, name: str) -> str:
    probes = engine.containers.health.probes(engine.containers.get(name).id)
    return "".join(json.dumps(probe, separators=(",", ":")) + "\n" for probe in probes)


UPKEEP = (
    File(name="reason", doc="why it is in its state; empty when ordinary", show=reason),
    File(name="restarting", doc="1 while it is stopped and its policy is about to start it again", show=restarting),
    File(name="health", doc="none starting healthy unhealthy, as its healthcheck finds it", show=health),
    File(name="health.jsonl", doc="the last probes: start, end, exit_code, output", show=health_log),
)
