"""What the vm runtime finds on this host, for `status` and `doctor`. Floor 2, no state."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from engine import host
from engine.errors import EngineError, Unsupported
from engine.programs import advice as how_to_get
from engine.programs import find
from engine.runtimes.calls import first_line
from engine.runtimes.vm import accel
from engine.runtimes.vm.network import PATHS

Row = tuple[str, bool, str, str]  # name, ok, what was found, what to do


def possible(containers: Path) -> bool:
    """Whether it is worth trying: QEMU is installed, and the store has a kernel for guests. Cheap."""
    try:
        accel.find_qemu(accel.architecture())
        return any(os.scandir(containers.parent / "kernels"))
    except (Unsupported, OSError):
        return False


def summaries() -> dict[str, str]:
    """For `status`, the accelerators of guests as far as they are known; nothing is tried for it: `accelerator` of this
    host's architecture, `accelerator_<arch>` of others."""
    try:
        here = accel.architecture()
    except Unsupported as error:
        return {"accelerator": f"none: {error.reason.removeprefix('runtime vm: ')}"}
    others = sorted(set(accel.MACHINES.values()) - {here})
    return {"accelerator": summary(here), **{f"accelerator_{arch}": summary(arch) for arch in others}}


def summary(arch: str) -> str:
    try:
        qemu = accel.find_qemu(arch)
    except Unsupported as error:
        return f"none: {error.reason.removeprefix('runtime vm: ')}"
    choice = accel.Accelerators().known(qemu, arch) if arch == accel.architecture() else accel.emulated(arch)
    return "not tried yet" if choice is None else choice.reason


def rows(containers: Path | None = None) -> list[Row]:
    """What virtual machines need: none of it is needed for the oci runtime. Tries the accelerator, once a boot."""
    try:
        here = accel.Accelerators().here()
    except Unsupported as error:
        return [("qemu", False, error.reason.removeprefix("runtime vm: "), error.hint or "")]
    choice = here.choice
    out: list[Row] = [("qemu", True, f"{here.qemu}: {first_line([str(here.qemu), '--version'])}", "")]
    advice = "" if choice.accelerator.hardware else slow_advice()
    out.append(("accelerator", choice.accelerator.hardware, choice.reason, advice))
    mkfs = find("mkfs.ext4")
    out.append(("mkfs.ext4", mkfs is not None, mkfs or "not installed", "" if mkfs else how_to_get("e2fsprogs")))
    if host.MACOS:
        debugfs = find("debugfs")
        missing = "" if debugfs else how_to_get("e2fsprogs")
        out.append(("debugfs", debugfs is not None, debugfs or "not installed", missing))
    if host.LINUX:
        ip = shutil.which("ip", path=PATHS)
        out.append(("ip", ip is not None, ip or "not installed", "" if ip else "apt-get install iproute2"))
    out.append(_agent(accel.architecture()))
    if containers is not None:
        out.append(_runtime(containers))
    return out


def slow_advice() -> str:
    if host.MACOS:
        return "guests run all the same, many times slower: sysctl kern.hv_support says whether this Mac can do better"
    return "guests run all the same, many times slower: enable VT-x or AMD-V, or nested virtualisation of this machine"


def _agent(arch: str) -> Row:
    from engine.runtimes.vm import agentbuild, driver

    try:
        found = agentbuild.built(arch, driver.agents())
        return ("guest agent", True, str(found) if found else f"to be built by Zig {agentbuild.compiler()}", "")
    except Unsupported as error:
        return ("guest agent", False, error.reason.removeprefix("runtime vm: "), error.hint or "")


def _runtime(containers: Path) -> Row:
    from engine.runtimes.select import open_runtime

    try:
        probe = open_runtime("vm", containers).probe()
    except EngineError as error:
        return ("runtime vm", False, error.reason, error.hint or "")
    return ("runtime vm", probe.ok, probe.reason, "" if probe.ok else "see what is missing above")
