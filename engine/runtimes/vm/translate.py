"""An OCI config.json (spec.py) as words of RUN and EXEC: what runc does on a host, asked of the agent in a guest.

Floor 2. Pure. Only here: which parts of the document mean what in a guest. Left to the guest's own kernel are network
namespace (the guest's is the container's) and device rules; mounts of the host arrive by the share (driver.py).
Source: runtime-spec config.md, config-linux.md; cgroup v2 files: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.runtimes.vm.protocol import Values, fields
from engine.runtimes.vm.verbs import mount_flags

# <asm-generic/resource.h>: Linux's numbers, whatever the host is
_LIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
RLIMITS = {f"RLIMIT_{name}": number for number, name in enumerate(_LIMITS.split())}
SHARES = "/run/shares"  # in the guest: where the 9p export is mounted
Words = dict[str, Any]


def process_words(process: Mapping[str, Any], bits: Mapping[str, int]) -> Words:
    """Of `process` (config.md#process); `bits` are capability names and their bits."""
    user = process.get("user", {})
    words: Words = {
        "argv": list(process["args"]),
        "env": list(process.get("env", ())),
        "cwd": process.get("cwd", "/"),
        "uid": user.get("uid", 0),
        "gid": user.get("gid", 0),
        "group": list(user.get("additionalGids", ())),
    }
    if "umask" in user:
        words["umask"] = f"{user['umask']:o}"
    capabilities = process.get("capabilities", {})
    masks = [
        sum(1 << bits[name] for name in capabilities.get(kind, ()))
        for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
    ]
    if user.get("uid", 0) != 0:
        masks[1] = masks[2] = masks[4]  # an ordinary user has after execve what is ambient
    words["caps"] = fields(*(f"{mask:x}" for mask in masks))
    words["rlimit"] = [
        fields(RLIMITS[item["type"]], _limit(item["soft"]), _limit(item["hard"])) for item in process.get("rlimits", ())
    ]
    if process.get("noNewPrivileges"):
        words["no_new_privs"] = 1
    if process.get("oomScoreAdj") is not None:
        words["oom_score_adj"] = process["oomScoreAdj"]
    if process.get("terminal"):
        words["tty"] = 1
        size = process.get("consoleSize") or {}
        words["size"] = fields(size.get("height") or 24, size.get("width") or 80)
    words["stdin"] = 1
    return words


def _limit(value: int) -> int:
    return -1 if value >= (1 << 64) - 1 else value


def container_words(document: Mapping[str, Any], shared: Mapping[str, str], bits: Mapping[str, int]) -> Words:
    """Of the whole document; `shared` gives for the source of each bind mount its path in the guest."""
    linux = document.get("linux", {})
    words = process_words(document["process"], bits)
    words["mount"] = [item for mount in document.get("mounts", ()) for item in _mount(mount, shared)]
    words["masked"] = list(linux.get("maskedPaths", ()))
    words["readonly"] = list(linux.get("readonlyPaths", ()))
    words["device"] = [
        fields(
            node["path"],
            f"{_TYPES[node['type']] | node.get('fileMode', 0o666):o}",
            node.get("major", 0),
            node.get("minor", 0),
            node.get("uid", 0),
            node.get("gid", 0),
        )
        for node in linux.get("devices", ())
    ]
    words["sysctl"] = [fields(name, value) for name, value in linux.get("sysctl", {}).items()]
    words["cgroup"] = cgroup_words(linux.get("resources", {}))
    if document.get("root", {}).get("readonly"):
        words["readonly_rootfs"] = 1
    if document.get("hostname"):
        words["hostname"] = document["hostname"]
    return words


_TYPES = {"c": 0o020000, "u": 0o020000, "b": 0o060000, "p": 0o010000}


def _mount(mount: Mapping[str, Any], shared: Mapping[str, str]) -> list[bytes]:
    """One mount of the document. The agent tells the kernel twice where it has to be (a read-only bind)."""
    target, kind, source = str(mount["destination"]), str(mount.get("type", "bind")), str(mount.get("source", ""))
    options = [option for option in mount.get("options", ()) if option not in ("newinstance",)]
    if kind == "bind" or "bind" in options or "rbind" in options:
        flags, _ = mount_flags([option for option in options if option not in _PROPAGATION])
        return [fields(shared[source], target, "", flags | 4096 | 16384, "")]
    flags, data = mount_flags([option for option in options if option not in _PROPAGATION])
    return [fields(source, target, kind, flags, data)]


_PROPAGATION = {"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"}


def cgroup_words(resources: Mapping[str, Any]) -> list[bytes]:
    """`linux.resources` as files of cgroup v2; what is not set is not written."""
    memory, cpu, pids = (resources.get(kind, {}) for kind in ("memory", "cpu", "pids"))
    out: list[tuple[str, str]] = []
    limit = memory.get("limit")
    if limit is not None:
        out.append(("memory.max", _max(limit)))
    swap = memory.get("swap")
    if swap is not None and limit is not None:
        out.append(("memory.swap.max", "max" if swap < 0 or limit < 0 else str(max(0, swap - limit))))
    if memory.get("reservation"):
        out.append(("memory.low", "0" if memory["reservation"] < 0 else str(memory["reservation"])))
    if cpu.get("shares"):
        out.append(("cpu.weight", str(1 + (min(max(cpu["shares"], 2), 262144) - 2) * 9999 // 262142)))  # as runc
    if cpu.get("quota") is not None:
        out.append(("cpu.max", f"{_max(cpu['quota'])} {cpu.get('period', 100_000)}"))
    if pids.get("limit") is not None:
        out.append(("pids.max", _max(pids["limit"])))
    return [fields(name, value) for name, value in out]


def memory_in_use(stats: Values) -> int:
    """Bytes a container could not give back at once, from the agent's answer to STATS: without its page cache."""
    numbers: dict[str, int] = {}
    for name in ("memory.current", "memory.stat"):
        for line in stats.text(name).splitlines():
            words = line.split()
            if words and len(words[-1]) <= 20 and words[-1].isascii() and words[-1].isdigit():
                numbers[words[0] if len(words) == 2 else name] = int(words[-1])
    cache = numbers.get("active_file", 0) + numbers.get("inactive_file", 0)
    return max(0, numbers.get("memory.current", 0) - cache)


def cpu_numbers(text: str) -> set[int]:
    """CPUs of a list such as 0-3,7 that has been checked (options.py, which needs more than the shim has)."""
    ends = (part.partition("-") for part in text.split(","))
    return {number for low, _, high in ends for number in range(int(low), int(high or low) + 1)}


def _max(value: int) -> str:
    return "max" if value < 0 else str(value)


def bind_sources(document: Mapping[str, Any]) -> dict[str, bool]:
    """The host paths that bind mounts of the document name, and whether the guest may write there."""
    out: dict[str, bool] = {}
    for mount in document.get("mounts", ()):
        options = set(mount.get("options", ()))
        if mount.get("type") == "bind" or {"bind", "rbind"} & options:
            source = str(mount["source"])
            out[source] = out.get(source, False) or "ro" not in options
    return out
