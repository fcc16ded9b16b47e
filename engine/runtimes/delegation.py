"""The cgroup an ordinary user may make groups in: found, made ready, entered. Floor 2, stateless.

Only here: which part of the cgroup v2 tree a user has been given, and how it is used. Below it (D) the engine makes

    D/dutchman/             the controllers D has are handed on to what is below
    D/dutchman/daemon       the daemon, its helper outside of the namespace, and the holder of the namespaces
    D/dutchman/<id>         containers; D/dutchman/monitors: conmon (cgroups.py)
    D/outside               what was in D itself: a group with processes cannot hand on controllers

A process may move processes only within what is its user's, so the daemon must be in D before it starts a container.
The holder lives as long as any container does, so its group says where a later daemon has to go. Where systemd manages
the tree, only groups marked as delegated are made use of, and a scope of the user's own is asked for; elsewhere
whatever the user may write to. Version 1 cannot be delegated.

Sources: kernel documentation admin-guide/cgroup-v2.rst, "Delegation", "No Internal Process Constraint"; systemd's
CGROUP_DELEGATION; org.freedesktop.systemd1(5), StartTransientUnit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NAME, DAEMON, OUTSIDE = "dutchman", "daemon", "outside"
CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")  # that limits and counters are made of
SYSTEMD = Path("/run/systemd/system")  # is there when systemd is the host's first process (sd_booted(3))
SECONDS = 5.0  # for systemd to make a scope
FILES = ("", "cgroup.procs", "cgroup.subtree_control")  # what must be writable in a group to be used
ADVICE = (
    "as root, a file /etc/systemd/system/user@.service.d/delegate.conf with the lines [Service] and "
    "Delegate=cpu cpuset io memory pids; then systemctl daemon-reload, and log in anew"
)
BY_HAND = (
    "as root: mkdir a group below /sys/fs/cgroup that has the controllers cpu, cpuset, io, memory and pids, chown it, "
    "its cgroup.procs and cgroup.subtree_control to the user, and move the user's shell into it"
)
OLD = "boot with cgroup v2 only: systemd.unified_cgroup_hierarchy=1 on the kernel's command line"


def unified() -> bool:
    """Whether the host has version 2 and nothing else."""
    return (ROOT / "cgroup.controllers").exists()


def group_of(pid: int | str = "self") -> str | None:
    """The cgroup v2 group of a process, such as /user.slice; None when it has ended, or is out of this one's sight."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = next((line[3:] for line in lines if line.startswith("0::")), None)
    return None if found is None or ".." in found.split("/") or found.endswith(" (deleted)") else found


def _place(group: str) -> Path:
    return ROOT / group.lstrip("/")


def _ours(group: str) -> bool:
    return group != "/" and all(os.access(_place(group) / name, os.W_OK) for name in FILES)


def _above(group: str) -> Iterator[str]:
    """The group and those above it, the lowest first, without the root."""
    while group not in ("/", ""):
        yield group
        group = os.path.dirname(group)


def parent() -> str | None:
    """The group this engine makes its containers' groups in; None when its process is not in one made ready."""
    if not unified() or (own := group_of()) is None or not own.endswith(f"/{NAME}/{DAEMON}"):
        return None
    above = os.path.dirname(own)
    return above if _ours(above) else None


def controllers(group: str) -> frozenset[str]:
    """Those that groups below this one have."""
    try:
        return frozenset((_place(group) / "cgroup.subtree_control").read_text().split())
    except OSError:
        return frozenset()


def _marked(group: str) -> bool:
    """Whether systemd says of a group that it leaves what is below to others."""
    try:
        return os.getxattr(_place(group), "user.delegate") == b"1"
    except OSError:
        return False


def find() -> str | None:
    """The group that is this process's user's to use (D), None when there is none."""
    own = group_of()
    if not unified() or own is None:
        return None
    ours = [group for group in _above(own) if _ours(group)]
    if SYSTEMD.exists():
        return next((group for group in ours if _marked(group) and not _manager(group)), None)
    return ours[-1] if ours else None


