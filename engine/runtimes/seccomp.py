"""Docker's default seccomp profile, resolved to the OCI form for given capabilities and architecture.

Floor 2. The profile is the distribution's (`seccomp.json`, format: moby profiles/seccomp `seccomp.Seccomp`, with
archMap, includes and excludes); the result is `linux.seccomp` of the runtime-spec (config-linux.md#seccomp). Pure but
for reading that one file, which is parsed once. Thread-safe.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from engine import host, hostfiles
from engine.errors import Damaged, InvalidArgument, Unsupported

PROFILES = (Path("/usr/share/containers/seccomp.json"), Path("/etc/containers/seccomp.json"))
PACKAGE = "golang-github-containers-common"  # of Debian and Ubuntu; containers-common elsewhere
MAX_PROFILE = 1 << 20
ACTIONS = tuple(
    f"SCMP_ACT_{name}"
    for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP", "NOTIFY")
)
ARGUMENT = ("index", "value", "valueTwo", "op")
OPERATORS = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))

# uname machine -> (Go's name, as includes.arches has it; libseccomp's name, as archMap has it)
ARCHITECTURES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "i686": ("386", "SCMP_ARCH_X86"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
}


def profile_path() -> Path | None:
    return next((path for path in PROFILES if path.is_file()), None)


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_PROFILE + 1)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise Damaged(f"{path}: not a seccomp profile: {error}") from error
    if len(text) > MAX_PROFILE or not isinstance(data, dict) or not isinstance(data.get("syscalls"), list):
        raise Damaged(f"{path}: not a seccomp profile")
    return data


def own_profile(path: Path) -> dict[str, Any]:
    """A user's profile, in moby's form or the runtime-spec's. NotFound, InvalidArgument name the path and the fault."""
    where = f"security_opt: seccomp: {path}"
    text = hostfiles.read(str(path), "security_opt: seccomp", MAX_PROFILE)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}: not JSON: {error}", at=str(path)) from error
    fault = _fault(data)
    if fault:
        raise InvalidArgument(f"{where}: {fault}", at=str(path))
    return {"syscalls": [], **data}


def _fault(data: Any) -> str:
    """What is wrong with a profile; empty when nothing is."""
    if not isinstance(data, dict) or data.get("defaultAction") not in ACTIONS:
        return f"defaultAction: one of {', '.join(ACTIONS)} expected"
    for key in ("syscalls", "archMap", "architectures"):
        if not isinstance(data.get(key, []), list | type(None)):
            return f"{key}: a list expected"
    for number, rule in enumerate(data.get("syscalls") or []):
        here = f"syscalls[{number}]"
        if not isinstance(rule, dict) or rule.get("action") not in ACTIONS:
            return f"{here}.action: one of {', '.join(ACTIONS)} expected"
        names = rule.get("names") or [rule.get("name")]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            return f"{here}.names: names of system calls expected"
        for key in ("includes", "excludes"):
            if not isinstance(rule.get(key) or {}, dict):
                return f"{here}.{key}: a mapping expected"
        errno = rule.get("errnoRet")
        if errno is not None and (not isinstance(errno, int) or not 0 <= errno < 4096):
            return f"{here}.errnoRet: an errno expected"
        for arg in rule.get("args") or []:
            numbers = isinstance(arg, dict) and [arg.get("index"), arg.get("value"), arg.get("valueTwo", 0)]
            if not numbers or not all(isinstance(item, int) and 0 <= item < 1 << 64 for item in numbers):
                return f"{here}.args: index, value and valueTwo are numbers"
            if arg.get("op") not in OPERATORS:
                return f"{here}.args: op: one of {', '.join(OPERATORS)} expected"
    return ""


def default_profile(capabilities: Collection[str], machine: str) -> dict[str, Any]:
    """`linux.seccomp` for a process bounded by `capabilities`. Unsupported when no profile is installed here."""
    path = profile_path()
    if path is None:
        raise Unsupported(
            f"no default seccomp profile: none of {', '.join(map(str, PROFILES))} is there",
            hint=f"apt-get install {PACKAGE}, or set seccomp: unconfined",
        )
    return resolve(_load(path), capabilities, machine, host.kernel_version())


def resolve(
    profile: dict[str, Any], capabilities: Collection[str], machine: str, kernel: tuple[int, int]
) -> dict[str, Any]:
    """Keep the rules that hold for these capabilities, this uname machine and this kernel (major, minor)."""
    if machine not in ARCHITECTURES:
        raise Unsupported(f"no seccomp profile for the architecture {machine}", hint="set seccomp: unconfined")
    go_arch, native = ARCHITECTURES[machine]
    architectures = [native]
    for entry in profile.get("archMap") or ():
        if entry.get("architecture") == native:
            architectures += entry.get("subArchitectures") or []
    if profile.get("architectures") and not profile.get("archMap"):  # the runtime-spec's own form
        architectures = list(profile["architectures"])

    def holds(rule: dict[str, Any]) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        wanted = includes.get("minKernel")
        if wanted and kernel < tuple(int(part) for part in str(wanted).split(".")[:2]):
            return False
        if includes.get("arches") and go_arch not in includes["arches"]:
            return False
        if not all(cap in capabilities for cap in includes.get("caps") or ()):
            return False
        if go_arch in (excludes.get("arches") or ()):
            return False
        return not any(cap in capabilities for cap in excludes.get("caps") or ())

    syscalls: list[dict[str, Any]] = []
    for rule in profile["syscalls"]:
        if not holds(rule):
            continue
        out: dict[str, Any] = {"names": rule.get("names") or [rule["name"]], "action": rule["action"]}
        if rule.get("errnoRet") is not None:
            out["errnoRet"] = rule["errnoRet"]
        if rule.get("args"):
            out["args"] = [{"valueTwo": 0, **{key: arg[key] for key in ARGUMENT if key in arg}} for arg in rule["args"]]
        syscalls.append(out)
    result: dict[str, Any] = {
        "defaultAction": profile["defaultAction"],
        "architectures": architectures,
        "syscalls": syscalls,
    }
    if profile.get("defaultErrnoRet") is not None:
        result["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return result
