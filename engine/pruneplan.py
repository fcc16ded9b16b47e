"""What `prune` would remove, of volumes or of kernels, shown before it is done. Floor 2.

Only here: the text of such a plan and its hash, which covers what would be removed, not how large it is: sizes may be
late. In it is what no container uses, named or not; of kernels also not the default one. Thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine import plans
from engine.events import rfc3339
from engine.jobs import Task, remove_each
from engine.kernels import Kernel, Kernels
from engine.volumes import Volume, Volumes


class Item(NamedTuple):
    name: str
    mark: str  # what tells it from another that had this name: covered by the hash
    size: Callable[[], int | None]  # bytes; None: not known yet
    about: str


@dataclass(frozen=True, slots=True)
class Plan:
    kind: str  # kernels, volumes
    find: Callable[[], list[Item]]
    remove: Callable[[str], None]

    def text(self) -> str:
        """`volume NAME BYTES REASON` lines, `total N volumes B bytes`, and `prune HASH`: what runs exactly this."""
        found = self.find()
        lines, total = [], 0
        for item in found:
            size = item.size()
            total += size or 0
            known = "?" if size is None else size
            lines.append(f"{self.kind.removesuffix('s')} {item.name} {known} {item.about}\n")
        return "".join(lines) + f"total {len(found)} {self.kind} {total} bytes\nprune {_hash(found)}\n"

    def check(self, digest: str) -> None:
        """Whether `run` with this hash would be accepted now: InvalidArgument, Busy."""
        plans.check(digest, _hash(self.find()), f"{self.kind}/plan")

    def run(self, digest: str, task: Task) -> str:
        """Remove exactly what the plan with this hash lists, but for what has been taken into use since."""
        self.check(digest)
        return remove_each(task, [item.name for item in self.find()], self.remove, self.kind)


def of_volumes(volumes: Volumes) -> Plan:
    def item(volume: Volume) -> Item:
        kind = "anonymous, " if volume.labels.get("anonymous") else ""
        about = f"{kind}no container uses it, made {rfc3339(volume.created_ns)[:19]}Z"
        return Item(volume.name, str(volume.created_ns), lambda: volumes.known_size(volume.name), about)

    return Plan("volumes", lambda: [item(volume) for volume in volumes.unused()], volumes.remove)


def of_kernels(kernels: Kernels) -> Plan:
    def item(kernel: Kernel) -> Item:
        about = f"{kernel.version} {kernel.arch}, no container uses it"
        return Item(kernel.name, kernel.image_digest, lambda: _size(kernel), about)

    return Plan("kernels", lambda: [item(kernel) for kernel in kernels.unused()], kernels.remove)


def _size(kernel: Kernel) -> int:
    total = 0
    for place, _, names in os.walk(kernel.directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


def _hash(found: list[Item]) -> str:
    return plans.hash_of("".join(f"{item.name} {item.mark}\n" for item in found))
