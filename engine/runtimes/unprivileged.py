"""What of a container an engine without root can have. Floor 2, stateless.

Only here: which limits are refused, and what of config.json changes. Limits, pause and update need a group of cgroup v2
that is the user's (delegation.py), each limit the controller that enforces it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import Unsupported
from engine.runtimes.cgroups import Cgroups

LIMITS = {  # field: the controller
    "memory": "memory",
    "memory_swap": "memory",
    "memory_reservation": "memory",
    "cpus": "cpu",
    "cpu_shares": "cpu",
    "cpuset": "cpuset",
    "pids": "pids",
}
HINT = "`dutchman doctor` says how to get it, or run the engine as root"


def refuse(verb: str, cgroups: Cgroups) -> None:
    """Unsupported where `verb` needs a cgroup and there is none."""
    if cgroups.parent is None:
        raise Unsupported(f"{verb}: an engine without root has no cgroups here", hint=HINT)


def limits(resources: dict[str, Any], cgroups: Cgroups) -> dict[str, Any]:
    """`linux.resources` without what this engine's containers have no controller for."""
    out = {key: value for key, value in resources.items() if key not in ("memory", "pids") or cgroups.counts(key)}
    if "cpu" in out:
        of = {"cpus": "cpuset", "mems": "cpuset"}
        out["cpu"] = {key: value for key, value in out["cpu"].items() if cgroups.counts(of.get(key, "cpu"))}
    return out


def adapt(config: Any, document: dict[str, Any], cgroups: Cgroups) -> None:
    """Fit a container's config.json to what a user may do. Unsupported names a limit asked for.

    Where it shares the host's network or processes, /sys or /proc cannot be mounted anew: the host's are bound.
    A process may be made a likelier victim of the OOM killer than the daemon is, not a less likely one.
    """
    for name, controller in LIMITS.items():
        if getattr(config, name, None) and not cgroups.counts(controller):
            lack = "no cgroups" if cgroups.parent is None else f"no {controller} controller"
            raise Unsupported(
                f"{name}: an engine without root has {lack} here to limit anything with", at=name, hint=HINT
            )
    if config.device_cgroup_rules:
        raise Unsupported(
            "device_cgroup_rules: only root has them",
            at="device_cgroup_rules",
            hint="leave them out, or run the engine as root",
        )
    linux = document["linux"]
    if cgroups.parent is None:
        linux.pop("cgroupsPath", None)
        linux.pop("resources", None)
    else:
        linux["resources"] = {key: value for key, value in linux["resources"].items() if key != "devices"}
    own = {space["type"] for space in linux["namespaces"]}
    bound = {"/sys": "network", "/proc": "pid"}
    for mount in document["mounts"]:
        if mount["type"] in ("sysfs", "proc") and bound.get(mount["destination"], "mount") not in own:
            kept = [option for option in mount["options"] if option in ("ro", "nosuid", "noexec", "nodev")]
            mount |= {"type": "bind", "source": mount["destination"], "options": ["rbind", *kept]}
            if mount["destination"] == "/sys":  # it has the host's cgroups below it
                document["mounts"] = [item for item in document["mounts"] if item["type"] != "cgroup"]
    score = int(Path("/proc/self/oom_score_adj").read_text())
    document["process"]["oomScoreAdj"] = max(score, document["process"].get("oomScoreAdj", 0))
