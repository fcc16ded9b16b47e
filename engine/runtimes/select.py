"""Choosing a driver, and what this host can and cannot do. Floor 2, no state."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from engine import host, hostmounts, userids
from engine.errors import EngineError, InvalidArgument, Unsupported
from engine.runtimes.base import Runtime
from engine.runtimes.fake import FakeRuntime
from engine.runtimes.seccomp import PACKAGE, profile_path

NAMES = ("auto", "oci", "vm", "fake")


def open_runtime(kind: str, containers: Path) -> Runtime:
    """The driver named `kind`; `auto` is what `preferred` says. `containers` holds a directory per container id.

    InvalidArgument for an unknown name. A driver this host cannot run is returned all the same: its probe says why,
    and images can be browsed without it.
    """
    if kind == "fake":
        return FakeRuntime()
    if kind == "auto":
        kind = preferred(containers)
    if kind in ("oci", "vm"):
        if not (host.LINUX or (kind == "vm" and host.MACOS)):
            raise Unsupported(f"runtime {kind} needs a Linux host", hint="use runtime: vm on macOS, fake elsewhere")
        if kind == "vm":
            from engine.runtimes.vm.driver import VmRuntime

            return VmRuntime(containers)
        from engine.runtimes.oci import OciRuntime

        return OciRuntime(containers)
    raise InvalidArgument(f"runtime: unknown runtime {kind!r}", at=kind, hint=f"one of {', '.join(NAMES)}")


def preferred(containers: Path) -> str:
    """What `auto` means on this host: vm where a virtual machine runs at the speed of its CPU and nothing is missing,
    else oci. Without QEMU or a guest's kernel nothing is tried."""
    if not host.LINUX:
        return "vm" if host.MACOS else "oci"
    from engine.runtimes.vm import accel, report

    if not report.possible(containers):
        return "oci"
    if userids.alone():
        return "vm"  # the other needs ids that this user does not have
    try:
        works = accel.Accelerators().here().choice.accelerator.hardware and open_runtime("vm", containers).probe().ok
    except EngineError:
        return "oci"
    return "vm" if works else "oci"


def host_report(containers: Path | None = None) -> list[tuple[str, bool, str, str]]:
    """(name, ok, detail, what to install or do) for everything containers need of this host."""
    if not host.LINUX:
        if host.MACOS:
            return vm_report(containers or host.default_store() / "containers")
        return [("containers", False, f"{sys.platform}: containers need a Linux host", "use runtime: fake")]
    from engine.runtimes import rootless
    from engine.runtimes.calls import first_line
    from engine.runtimes.cgroups import Cgroups
    from engine.runtimes.oci import OciRuntime
    from engine.runtimes.spec import init_program

    rows: list[tuple[str, bool, str, str]] = []
    path = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
    for name in ("runc", "crun", "conmon"):
        binary = shutil.which(name) or shutil.which(name, path=path)
        detail = f"{binary}: {first_line([binary, '--version'])}" if binary else "not installed"
        rows.append((name, binary is not None, detail, "" if binary else f"apt-get install {name}"))
    if rootless.possible():
        ok, reason = rootless.probe_inside(host.runtime_dir())
    else:
        probe = OciRuntime(containers or host.runtime_dir() / "none").probe()
        ok, reason = probe.ok, probe.reason
    advice = "apt-get install runc conmon" + ("" if host.is_root() else "; and what is missing above, or run as root")
    rows.append(("runtime oci", ok, reason, "" if ok else advice))
    profile = profile_path()
    rows.append(
        (
            "seccomp profile",
            profile is not None,
            str(profile) if profile else "none",
            "" if profile else f"apt-get install {PACKAGE}",
        )
    )
    try:
        rows.append(("init program", True, str(init_program()), ""))
    except Unsupported as error:
        rows.append(("init program", False, "not installed; containers run without `init`", error.hint or ""))
    cgroups = Cgroups.detect()
    mounted = any(kind.startswith("cgroup") for _, kind, _ in hostmounts.mounts())
    detail = f"version {cgroups.version}, swap {'accounted' if cgroups.swap else 'not accounted'}"
    rows.append(("cgroups", mounted, detail if mounted else "not mounted", "" if mounted else "mount cgroup2"))
    known = Path("/proc/filesystems").read_text().split()
    for kind in ("overlay", "erofs"):
        present = kind in known
        detail = "in the kernel" if present else "not loaded"
        rows.append((kind, present, detail, "" if present else f"modprobe {kind}"))
    return rows + vm_report(containers)


def vm_report(containers: Path | None) -> list[tuple[str, bool, str, str]]:
    """The same for containers in virtual machines. May take a few seconds, once a boot: it tries the accelerator."""
    from engine.runtimes.vm import report

    return report.rows(containers)
