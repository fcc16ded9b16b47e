"""What is known of a machine that runs, for people. Floor 2, no state.

Only here: reading it back from the plan it was started with (bundle/vm.json) and from what its owner wrote down below
run/vm: `accelerator`, which is not the planned one where that failed with this guest, and `how` it came to run.
"""

from __future__ import annotations

import json
from pathlib import Path


def facts(directory: Path) -> dict[str, str]:
    """Of the container with these files, in the order people read them; empty when it has no machine (yet)."""
    try:
        plan = json.loads((directory / "bundle" / "vm.json").read_bytes())
        machine, place = plan["machine"], directory / "run" / "vm"
        return {
            "arch": machine["arch"],
            "accelerator": (place / "accelerator").read_text(),
            "kernel": Path(machine["kernel"]).parent.name,
            "memory_bytes": str(int(machine["memory"]) << 20),
            "cpus": str(machine["cpus"]),
            "transport": plan["transport"],
            "qemu_pid": (place / "qemu.pid").read_text(),
            "started": " ".join((place / "how").read_text().split()),
        }
    except (OSError, ValueError, LookupError, TypeError):  # it ends meanwhile, or an older release started it
        return {}
