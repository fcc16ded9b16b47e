"""containers/list.jsonl: every container in one file, so that a thousand cost one read. Floor 5."""

from __future__ import annotations

import json
from typing import Any

from engine.netconfig import PortSpec
from engine.ports import all_ports
from fdfs.entry import File
from fdfs.tree.text import line, stamp


def _span(first: int, count: int) -> str:
    return f"{first}-{first + count - 1}" if count > 1 else str(first)


def published(port: PortSpec) -> str:
    """As a line of `ports`, a range in one: 80/tcp 0.0.0.0:8080, 80-89/udp [::1]:8080-8089."""
    address = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "0.0.0.0"
    return f"{_span(port.container, port.count)}/{port.protocol} {address}:{_span(port.host, port.count)}"


def containers(engine: Any) -> str:
    """Three queries however many there are. Keys are named as a container's files; `image` is as config.yaml has it."""
    due = engine.containers.restarts.all_due()
    ports = all_ports(engine.meta)
    out = []
    for container in engine.containers.all():
        row = {
            "name": container.name,
            "id": container.id,
            "state": str(container.state),
            "image": container.config.image,
            "digest": container.image,
            "pid": container.pid,
            "exit_code": container.exit_code,
            "health": str(engine.containers.health.of(container)),
            "restarting": container.id in due,
            "restarts": container.restarts,
            "created_at": stamp(container.created_ns).rstrip(),
            "started_at": stamp(container.started_ns).rstrip(),
            "finished_at": stamp(container.finished_ns).rstrip(),
            "ports": [published(port) for port in ports.get(container.id, ())],
        }
        out.append(line(json.dumps(row, ensure_ascii=False, separators=(",", ":"))))
    return "".join(out)


LIST = File(
    name="list.jsonl",
    doc="all of them, one JSON object a line, sorted by name: name, state, image, pid, exit_code, health, ports…",
    show=containers,
)
