"""What `prune` would remove of the kernels, shown before it is done. Floor 2.

Only here: the text of the plan and its hash. A kernel that is not the default, and that no container names or runs on,
is in it. The hash covers which kernels these are (name and digest of the image). Thread-safe.
"""

from __future__ import annotations

import os

from engine import plans
from engine.jobs import Task, remove_each
from engine.kernels import Kernel, Kernels

WHERE = "kernels/plan"


def _hash(found: list[Kernel]) -> str:
    return plans.hash_of("".join(f"{kernel.name} {kernel.image_digest}\n" for kernel in found))


def _size(kernel: Kernel) -> int:
    total = 0
    for place, _, names in os.walk(kernel.directory):
        total += sum(os.lstat(os.path.join(place, name)).st_size for name in names)
    return total


def text(kernels: Kernels) -> str:
    """`kernel NAME BYTES REASON` lines, `total N kernels B bytes`, and `prune HASH`: what runs exactly this."""
    found = kernels.unused()
    lines, total = [], 0
    for kernel in found:
        try:
            size = _size(kernel)
        except FileNotFoundError:  # removed meanwhile
            size = 0
        total += size
        lines.append(f"kernel {kernel.name} {size} {kernel.version} {kernel.arch}, no container uses it\n")
    return "".join(lines) + f"total {len(found)} kernels {total} bytes\nprune {_hash(found)}\n"


def check(kernels: Kernels, digest: str) -> None:
    """Whether `run` with this hash would be accepted now: InvalidArgument, Busy."""
    plans.check(digest, _hash(kernels.unused()), WHERE)


def run(kernels: Kernels, digest: str, task: Task) -> str:
    """Remove exactly what the plan with this hash lists, but for what has been taken into use since."""
    check(kernels, digest)
    return remove_each(task, [kernel.name for kernel in kernels.unused()], kernels.remove, "kernels")
