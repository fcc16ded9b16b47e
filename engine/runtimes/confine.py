"""`security_opt` for one process: its seccomp profile and AppArmor profile. Floor 2, stateless.

Only here: what of them this host can do. A profile that cannot be applied is an error (the process would be less
confined than asked for). SELinux contexts are in selinux.py.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from engine import host
from engine.config import ContainerConfig, SeccompMode
from engine.errors import InvalidArgument, Unsupported
from engine.options import Security
from engine.runtimes import seccomp

APPARMOR = Path("/sys/kernel/security/apparmor/profiles")


def seccomp_of(
    config: ContainerConfig, options: Security, capabilities: Collection[str], machine: str
) -> dict[str, Any] | None:
    """`linux.seccomp` on such a machine; None for unconfined. InvalidArgument or NotFound names the profile's file."""
    if options.seccomp == "unconfined":
        return None
    if options.seccomp:
        profile = seccomp.own_profile(Path(options.seccomp))
        if not host.LINUX:
            raise Unsupported("security_opt: seccomp profiles are compiled on Linux only", at=options.seccomp)
        return seccomp.resolve(profile, capabilities, machine, host.kernel_version())
    if config.privileged or config.seccomp is SeccompMode.UNCONFINED or not host.LINUX:
        return None
    return seccomp.default_profile(capabilities, machine)


def apparmor_of(options: Security) -> str | None:
    """The profile to run under. Unsupported without AppArmor, InvalidArgument for one that is not loaded."""
    if options.apparmor in ("", "unconfined"):
        return options.apparmor or None if APPARMOR.exists() else None
    try:
        loaded = {line.rpartition(" (")[0] for line in APPARMOR.read_text().splitlines()}
    except OSError as error:
        raise Unsupported(
            f"security_opt: apparmor={options.apparmor}: this host has no AppArmor", at=f"apparmor={options.apparmor}"
        ) from error
    if options.apparmor not in loaded:
        raise InvalidArgument(
            f"security_opt: apparmor={options.apparmor}: no such profile is loaded",
            at=f"apparmor={options.apparmor}",
            hint="apparmor_parser loads one",
        )
    return options.apparmor
