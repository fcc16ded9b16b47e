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

from engine import host, hostmounts
from engine.errors import EngineError
from engine.runtimes import delegation, rootless, unprivileged
from engine.runtimes.netavark import find
from engine.runtimes.select import host_report

LIBFUSE = (
    "/lib/*/libfuse.so.2",
    "/usr/lib/*/libfuse.so.2",
    "/lib*/libfuse.so.2",
    "/usr/lib*/libfuse.so.2",
    "/usr/local/lib/libfuse.so.2",
)
FUSE_ADVICE = "modprobe fuse; in a container, run it with --device /dev/fuse; as root: chmod 666 /dev/fuse"
MACFUSE = (
    "/usr/local/lib/libfuse.2.dylib",
    "/usr/local/lib/libfuse.dylib",
    "/usr/local/lib/libfuse-t.dylib",
    "/Library/Filesystems/macfuse.fs",
)
MAC_ADVICE = (
    "brew install --cask macfuse, or without a kernel extension: brew install macos-fuse-t/homebrew-cask/fuse-t"
)
OPTIONAL = (
    "containers",
    "crun",
    "erofs",
    "overlay",
    "seccomp profile",
    "qemu",
    "accelerator",
    "mkfs.ext4",
    "ip",
    "guest agent",
    "runtime vm",
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
        new = host.kernel_version() >= hostmounts.FILE_BACKED_EROFS
        how = "EROFS straight from files" if new else "EROFS through loop devices"
        loops = os.path.exists("/dev/loop-control")
        checks.append(Check("image mounts", new or loops, how, "modprobe loop"))
        checks.append(
            Check(
                "root",
                host.is_root(),
                f"uid {os.geteuid()}",
                "an ordinary user needs what is listed below; with root nothing of it: sudo dutchman up",
                needed=False,
            )
        )
        checks.append(_idmapped())
    return checks


def _rootless() -> list[Check]:
    """What an ordinary user needs for containers, and what the kernel keeps from one all the same."""
    if host.is_root() or not host.LINUX:
        return []
    missing = rootless.lacks()
    checks = [Check(lack.name, False, lack.reason, lack.advice, needed=False) for lack in missing]
    if rootless.alone(missing):
        found = "without subordinate ids: containers of runtime vm only, and volumes' files are all yours"
        checks.append(Check("without root", False, found, "what is listed above gives processes, too", needed=False))
    if not missing:
        ids = rootless.count()
        checks.append(Check("without root", True, f"containers in a user namespace with {ids} subordinate ids"))
    checks.append(_delegated())
    checks.append(
        Check(
            "image trees",
            False,
            "the kernel mounts images for root only: an image in use is written out as plain files beside the store's",
            "it costs room (none on btrfs and xfs, which share it) and makes the first start of an image slower",
            needed=False,
        )
    )
    checks.append(
        Check(
            "bound views",
            False,
            "rootfs/ and data/ in the mount are served by the engine, the kernel's own speed needs root",
            "everything works; walks over many files take longer",
            needed=False,
        )
    )
    if rootless.tool("slirp4netns") is None:
        checks.append(Check("slirp4netns", False, "not installed: loopback only", "apt-get install slirp4netns", False))
    if rootless.tool("fuse2fs") is None:
        found = "not installed: what a stopped virtual machine has on its disk is not shown, and it does not start"
        checks.append(Check("fuse2fs", False, found, "apt-get install fuse2fs", needed=False))
    tun = os.access("/dev/net/tun", os.R_OK | os.W_OK)
    advice = "for networks of containers, as root: modprobe tun; chmod 666 /dev/net/tun"
    checks.append(Check("/dev/net/tun", tun, "usable" if tun else "no permission, or not there", advice, needed=False))
    first = rootless.first_port()
    ports = f"from {first} on" if first else "all"
    checks.append(
        Check(
            "ports",
            first <= 80,
            f"an ordinary user may listen on ports: {ports}",
            "as root: sysctl net.ipv4.ip_unprivileged_port_start=80",
            needed=False,
        )
    )
    checks.append(_ping())
    others = "user_allow_other" in (line.strip() for line in _lines("/etc/fuse.conf"))
    checks.append(
        Check(
            "allow_other",
            others,
            "up --allow-other may let others in" if others else "the mount is closed to other users, --allow-other too",
            "only if others are to look in, as root: echo user_allow_other >> /etc/fuse.conf",
            needed=False,
        )
    )
    try:
        rootless.private_directory(host.runtime_dir())
        checks.append(Check("runtime directory", True, str(host.runtime_dir())))
    except (EngineError, OSError) as error:
        advice = getattr(error, "hint", None) or "set XDG_RUNTIME_DIR to a directory of your own"
        checks.append(Check("runtime directory", False, str(error), advice))
    return checks


def _delegated() -> Check:
    """Limits, update and pause of containers are made of cgroups."""
    has, advice = delegation.lack()
    missing = {field: controller for field, controller in sorted(unprivileged.LIMITS.items()) if controller not in has}
    version = 2 if delegation.unified() else 1
    if not missing:
        return Check("limits", True, f"cgroup v{version}: all of them; yours: {', '.join(sorted(has))}")
    if has:
        found = f"yours: {', '.join(sorted(has))}; refused: {', '.join(missing)}"
    else:
        found = "none of your own: memory, cpus, pids and other limits are refused, so is pause; stats are of processes"
    return Check("limits", False, f"cgroup v{version}: {found}", advice + "; or run the engine as root", needed=False)


def _ping() -> Check:
    """slirp4netns passes on `ping` by a socket the user may have or not (icmp(7))."""
    words = (_lines("/proc/sys/net/ipv4/ping_group_range") or [""])[0].split()
    first, last = (int(words[0]), int(words[1])) if len(words) == 2 and "".join(words).isdigit() else (1, 0)
    allowed = any(first <= group <= last for group in {os.getegid(), *os.getgroups()})
    who = f"groups {first} to {last}" if first <= last else "nobody"
    return Check(
        "ping",
        allowed,
        f"{who} may send echo requests" + ("" if allowed else ": ping out of a container gets no answer"),
        'as root: sysctl -w net.ipv4.ping_group_range="0 2147483647"',
        needed=False,
    )


def _idmapped() -> Check:
    """`idmap` of mounts; file systems that cannot are named at the start."""
    new, root = host.kernel_version() >= (5, 12), host.is_root()
    found = "idmap of mounts: with the file systems that can" if new and root else "idmap of mounts is refused"
    advice = "Linux 5.12 or newer, and root; U on a mount changes the owners themselves instead"
    return Check("idmapped mounts", new and root, found, advice, needed=False)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(64 << 10).splitlines()
    except OSError:
        return []


def _fuse() -> list[Check]:
    if host.MACOS:
        found = [path for path in MACFUSE if os.path.exists(path)]
        return [Check("macFUSE", bool(found), found[0] if found else "not installed", MAC_ADVICE)]
    libraries = sorted(path for pattern in LIBFUSE for path in glob.glob(pattern))
    advice = "apt-get install libfuse2 (Debian 13, Ubuntu 24.04 and newer: libfuse2t64)"
    checks = [Check("libfuse 2", bool(libraries), libraries[0] if libraries else "not installed", advice)]
    device = os.path.exists("/dev/fuse")
    usable = device and os.access("/dev/fuse", os.R_OK | os.W_OK)
    state = "usable" if usable else "no permission" if device else "not there"
    checks.append(Check("/dev/fuse", usable, state, FUSE_ADVICE))
    helper = shutil.which("fusermount") or shutil.which("fusermount3")
    checks.append(
        Check("fusermount", bool(helper), helper or "not installed", "apt-get install fuse3", needed=not host.is_root())
    )
    return checks


def _networks() -> list[Check]:
    """What puts containers into networks: without it they have loopback alone."""
    if not host.LINUX:
        return []
    checks = []
    for name, what in (
        ("netavark", "containers have the loopback interface only"),
        ("aardvark-dns", "containers do not find each other by name"),
        ("iptables", "no networks and no published ports"),
    ):
        found = find(name)
        advice = f"without it {what}: apt-get install {name}"
        checks.append(Check(name, found is not None, found or "not installed", advice, needed=False))
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
    mounted = hostmounts.is_mounted(place)
    return Check("mount", True, f"{place} ({'mounted' if mounted else 'not mounted'})")


def examine() -> list[Check]:
    """Every fact, in the order in which to repair them."""
    checks = [_python(), *_kernel(), *_rootless(), *_fuse(), *_networks(), _store(), _mount()]
    optional = ("accelerator",) if host.MACOS else OPTIONAL  # there is one runtime there
    for name, ok, found, advice in host_report():
        checks.append(Check(name, ok, found, advice, needed=name not in optional and not (name == "runc" and _crun())))
    return checks


def _crun() -> bool:
    return shutil.which("crun") is not None
