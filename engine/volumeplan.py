"""What `prune` would remove of the volumes, shown before it is done. Floor 2.

Only here: the text of the plan and its hash. A volume no container uses is in it, named or not. The hash covers which
volumes these are (name and when each was made), not their sizes: those are measured by the way and may be late.
Thread-safe.
"""

from __future__ import annotations

from engine import plans
from engine.events import rfc3339
from engine.jobs import Task, remove_each
from engine.volumes import Volume, Volumes

WHERE = "volumes/plan"


def _hash(found: list[Volume]) -> str:
    return plans.hash_of("".join(f"{volume.name} {volume.created_ns}\n" for volume in found))


def text(volumes: Volumes) -> str:
    """`volume NAME BYTES REASON` lines, `total N volumes B bytes`, and `prune HASH`: what runs exactly this."""
    found = volumes.unused()
    lines, total = [], 0
    for volume in found:
        size = volumes.known_size(volume.name)
        total += size or 0
        kind = "anonymous, " if volume.labels.get("anonymous") else ""
        made = rfc3339(volume.created_ns)[:19]
        lines.append(f"volume {volume.name} {'?' if size is None else size} {kind}no container uses it, made {made}Z\n")
    return "".join(lines) + f"total {len(found)} volumes {total} bytes\nprune {_hash(found)}\n"


def check(volumes: Volumes, digest: str) -> None:
    """Whether `run` with this hash would be accepted now: InvalidArgument, Busy."""
    plans.check(digest, _hash(volumes.unused()), WHERE)


def run(volumes: Volumes, digest: str, task: Task) -> str:
    """Remove exactly what the plan with this hash lists, but for what has been taken into use since."""
    check(volumes, digest)
    return remove_each(task, [volume.name for volume in volumes.unused()], volumes.remove, "volumes")
