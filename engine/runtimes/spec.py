"""The OCI runtime config.json of a run, with Docker's defaults.

Floor 2. Only here: capabilities, masked and read-only paths, default mounts, namespaces, and how the parts (devices.py,
resources.py, confine.py, users.py) come together. Source of the format:
runtime-spec 1.0.2 config.md and config-linux.md; of the defaults: moby oci/defaults.go, oci/caps. `build` is pure but
for reading the root filesystem's passwd and group; `prepare` writes the files that are bind-mounted. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine import host, userids
from engine.config import ContainerConfig, MountKind, Namespace
from engine.errors import InvalidArgument, Unsupported
from engine.mountspec import Propagation
from engine.options import rlimits, security, sysctl_namespace, tmpfs
from engine.runtimes import confine, devices, foreign
from engine.runtimes.base import RunSpec
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.netfiles import NetworkMode, hosts_text, resolv_text
from engine.runtimes.resources import Resources
from engine.runtimes.selinux import label_file
from engine.runtimes.unprivileged import adapt
from engine.runtimes.users import identify, make_directory, with_extra_groups

OCI_VERSION = "1.0.2"
INIT_PROGRAMS = tuple(  # statically linked, taking `-- ARGV…`, in order of preference
    Path("/usr") / name for name in ("bin/docker-init", "bin/tini-static", "bin/catatonit", "libexec/podman/catatonit")
)
INIT_PACKAGE = "tini"  # of Debian and Ubuntu
INIT = "/dev/init"  # in the container, where Podman has it: the file it is mounted on is in a tmpfs
PROPAGATIONS = frozenset(Propagation)

CAPABILITIES = tuple(  # linux/capability.h, in bit order
    "CAP_" + name
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)
DEFAULT_CAPABILITIES = tuple(
    "CAP_" + name
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
)
MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def known_capabilities() -> tuple[str, ...]:
    """Those this process may give: the kernel knows them, and they are in its own bounding set (proc(5) CapBnd)."""
    try:
        status = Path("/proc/self/status").read_text()
        bounding = int(status.partition("CapBnd:")[2].split()[0], 16)
    except (OSError, ValueError, IndexError):
        return CAPABILITIES
    return tuple(name for bit, name in enumerate(CAPABILITIES) if bounding >> bit & 1)


def capabilities(config: ContainerConfig) -> list[str]:
    """The bounding set: Docker's fourteen, minus cap_drop, plus cap_add; ALL in either means all. EINVAL if unknown."""

    def named(names: Iterable[str], field: str) -> list[str]:
        out = []
        for name in names:
            full = name.upper() if name.upper().startswith("CAP_") else "CAP_" + name.upper()
            if full != "CAP_ALL" and full not in CAPABILITIES:
                raise InvalidArgument(f"{field}: unknown capability {name!r}", at=name[:80])
            out.append(full)
        return out

    add, drop, known = named(config.cap_add, "cap_add"), named(config.cap_drop, "cap_drop"), known_capabilities()
    for name in add:
        if name not in known and name != "CAP_ALL":
            raise Unsupported(f"cap_add: this host does not grant {name}", at=name)
    if config.privileged:
        return list(known)
    if "CAP_ALL" in add:
        chosen = [cap for cap in known if cap not in drop]
    elif "CAP_ALL" in drop:
        chosen = [cap for cap in known if cap in add]
    else:
        chosen = [cap for cap in known if (cap in DEFAULT_CAPABILITIES and cap not in drop) or cap in add]
    return chosen


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _mounts(spec: RunSpec) -> list[dict[str, Any]]:
    config = spec.config
    own = {mount.target for mount in spec.mounts} | {tmpfs(item)[0] for item in config.tmpfs}
    access = "rw" if config.privileged else "ro"
    shm = () if config.shm_size is None else (f"size={config.shm_size}",)
    defaults = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", access),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", access, "nosuid", "noexec", "nodev"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", *shm),
    ]
    if config.ipc is Namespace.HOST:
        defaults[-2:] = [_mount(path, "bind", path, "rbind", "rprivate", "rw") for path in ("/dev/mqueue", "/dev/shm")]
    files = [
        _mount("/etc/" + name, "bind", str(spec.directory / name), "rbind", "rprivate", "rw")
        for name in ("resolv.conf", "hostname", "hosts")
    ]
    mounts = [mount for mount in (*defaults, *files) if mount["destination"] not in own]
    for path, options in map(tmpfs, config.tmpfs):
        mounts.append(_mount(path, "tmpfs", "tmpfs", "nosuid", "nodev", "noexec", *options))  # later options win
    if config.init:
        mounts.append(_mount(INIT, "bind", str(init_program()), "bind", "rprivate", "ro", "nosuid", "nodev"))
    for mount in spec.mounts:
        access = "ro" if mount.read_only else "rw"
        if mount.kind is MountKind.TMPFS:
            options = ("nosuid", "nodev", "noexec", access, *mount.options)
            mounts.append(_mount(mount.target, "tmpfs", "tmpfs", *options))
        else:
            if mount.source is None:
                raise InvalidArgument(f"volumes: {mount.target}: a {mount.kind} mount needs a source", at=mount.target)
            spread = () if PROPAGATIONS.intersection(mount.options) else ("rprivate",)
            mounts.append(_mount(mount.target, "bind", str(mount.source), "rbind", *spread, access, *mount.options))
    return sorted(mounts, key=lambda item: str(item["destination"]).count("/"))  # a parent before what lies in it


