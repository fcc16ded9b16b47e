"""Docker's option syntaxes, parsed at the edge: ulimits, devices, tmpfs, sysctls, security options, CPU sets. Floor 0.

Only here: what these texts may say. `parse_*` are pydantic validators (ValueError names the fault) that give one
canonical text per value; the frozen types are what runtimes/spec.py works with. Sources: docker/cli opts, moby
runconfig and volume/mounts, go-units ulimit.go, compose-spec 05-services.md. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from engine.model import Text, parse_mapping, parse_size

UNLIMITED = -1
RLIMITS = (
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "rttime", "sigpending", "stack",
)  # fmt: skip
MAX_LIMIT = (1 << 64) - 1
MAX_CPU = 8191  # the kernel's NR_CPUS at most, less one

TMPFS_FLAGS = frozenset({
    "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "atime", "noatime",
    "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
})  # fmt: skip
TMPFS_VALUES = {
    "size": r"\d+[kmgKMG%]?",
    "nr_blocks": r"\d+[kmgKMG]?",
    "nr_inodes": r"\d+[kmgKMG]?",
    "mode": r"[0-7]{1,5}",
    "uid": r"\d{1,10}",
    "gid": r"\d{1,10}",
}

# namespaced sysctls, by the namespace they belong to (runc libcontainer/configs/validate, docker run --sysctl)
IPC_SYSCTLS = frozenset(
    f"kernel.{name}" for name in ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"]
)
UTS_SYSCTLS = frozenset({"kernel.domainname"})


def inside(path: str) -> str:
    """`path` when it names a place inside a container other than its root."""
    parts = PurePosixPath(path)
    if not parts.is_absolute() or ".." in parts.parts or str(parts) == "/" or "\0" in path:
        raise ValueError("must be an absolute path inside the container, without '..', and not /")
    return str(parts)


def parse_lines(value: Any) -> Any:
    """A list of texts, or their lines; surrounding blanks do not count."""
    if isinstance(value, str):
        value = value.splitlines()
    if not isinstance(value, list | tuple):
        return value
    out = []
    for item in value:
        text = str(item) if isinstance(item, int) and not isinstance(item, bool) else item
        if not isinstance(text, str) or "\n" in text:
            raise ValueError(f"one line of text expected, not {item!r}")
        if text.strip():
            out.append(text.strip())
    return out


Lines = Annotated[tuple[Text, ...], BeforeValidator(parse_lines)]


# --- limits of a process ---------------------------------------------------------------------------------------------


def _limit(name: str, value: Any) -> int:
    text = str(value).strip().lower()
    if isinstance(value, bool) or not re.fullmatch(r"-1|unlimited|\d{1,20}", text):
        raise ValueError(f"{name}: a number, -1 or unlimited expected, not {value!r}")
    number = UNLIMITED if text == "unlimited" else int(text)
    if number > MAX_LIMIT:
        raise ValueError(f"{name}: {number} is too large")
    return UNLIMITED if number == MAX_LIMIT else number


def _ulimit(name: str, value: Any) -> tuple[int, int]:
    """(soft, hard) of `value`: N, SOFT:HARD, or a mapping of soft and hard."""
    if name not in RLIMITS:
        raise ValueError(f"unknown limit {name!r} (one of {', '.join(RLIMITS)})")
    if isinstance(value, dict):
        if set(value) - {"soft", "hard"} or not value:
            raise ValueError(f"{name}: soft and hard expected")
        parts: list[Any] = [value.get("soft", value.get("hard")), value.get("hard", value.get("soft"))]
    else:
        parts = str(value).split(":") if not isinstance(value, bool) else [value]
    if len(parts) not in (1, 2):
        raise ValueError(f"{name}: SOFT[:HARD] expected, not {value!r}")
    soft, hard = _limit(name, parts[0]), _limit(name, parts[-1])
    if hard != UNLIMITED and (soft == UNLIMITED or soft > hard):
        raise ValueError(f"{name}: the soft limit {soft} is above the hard limit {hard}")
    return soft, hard


def parse_ulimits(value: Any) -> Any:
    """NAME=SOFT[:HARD] lines or a mapping, as a mapping of canonical texts: `1024`, `1024:4096`, `-1` for no limit."""
    if not isinstance(value, dict):
        value = parse_mapping(value)
    if not isinstance(value, dict):
        return value
    out = {}
    for name, item in value.items():
        key = str(name).strip()
        soft, hard = _ulimit(key, item)
        out[key] = str(soft) if soft == hard else f"{soft}:{hard}"
    return out


Ulimits = Annotated[dict[str, str], BeforeValidator(parse_ulimits)]


def rlimits(ulimits: MappingType[str, str]) -> list[tuple[str, int, int]]:
    """(RLIMIT_NAME, soft, hard) of parsed ulimits; no limit is 2^64-1 (RLIM_INFINITY)."""
    out = []
    for name, text in ulimits.items():
        soft, hard = (MAX_LIMIT if limit == UNLIMITED else limit for limit in _ulimit(name, text))
        out.append((f"RLIMIT_{name.upper()}", soft, hard))
    return out


# --- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    source: str  # on the host
    target: str  # in the container
    access: str  # of r, w, m


def device(text: str) -> Device:
    """HOST[:CONTAINER[:rwm]] or HOST:rwm. ValueError says what is wrong."""
    parts = text.split(":")
    source, target, access = parts[0], parts[0], "rwm"
    if len(parts) == 2 and re.fullmatch(r"[rwm]{1,3}", parts[1]):
        access = parts[1]
    elif len(parts) in (2, 3) and all(parts):
        target = parts[1]
        access = parts[2] if len(parts) == 3 else access
    elif len(parts) != 1:
        raise ValueError(f"HOST[:CONTAINER[:rwm]] expected, not {text!r}")
    if not re.fullmatch(r"[rwm]{1,3}", access) or len(set(access)) != len(access):
        raise ValueError(f"{text}: access is made of r, w and m, not {access!r}")
    for what, path in (("device on the host", source), ("path in the container", target)):
        try:
            inside(path)
        except ValueError:
            raise ValueError(f"{text}: {what}: an absolute path expected, not {path!r}") from None
    return Device(str(PurePosixPath(source)), str(PurePosixPath(target)), access)


def parse_devices(value: Any) -> Any:
    """Lines, or compose's long form (source, target, permissions), as short canonical texts."""
    items = parse_lines([_short_device(item) for item in value] if isinstance(value, list | tuple) else value)
    if not isinstance(items, list):
        return items
    out = []
    for item in items:
        found = device(item)
        more = f":{found.target}" if found.target != found.source else ""
        out.append(f"{found.source}{more}" + (f":{found.access}" if found.access != "rwm" else ""))
    return out


