"""What this host can and cannot do, and what to install. Floor 3.

Only here: which facts are needed and which only make things better. Facts come from engine.host and the runtimes; a
check never raises and never changes anything. Stateless.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from dataclasses import dataclass

from engine import host
from engine.runtimes.select import host_report

LIBFUSE = (
    "/lib/*/libfuse.so.2",
    "/usr/lib/*/libfuse.so.2",
    "/lib*/libfuse.so.2",
    "/usr/lib*/libfuse.so.2",
    "/usr/local/lib/libfuse.so.2",
)
MACFUSE = ("/usr/local/lib/libfuse.2.dylib", "/usr/local/lib/libfuse.dylib", "/Library/Filesystems/macfuse.fs")
OPTIONAL = (
    "containers",
    "crun",
    "erofs",
    "overlay",
    "seccomp profile",
)  # of the runtimes' facts: one runtime is enough


@dataclass(frozen=True, slots=True)
class Check:
    """One fact: what was found, whether the engine is limited without it, and what to do then."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    needed: bool = True


def _python() -> Check:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    return Check("python", sys.version_info >= (3, 11), found, "Python 3.11 or newer is needed")


def _kernel() -> list[Check]:
    system = os.uname()
    checks = [Check("system", host.LINUX or host.MACOS, f"{system.sysname} {system.release} {system.machine}")]
    if host.LINUX:
        new = host.kernel_version() >= host.FILE_BACKED_EROFS
        how = "EROFS straight from files" if new else "EROFS through loop devices"
        loops = os.path.exists("/dev/loop-control")
        checks.append(Check("image mounts", new or loops, how, "modprobe loop"))
        checks.append(
            Check(
                "root",
                host.is_root(),
                f"uid {os.geteuid()}",
                "without root images can be browsed, but containers need it: sudo dutchman up",
                needed=False,
            )
        )
    return checks


def _fuse() -> list[Check]:
    if host.MACOS:
        found = [path for path in MACFUSE if os.path.exists(path)]
        return [Check("macFUSE", bool(found), found[0] if found else "not installed", "install macFUSE")]
    libraries = sorted(path for pattern in LIBFUSE for path in glob.glob(pattern))
    advice = "apt-get install libfuse2 (Debian 13, Ubuntu 24.04 and newer: libfuse2t64)"
    checks = [Check("libfuse 2", bool(libraries), libraries[0] if libraries else "not installed", advice)]
    device = os.path.exists("/dev/fuse")
    usable = device and os.access("/dev/fuse", os.R_OK | os.W_OK)
    state = "usable" if usable else "no permission" if device else "not there"
    checks.append(Check("/dev/fuse", usable, state, "modprobe fuse; in a container, run it with --device /dev/fuse"))
    helper = shutil.which("fusermount") or shutil.which("fusermount3")
    checks.append(
        Check("fusermount", bool(helper), helper or "not installed", "apt-get install fuse3", needed=not host.is_root())
    )
    return checks


def _store() -> Check:
    """Room where the store is, or will be."""
    place = host.default_store()
    here = place
    while not here.exists() and here != here.parent:
        here = here.parent
    try:
        free = shutil.disk_usage(here).free
    except OSError as error:
        return Check("store", False, f"{place}: {error.strerror}", "choose another place with --store")
    writable = os.access(here, os.W_OK)
    found = f"{place}, {free / 1e9:.1f} GB free" + ("" if writable else ", not writable")
    return Check("store", writable and free > 100_000_000, found, "choose another place with --store, or make room")


def _mount() -> Check:
    place = host.default_mount()
    mounted = host.is_mounted(place)
    return Check("mount", True, f"{place} ({'mounted' if mounted else 'not mounted'})")


def examine() -> list[Check]:
    """Every fact, in the order in which to repair them."""
    checks = [_python(), *_kernel(), *_fuse(), _store(), _mount()]
    for name, ok, found, advice in host_report():
        checks.append(Check(name, ok, found, advice, needed=name not in OPTIONAL and not (name == "runc" and _crun())))
    return checks


def _crun() -> bool:
    return shutil.which("crun") is not None
