"""The whole spec of a container as a frozen model: `config.yaml`, and one file per field under `config/`.

Floor 0. Only here: which fields there are, what they accept and their defaults. How a field reads as a file is in
fields.py; what it does to a run is in runtimes/spec.py and beside the part it configures.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from engine.errors import InvalidArgument
from engine.model import Argv, Frozen, Mapping, Seconds, Size, Text, load_yaml, one_line
from engine.mountspec import MountKind as MountKind
from engine.mountspec import MountSpec, VolumesFrom, parse_mounts
from engine.netconfig import HOST, NONE, Addresses, ExtraHosts, Networks, Ports, Words
from engine.options import (
    Cpuset,
    DeviceRules,
    Devices,
    Lines,
    SecurityOpts,
    Swap,
    Sysctls,
    Tmpfs,
    Ulimits,
    parse_count,
    parse_limit,
    parse_namespace,
)
from engine.upkeep import HealthSpec, Restart


class SeccompMode(StrEnum):
    DEFAULT = "default"
    UNCONFINED = "unconfined"


class VmTransport(StrEnum):
    AUTO = "auto"
    SERIAL = "serial"
    HYBRID = "hybrid"
    VSOCK = "vsock"


class Namespace(StrEnum):
    PRIVATE = ""
    HOST = "host"


NamespaceMode = Annotated[Namespace, BeforeValidator(parse_namespace)]


def _disk_size(size: int | None) -> int:
    if size is None:
        return 16 << 30
    if not 64 << 20 <= size <= 1 << 44:
        raise ValueError("from 64m to 16t")
    return size


DiskSize = Annotated[Size, AfterValidator(_disk_size)]


class ContainerConfig(Frozen):
    """Unset fields (None, empty) take the image's value where the image has one, Docker's default otherwise."""

    # what runs
    image: Text = ""
    platform: Text = Field("", description="os/architecture[/variant] of the image; empty: what its name stands for")
    command: Argv = Field(None, description="arguments; replaces the image's CMD")
    entrypoint: Argv = Field(None, description="replaces the image's ENTRYPOINT (and drops its CMD)")
    env: Mapping = Field(default_factory=dict, description="KEY=VALUE lines, added to the image's")
    env_file: Lines = Field((), description="files on the host with KEY=VALUE lines, read at each start; env wins")
    workdir: str | None = None
    user: Text | None = Field(None, description="user[:group], names or numbers")
    group_add: Lines = Field((), description="further groups of its process, names or numbers")
    init: bool = Field(False, description="process 1 is a small init that reaps zombies and passes signals on")
    hostname: Text | None = Field(None, description="default: 12 digits of the id; the host's with networks: host")
    domainname: Text | None = None
    labels: Mapping = Field(default_factory=dict)
    # how it stops, whether it is well, when it starts again
    stop_signal: Text | None = Field(None, description="default: the image's, else SIGTERM")
    stop_grace_period: Seconds = Field(10.0, description="seconds between the stop signal and SIGKILL")
    restart: Restart = Field("no", description="no, on-failure[:n], always or unless-stopped")
    healthcheck: HealthSpec | None = Field(None, description="test, interval, timeout…; default: the image's")
    # its terminal and root filesystem
    tty: bool = False
    stdin: bool = Field(False, description="keep its standard input open")
    read_only: bool = Field(False, description="mount the root filesystem read-only")
    # limits
    memory: Size = Field(None, description="limit in bytes; max for none")
    memory_swap: Swap = Field(None, description="memory and swap in bytes; max for no limit; default: twice memory")
    memory_reservation: Size = Field(None, description="bytes kept for it when memory is short")
    cpus: Annotated[Annotated[float, Field(gt=0, le=4096)] | None, BeforeValidator(parse_limit)] = None
    cpu_shares: Annotated[int, Field(ge=2, le=262144)] | None = Field(None, description="weight; default: 1024")
    cpuset: Cpuset = Field("", description="the CPUs it may run on, such as 0-3,7")
    pids: Annotated[Annotated[int, Field(gt=0, lt=1 << 63)] | None, BeforeValidator(parse_count)] = None
    ulimits: Ulimits = Field(default_factory=dict, description="NAME=SOFT[:HARD] lines; -1 for no limit")
    shm_size: Size = Field(64 << 20, description="bytes of /dev/shm")
    oom_score_adj: Annotated[int, Field(ge=-1000, le=1000)] = 0
    # security
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    seccomp: SeccompMode = SeccompMode.DEFAULT
    security_opt: SecurityOpts = Field((), description="no-new-privileges, seccomp=, apparmor=, label=, systempaths=")
    sysctls: Sysctls = Field(default_factory=dict, description="NAME=VALUE lines; namespaced ones only")
    devices: Devices = Field((), description="HOST[:CONTAINER[:rwm]] lines")
    device_cgroup_rules: DeviceRules = Field((), description="lines such as: c 1:3 mr")
    pid: NamespaceMode = Field(Namespace.PRIVATE, description="host: it sees the host's processes")
    ipc: NamespaceMode = Field(Namespace.PRIVATE, description="host: it shares the host's memory segments and queues")
    uts: NamespaceMode = Field(Namespace.PRIVATE, description="host: it has the host's name")
    # storage
    disk_size: DiskSize = Field(16 << 30, description="of what it changes in a virtual machine; grows at a start only")
    tmpfs: Tmpfs = Field((), description="PATH[:OPTION,…] lines: size=, mode=, uid=, gid=, exec, …")
    volumes: Annotated[tuple[MountSpec, ...], BeforeValidator(parse_mounts)] = ()
    volumes_from: VolumesFrom = Field((), description="containers whose mounts it gets too: NAME[:ro|rw]")
    # network
    networks: Networks = Field(
        default_factory=dict, description="names, or name: {aliases, ipv4_address, …}; host, none; empty: the default"
    )
    ports: Ports = Field((), description="[HOSTIP:][HOST[-LAST]:]CONTAINER[-LAST][/tcp|udp|sctp]")
    dns: Addresses = Field((), description="resolvers instead of the host's")
    dns_search: Words = ()
    dns_options: Words = ()
    extra_hosts: ExtraHosts = Field((), description="NAME:ADDRESS, NAME:host-gateway")
    # driver and logs
    kernel: Text = Field("", description="of its virtual machine: a name in kernels/; empty: the default one")
    fast_start: bool = Field(True, description="its virtual machine may start from a snapshot (kernels/), not boot")
    vm_transport: VmTransport = Field(
        VmTransport.AUTO, description="to its virtual machine: serial (auto), hybrid (vhost-device-vsock) or vsock"
    )
    runtime: Text = Field("", description="oci, vm or fake; empty: the engine's default")
    log_max_size: Size = Field(16 << 20, description="bytes of a log segment before it is rotated")
    log_max_total: Size = Field(1 << 30, description="bytes of all its log segments on disk; the oldest are dropped")
    log_max_age: Seconds = Field(86400.0, description="seconds before a log segment is rotated")

    @field_validator("workdir")
    @classmethod
    def _workdir(cls, value: str | None) -> str | None:
        if value and not value.startswith("/"):
            raise ValueError("must be an absolute path")
        return value or None

    @field_validator("env", "labels")
    @classmethod
    def _no_nul(cls, value: dict[str, str]) -> dict[str, str]:
        for key, item in value.items():
            if "\0" in key or "\0" in item or "=" in key or not key:
                raise ValueError(f"bad key {key!r}")
        return value

    @model_validator(mode="after")
    def _published(self) -> ContainerConfig:
        for name in (HOST, NONE):
            if self.ports and name in self.networks:
                raise ValueError(f"ports: none can be published with networks: {name}")
        return self

    @model_validator(mode="after")
    def _plain_texts(self) -> ContainerConfig:
        """What can neither be stored nor handed to a process or the kernel is refused where it is written."""
        for name, value in self.model_dump().items():
            for text in _texts(value):
                if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
                    raise ValueError(f"{name}: contains a NUL or half a surrogate pair")
        return self


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def parse_config(text: str | bytes) -> ContainerConfig:
    """A config.yaml, validated whole. EINVAL names the line or the field; E2BIG above 1 MiB."""
    data = load_yaml(text, "config.yaml")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidArgument("config.yaml: a mapping of fields expected")
    try:
        return ContainerConfig.model_validate(data)
    except ValidationError as error:
        raise one_line(error, "config.yaml") from error