def _manager(group: str) -> bool:
    """Of a user's systemd itself: what is below is that one's affair."""
    return re.fullmatch(r"user@\d+\.service", os.path.basename(group)) is not None


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True


def _hand_on(group: str) -> None:
    """Let groups below have the controllers this one has; those that cannot be are left out."""
    place = _place(group)
    try:
        has = (place / "cgroup.controllers").read_text().split()
    except OSError:
        return
    for name in CONTROLLERS:
        if name in has and name not in controllers(group):
            _write(place / "cgroup.subtree_control", f"+{name}")


def make_ready(base: str) -> str:
    """Make D/dutchman/daemon in `base`: its name. OSError when that cannot be."""
    above = _place(base) / NAME
    (above / DAEMON).mkdir(parents=True, exist_ok=True)
    has = set((_place(base) / "cgroup.controllers").read_text().split())
    if not has & set(CONTROLLERS) <= controllers(base):
        aside = _place(base) / OUTSIDE
        for pid in (_place(base) / "cgroup.procs").read_text().split():
            aside.mkdir(exist_ok=True)
            _write(aside / "cgroup.procs", pid)  # it may have ended
        _hand_on(base)
    _hand_on(f"{base.rstrip('/')}/{NAME}")
    return f"{base.rstrip('/')}/{NAME}/{DAEMON}"


def _move(group: str, pid: int) -> bool:
    return _write(_place(group) / "cgroup.procs", str(pid))


def enter(holder: int | None) -> bool:
    """Move this process to where its containers can have groups: that of `holder`, the process that keeps the
    namespaces, else one that is found or asked for. False: there is none, and containers have no limits. Never raises.
    """
    if not unified():
        return False
    kept = group_of(holder) if holder is not None else None
    if kept is not None and kept.endswith(f"/{NAME}/{DAEMON}") and _ours(os.path.dirname(kept)):
        if group_of() == kept or _move(kept, os.getpid()):
            return True
        if _scope() and _move(kept, os.getpid()):
            return True
    base = find()
    if base is None and _scope():
        base = find()
    if base is None:
        return False
    try:
        group = make_ready(base)
    except OSError:
        return False
    if holder is not None:
        _move(group, holder)
    return _move(group, os.getpid())


def _scope() -> bool:
    """Ask the user's systemd for a scope of its own with this process in it, and wait until it is there."""
    program = shutil.which("busctl")
    before = group_of()
    if program is None or not SYSTEMD.exists() or "XDG_RUNTIME_DIR" not in os.environ:
        return False
    name, pid = f"{NAME}-{os.getpid()}-{time.time_ns()}.scope", str(os.getpid())
    unit = "org.freedesktop.systemd1"
    words = [program, "--user", "--quiet", "call", unit, "/org/freedesktop/systemd1", f"{unit}.Manager"]
    words += ["StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", "3"]
    words += ["Delegate", "b", "true", "CollectMode", "s", "inactive-or-failed", "PIDs", "au", "1", pid, "0"]
    try:
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    until = time.monotonic() + SECONDS
    while done.returncode == 0 and time.monotonic() < until:
        if (now := group_of()) is not None and now != before and _ours(now):
            return True
        time.sleep(0.02)  # the move is systemd's, and nothing tells of it
    return False


def lack() -> tuple[frozenset[str], str]:
    """(controllers an engine started here would have, what to do for more), without changing anything."""
    if not unified():
        return frozenset(), OLD
    base = find()
    if base is None and SYSTEMD.exists():
        base = f"/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service"  # a scope is made below
        base = base if _ours(base) else None
    try:
        has = frozenset((_place(base) / "cgroup.controllers").read_text().split()) if base is not None else frozenset()
    except OSError:
        has = frozenset()
    found = has & frozenset(CONTROLLERS)
    return found, "" if found == frozenset(CONTROLLERS) else ADVICE if SYSTEMD.exists() else BY_HAND