def init_program() -> Path:
    """The program that is process 1 with `init`. Unsupported when none is installed."""
    if not host.LINUX:
        raise Unsupported(
            "init: this host has no program of Linux", at="init", hint="take an image that has one, as tini"
        )
    for path in INIT_PROGRAMS:
        if path.is_file():
            return path
    raise Unsupported("init: no init program is installed", at="init", hint=f"apt-get install {INIT_PACKAGE}")


def _device_rules(config: ContainerConfig, more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": config.privileged, "access": "rwm"}]
    if not config.privileged:  # device nodes may be made (CAP_MKNOD), not opened; runc itself allows null, zero, tty …
        rules += [{"allow": True, "type": kind, "access": "m"} for kind in "bc"]
    return rules + more


def _sysctls(config: ContainerConfig, namespaces: Iterable[str]) -> dict[str, str]:
    """InvalidArgument for one whose namespace is the host's."""
    values = dict(config.sysctls)
    if config.domainname:
        values.setdefault("kernel.domainname", config.domainname)  # the runtimes of runtime-spec 1.0 know no better
    for name in values:
        kind = sysctl_namespace(name)
        if kind not in namespaces:
            field = "domainname" if name not in config.sysctls else "sysctls"
            raise InvalidArgument(f"{field}: {name} would change the host: {kind} is host", at=name)
    return values


def build(spec: RunSpec, cgroups: Cgroups, *, guest: bool = False) -> dict[str, Any]:
    """config.json as a mapping, of a process on this host or in a guest, which has cgroups whoever runs the engine.

    InvalidArgument names the field that cannot be; Unsupported what is not installed.
    """
    config = spec.config
    if not guest:
        foreign.check(spec.image)
    who = identify(spec.rootfs, spec.user)
    caps = capabilities(config)
    environment = list(spec.env)
    if not any(item.startswith("HOME=") for item in environment):
        environment.append(f"HOME={who.home}")
    user: dict[str, Any] = {"uid": who.uid, "gid": who.gid}
    if groups := with_extra_groups(spec.rootfs, who, config.group_add):
        user["additionalGids"] = groups
    shared = {kind for kind in ("pid", "ipc", "uts") if getattr(config, kind) is Namespace.HOST}
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount") if kind not in shared]
    if spec.network.mode is not NetworkMode.HOST:
        joined = {} if spec.network.path is None else {"path": str(spec.network.path)}
        namespaces.append({"type": "network", **joined})
    if cgroups.version == 2:
        namespaces.append({"type": "cgroup"})
    options = security(config.security_opt)
    bare = config.privileged or options.unmasked
    nodes, rules = devices.of(config)
    linux: dict[str, Any] = {
        "cgroupsPath": f"{cgroups.parent or ''}/{spec.id}",
        "namespaces": namespaces,
        "resources": {
            "devices": _device_rules(config, rules),
            **Resources.of(config).oci(swap=cgroups.swap),
        },
        "maskedPaths": [] if bare else list(MASKED_PATHS),
        "readonlyPaths": [] if bare else list(READONLY_PATHS),
    }
    if config.privileged and host.LINUX:
        own = {node["path"] for node in nodes}
        nodes += [node for node in devices.of_host() if node["path"] not in own]
    if nodes:
        linux["devices"] = nodes
    if sysctls := _sysctls(config, [item["type"] for item in namespaces]):
        linux["sysctl"] = sysctls
    if (profile := confine.seccomp_of(config, options, caps, foreign.machine_of(spec.image))) is not None:
        linux["seccomp"] = profile
    process: dict[str, Any] = {}
    if config.ulimits:
        limits = rlimits(config.ulimits)
        process["rlimits"] = [{"type": kind, "soft": soft, "hard": hard} for kind, soft, hard in limits]
    if (apparmor := confine.apparmor_of(options)) is not None:
        process["apparmorProfile"] = apparmor
    if spec.labels.process and not guest:
        process["selinuxLabel"] = spec.labels.process
    if spec.labels.private and not guest:
        linux["mountLabel"] = spec.labels.private
    argv = [INIT, "--", *spec.argv] if config.init else list(spec.argv)
    asked = {option for mount in spec.mounts for option in mount.options}
    if asked & {"shared", "rshared"}:  # the runtime makes all mounts slaves unless told (moby oci_linux.go WithMounts)
        linux["rootfsPropagation"] = "shared"
    elif asked & {"slave", "rslave"}:
        linux["rootfsPropagation"] = "rslave"
    document: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": config.tty,
            "user": user,
            "args": argv,
            "env": environment,
            "cwd": spec.cwd,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": options.no_new_privileges,
            "oomScoreAdj": config.oom_score_adj,
            **process,
        },
        "root": {"path": str(spec.rootfs), "readonly": config.read_only},
        **({"hostname": spec.hostname} if config.uts is not Namespace.HOST else {}),
        "mounts": _mounts(spec),
        "linux": linux,
    }
    if userids.rootless() is not None and not guest:
        adapt(config, document, cgroups)
    return document


def prepare(spec: RunSpec, *, guest: bool = False) -> None:
    """Write what the mounts name: hostname, hosts, resolv.conf in `spec.directory`; create the working directory (a
    guest does that by itself)."""
    hosts = hosts_text(spec.network, spec.hostname, spec.config)
    resolv = resolv_text(spec.network, spec.config)
    hostname = spec.hostname.encode() + b"\n"
    for name, data in (("hostname", hostname), ("hosts", hosts.encode()), ("resolv.conf", resolv.encode())):
        path = spec.directory / name
        path.write_bytes(data)
        path.chmod(0o644)
        if spec.labels.private:
            label_file(path, spec.labels.private)
    if not guest and spec.cwd != "/" and not any(_within(spec.cwd, mount.target) for mount in spec.mounts):
        make_directory(spec.rootfs, spec.cwd)


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
