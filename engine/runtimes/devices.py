"""Device nodes and the cgroup rules that open them. Floor 2, stateless.

Only here: how paths on the host become `linux.devices` and `linux.resources.devices` of the runtime-spec
(config-linux.md#devices, #allowed-device-list). A directory stands for every device below it, as in Docker.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from engine import host
from engine.config import ContainerConfig
from engine.errors import InvalidArgument, NotFound, Unsupported
from engine.options import Device, device, device_rule

MAX_DEVICES = 4096


def _node(path: str, info: os.stat_result) -> dict[str, Any] | None:
    """`linux.devices` entry of a stat result; None when it is no device."""
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else None
    if kind is None:
        return None
    return {
        "path": path,
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
    }


def _below(directory: str, target: str) -> Iterator[dict[str, Any]]:
    for base, directories, names in os.walk(directory):
        if base == "/dev":
            directories[:] = [name for name in directories if name not in ("pts", "shm", "fd", "mqueue", ".udev")]
        for name in sorted(names):
            path = os.path.join(base, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue  # went away meanwhile
            node = _node(target + path.removeprefix(directory), info)
            if node is not None and path != "/dev/console":
                yield node


def of_host() -> list[dict[str, Any]]:
    """Every device node below /dev, for privileged containers (moby HostDevices skips the same)."""
    return [node for node, _ in zip(_below("/dev", "/dev"), range(MAX_DEVICES), strict=False)]


def _named(wanted: Device) -> list[dict[str, Any]]:
    if not host.LINUX:
        raise Unsupported("devices: those of this host mean nothing to Linux", at=wanted.source)
    try:
        info = os.stat(wanted.source)
    except FileNotFoundError as error:
        raise NotFound(f"devices: {wanted.source} does not exist", at=wanted.source) from error
    except OSError as error:
        raise InvalidArgument(f"devices: {wanted.source}: {error.strerror}", at=wanted.source) from error
    if stat.S_ISDIR(info.st_mode):
        source, target = wanted.source.rstrip("/"), wanted.target.rstrip("/")
        nodes = [node for node, _ in zip(_below(source, target), range(MAX_DEVICES), strict=False)]
        if not nodes:
            raise InvalidArgument(f"devices: there is no device below {wanted.source}", at=wanted.source)
        return nodes
    node = _node(wanted.target, info)
    if node is None:
        raise InvalidArgument(f"devices: {wanted.source} is not a device", at=wanted.source)
    return [node]


def of(config: ContainerConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(nodes to make, rules to add) for `devices` and `device_cgroup_rules`. The error names the path on the host."""
    nodes: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = []
    for text in config.devices:
        wanted = device(text)
        for node in _named(wanted):
            nodes.append(node)
            rule = {"type": node["type"], "major": node["major"], "minor": node["minor"], "access": wanted.access}
            rules.append({"allow": True, **rule})
    for text in config.device_cgroup_rules:
        kind, major, minor, access = device_rule(text)
        found: dict[str, Any] = {"allow": True, "type": kind, "access": access}
        found.update({key: number for key, number in (("major", major), ("minor", minor)) if number is not None})
        rules.append(found)
    return nodes, rules