def _short_device(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if set(item) - {"source", "target", "permissions"} or not isinstance(item.get("source"), str):
        raise ValueError("source, target and permissions expected")
    target = item.get("target") or item["source"]
    return f"{item['source']}:{target}:{item.get('permissions') or 'rwm'}"


Devices = Annotated[tuple[str, ...], BeforeValidator(parse_devices)]


def device_rule(text: str) -> tuple[str, int | None, int | None, str]:
    """(type, major, minor, access) of a cgroup rule such as `c 1:3 mr`; None stands for `*`."""
    match = re.fullmatch(r"([acb]) (\d{1,9}|\*):(\d{1,9}|\*) ([rwm]{1,3})", text)
    if not match:
        raise ValueError(f"TYPE MAJOR:MINOR ACCESS expected, such as 'c 1:3 mr', not {text!r}")
    major, minor = (None if part == "*" else int(part) for part in match.group(2, 3))
    return match[1], major, minor, match[4]


def _device_rules(value: tuple[str, ...]) -> tuple[str, ...]:
    for item in value:
        device_rule(item)
    return value


DeviceRules = Annotated[Lines, AfterValidator(_device_rules)]


# --- tmpfs -----------------------------------------------------------------------------------------------------------


def tmpfs(text: str) -> tuple[str, tuple[str, ...]]:
    """(path in the container, options) of PATH[:OPTION,…]. ValueError names the option."""
    path, _, rest = text.partition(":")
    options = tuple(item for item in rest.split(",") if item)
    for item in options:
        key, equals, value = item.partition("=")
        wanted = TMPFS_VALUES.get(key)
        if not equals and key in TMPFS_FLAGS:
            continue
        if wanted is None or not re.fullmatch(wanted, value):
            raise ValueError(f"{text}: bad option {item!r} (size=, mode=, uid=, gid=, nr_inodes=, ro, exec, …)")
    return inside(path), options


def _tmpfs_list(value: tuple[str, ...]) -> tuple[str, ...]:
    out = []
    for item in value:
        path, options = tmpfs(item)
        out.append(f"{path}:{','.join(options)}" if options else path)
    if len({item.partition(":")[0] for item in out}) != len(out):
        raise ValueError("two of them at one path")
    return tuple(out)


Tmpfs = Annotated[Lines, AfterValidator(_tmpfs_list)]


# --- sysctls and security --------------------------------------------------------------------------------------------


def sysctl_namespace(name: str) -> str:
    """The namespace a sysctl belongs to: ipc, network or uts. ValueError for one that is the whole host's."""
    if name in IPC_SYSCTLS or name.startswith("fs.mqueue."):
        return "ipc"
    if name.startswith("net."):
        return "network"
    if name in UTS_SYSCTLS:
        return "uts"
    hint = "; set hostname instead" if name == "kernel.hostname" else ""
    raise ValueError(f"{name} is not namespaced: it would change the host{hint}")


def parse_sysctls(value: Any) -> Any:
    """NAME=VALUE lines or a mapping; names with dots (`/` is taken for one, as sysctl(8) does)."""
    value = parse_mapping(value)
    if not isinstance(value, dict):
        return value
    out = {}
    for name, item in value.items():
        key = str(name).strip().replace("/", ".")
        if not re.fullmatch(r"[a-z0-9_-]+(\.[A-Za-z0-9_@:*-]+)+", key):
            raise ValueError(f"not the name of a sysctl: {name!r}")
        sysctl_namespace(key)
        text = item.strip() if isinstance(item, str) else item
        if not isinstance(text, str) or not text or "\n" in text:
            raise ValueError(f"{key}: a value in one line expected")
        out[key] = text
    return out


Sysctls = Annotated[dict[str, str], BeforeValidator(parse_sysctls)]


@dataclass(frozen=True, slots=True)
class Security:
    """`security_opt` taken apart. `seccomp`: '' as configured, `unconfined`, or the path of a profile on the host."""

    no_new_privileges: bool = False
    seccomp: str = ""
    apparmor: str = ""
    labels: tuple[str, ...] = ()  # disable, or user: role: type: level: of an SELinux context, filetype: of its files
    unmasked: bool = False  # systempaths=unconfined


def security(options: tuple[str, ...]) -> Security:
    """ValueError for an option Docker does not know, or one given twice with different values."""
    found: dict[str, str] = {}
    labels = []
    for item in options:
        key, sign, value = item.partition(item[match.start()] if (match := re.search("[=:]", item)) else "=")
        if key == "no-new-privileges":
            if sign and value not in ("true", "false"):
                raise ValueError(f"{item}: true or false expected")
            value = value or "true"
        elif key == "label":
            if not re.fullmatch(r"disable|(user|role|type|level|filetype):\S+|nested", value):
                raise ValueError(f"{item}: disable or user:, role:, type:, level: or filetype: expected")
            labels.append(value)
            continue
        elif key == "seccomp":
            if value not in ("unconfined", "builtin") and not value.startswith("/"):
                raise ValueError(f"{item}: unconfined or the absolute path of a profile expected")
            value = "" if value == "builtin" else value
        elif key == "apparmor":
            if not re.fullmatch(r"[^\s/]\S*", value):
                raise ValueError(f"{item}: the name of a profile expected")
        elif key != "systempaths" or value != "unconfined":
            raise ValueError(
                f"unknown option {item!r} (no-new-privileges, seccomp=, apparmor=, label=, systempaths=unconfined)"
            )
        if found.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice")
    return Security(
        found.get("no-new-privileges") == "true",
        found.get("seccomp", ""),
        found.get("apparmor", ""),
        tuple(labels),
        "systempaths" in found,
    )


def _security_opts(value: tuple[str, ...]) -> tuple[str, ...]:
    security(value)
    return value


SecurityOpts = Annotated[Lines, AfterValidator(_security_opts)]


# --- memory and CPUs -------------------------------------------------------------------------------------------------


def parse_swap(value: Any) -> Any:
    """Memory and swap together, in bytes; -1 for `max` or `unlimited`; None or 0 stand for the default."""
    if value in ("max", "unlimited") or (str(value).strip() == "-1" and not isinstance(value, bool)):
        return UNLIMITED
    return parse_size(value) or None


Swap = Annotated[Annotated[int, Field(ge=-1, lt=1 << 63)] | None, BeforeValidator(parse_swap)]


def cpu_numbers(text: str) -> frozenset[int]:
    """The CPUs of a list such as 0-3,7. ValueError says what is wrong."""
    out: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high or high > MAX_CPU:
            raise ValueError(f"a list of CPUs such as 0-3,7 expected, not {text!r}")
        out.update(range(low, high + 1))
    return frozenset(out)


def parse_cpuset(value: Any) -> Any:
    """A CPU list without blanks; empty or `max` for none."""
    if value is None or value in ("", "max"):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"a list of CPUs such as 0-3,7 expected, not {value!r}")
    text = re.sub(r"\s", "", str(value))
    cpu_numbers(text)
    return text


Cpuset = Annotated[str, BeforeValidator(parse_cpuset)]


def parse_count(value: Any) -> Any:
    """A number, or `max`, -1 and 0 for no limit."""
    return None if value in ("max", "unlimited") or str(value).strip() in ("-1", "0") else value


def parse_limit(value: Any) -> Any:
    """A number, or `max` for no limit."""
    return None if value == "max" else value


def parse_namespace(value: Any) -> Any:
    """`private` is the default: the container has its own."""
    return "" if value in (None, "private") else value
