"""Snapshots of machines whose agent is ready: another machine starts from one instead of booting. Floor 2.

Only here: what a template is, by which name it goes, how a machine is started from it (templatemaker.py makes them).
Imported by the process that owns a machine, so it imports little.

    kernels/<name>/templates/<key>/   0700, made aside and renamed into place: what is there is whole
        ram             the guest's memory. Machines map it privately: what they do not write they share
        state           of its devices, as QEMU writes it (x-ignore-shared: without the memory)
        template.json   what it was made from, and what to check
    kernels/<name>/templates/<key>.refused   why machines did not start from it: it is not made again for a while
    kernels/<name>/templates/<key>.alone     why no machine of it could stand by (standbys.py): so for a while

The key is a digest of everything a snapshot depends on: QEMU's program and its command line but for paths and
descriptors (so memory, CPUs, devices, the kernel's command line), kernel and agent, and the host's CPU. Disks are not
in it: a template's are placeholders, larger than any, because a guest does not look again at the size of a disk.
The guest's clock, generator of random numbers, name and network are set by whoever starts it, as after a boot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import host
from engine.errors import Damaged, RuntimeFailure
from engine.runtimes.vm import qemu
from engine.runtimes.vm.client import AgentClient

FORMAT = 1
CONFIRM_SECONDS = 15.0  # for the agent of a restored guest to answer, on a busy host
SAME = ("version", "build", "arch", "kernel")  # words of HELLO that a restored guest says again
REFUSED_SECONDS = 3600.0  # for which a template that did not work is not made again
MAX_TEXT = 1 << 20
REFUSED, ALONE = ".refused", ".alone"
RAM, STATE, ABOUT = "ram", "state", "template.json"
MAKING = ".making-"  # what the directory of an unfinished one is called


@dataclass(frozen=True, slots=True)
class Template:
    place: Path
    hello: bytes  # the agent's, as it was said
    tsc_khz: int
    state: int  # descriptor

    @property
    def ram(self) -> Path:
        return self.place / RAM


# --- names ------------------------------------------------------------------------------------------------------------


def wanted(machine: Mapping[str, Any], taps: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Which template a machine (values of qemu.Machine) could start from: its key and what that stands for.

    `about`: what else counts – kernel, agent, QEMU's version.
    """
    plain = dict(machine) | {"kernel": "kernel", "initfs": "initfs", "image": "", "upper": "", "tsc_khz": 0}
    layout = qemu.Machine(
        **plain, agent=0, console=0, watch=0, taps=(0,) * taps, share="shares", ram="ram", making=True
    )
    facts = {"format": FORMAT, "argv": qemu.command(layout), "qemu": program(machine["qemu"]), "host": host_facts()}
    facts |= about
    facts = json.loads(json.dumps(facts))  # as it will be read
    import hashlib  # takes a while, and is for the daemon

    key = hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
    return {"key": key, "facts": facts}


def program(path: str) -> list[Any]:
    try:
        found = os.stat(path)
    except OSError:
        return [path, 0, 0]
    return [path, found.st_size, found.st_mtime_ns]


def host_facts() -> list[str]:
    """What a snapshot depends on of the host's CPU, and of its kernel, which shows the CPU to guests."""
    import platform

    facts = [platform.machine(), platform.system(), platform.release()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name = line.partition(":")[0].strip()
            if name in ("vendor_id", "model name", "stepping", "microcode", "flags", "Features", "CPU part"):
                facts.append(line.strip())
            if not name:
                break  # the others are alike
    return facts


# --- starting from one ------------------------------------------------------------------------------------------------


@contextmanager
def found(directory: Path, wish: Mapping[str, Any]) -> Iterator[Template | None]:
    """The template asked for, kept from being removed meanwhile; None when there is none. Damaged when it is not what
    it should be."""
    place = directory / wish["key"]
    try:
        about = os.open(place / ABOUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(place):
            raise Damaged(f"{ABOUT} is missing", at=str(place)) from None
        yield None
        return
    state = -1
    try:
        fcntl.flock(about, fcntl.LOCK_SH | fcntl.LOCK_NB)  # goes with the descriptor
        try:
            state = os.open(place / STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            known = _check(place, about, state, wish)
        except FileNotFoundError as error:
            raise Damaged(f"{os.path.basename(error.filename)} is missing", at=str(place)) from error
        yield Template(place, bytes.fromhex(known["hello"]), int(known["tsc_khz"]), state)
    except BlockingIOError:  # it is being removed
        yield None
    finally:
        os.close(about)
        if state >= 0:
            os.close(state)


def _check(place: Path, about: int, state: int, wish: Mapping[str, Any]) -> dict[str, Any]:
    """What template.json says. Damaged."""
    try:
        known: dict[str, Any] = json.loads(os.pread(about, MAX_TEXT, 0))
        sizes = {name: (int(known[name]["size"]), int(known[name]["mtime_ns"])) for name in (RAM, STATE)}
        same = known["facts"] == wish["facts"]
        checksum = int(known[STATE]["crc32"])
        bytes.fromhex(known["hello"])
        int(known["tsc_khz"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{ABOUT} is damaged: {error}", at=str(place)) from error
    if not same:
        raise Damaged("it was made from something else than its name says", at=str(place))
    for path in (place, place / RAM, place / STATE, place / ABOUT):
        there = os.lstat(path)
        if there.st_uid != os.geteuid() or there.st_mode & 0o077:
            raise Damaged(f"{path.name} is not this user's alone", at=str(place))
        expected = sizes.get(path.name)
        if expected is not None and expected != (there.st_size, there.st_mtime_ns):
            raise Damaged(f"{path.name} was changed", at=str(place))
    if zlib.crc32(os.pread(state, sizes[STATE][0], 0)) != checksum:  # against accidents
        raise Damaged(f"{STATE} is damaged", at=str(place))
    return known


def load(template: Template) -> bytes:
    """What to tell QEMU at its monitor: take the state; when it is there, the guest runs."""
    lines: list[dict[str, Any]] = [
        ignore_shared(),
        {"execute": "migrate-incoming", "arguments": {"uri": f"fd:{template.state}"}},
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def ignore_shared() -> dict[str, Any]:
    """The memory is in a file already: it is not written out, nor read."""
    capabilities = [{"capability": "x-ignore-shared", "state": True}]
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": capabilities}}


def confirm(link: AgentClient) -> None:
    """The guest answers, and is the one that was saved. RuntimeFailure, DeadlineExceeded, Unreachable."""
    before = link.greet(CONFIRM_SECONDS)
    now = link.call("HELLO", deadline=CONFIRM_SECONDS)
    for word in SAME:
        if now.text(word) != before.text(word):
            raise RuntimeFailure(f"the guest says {word} {now.text(word)!r}, and was saved as {before.text(word)!r}")


def used(template: Template) -> None:
    """It is the one used last: others are removed before it."""
    with contextlib.suppress(OSError):
        os.utime(template.place / ABOUT)


# --- those that do not work -------------------------------------------------------------------------------------------


def discard(directory: Path, key: str) -> None:
    """Remove it at once for all who look for it, then its files. Machines that run from it keep them."""
    aside = directory / f".gone-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.suppress(FileNotFoundError):
        (directory / key).rename(aside)
        host.remove_tree(aside)


def refuse(directory: Path, key: str, why: str) -> None:
    """It was whole, and no machine started from it."""
    discard(directory, key)
    host.write_atomic(directory / f"{key}{REFUSED}", f"{why}\n".encode(), 0o600)


def refused(directory: Path, key: str, suffix: str = REFUSED, seconds: float = REFUSED_SECONDS) -> str:
    """Why it is not to be made for now; empty when it may be."""
    path = directory / f"{key}{suffix}"
    try:
        if time.time() - path.stat().st_mtime > seconds:
            path.unlink()
            return ""
        return path.read_text(errors="replace")[:1000].strip()
    except FileNotFoundError:
        return ""


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    key: str
    place: Path
    bytes: int  # on disk
    used_ns: int
    facts: Mapping[str, Any]
    shape: tuple[int, int, int] = (0, 0, 0)  # MiB of memory, CPUs, networks


def places(kernels: Path) -> list[Path]:
    """Where those of each kernel are. `default` is another name of one of them."""
    found = sorted(kernels.glob("*/templates"))
    return [path for path in found if not path.parent.is_symlink() and not path.parent.name.startswith(".")]


def kept(directory: Path) -> list[Kept]:
    """The templates of a kernel, that used last first; what cannot be read is left out."""
    out = []
    for place in directory.glob("[0-9a-f]*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = place / ABOUT
            known = json.loads(about.read_bytes())
            shape = (int(known["memory"]), int(known["cpus"]), int(known["taps"]))
            size = sum(file.stat().st_blocks * 512 for file in place.iterdir())
            out.append(Kept(place.name, place, size, about.stat().st_mtime_ns, known["facts"], shape))
    return sorted(out, key=lambda item: -item.used_ns)


def shape(memory: int, cpus: int, taps: int) -> str:
    return f"memory={memory}M cpus={cpus} networks={taps}"


def listing(directory: Path) -> list[str]:
    """A line for each template of a kernel, and for each that did not work."""
    lines = []
    for item in kept(directory):
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(item.used_ns // 10**9))
        lines.append(f"{item.key} {shape(*item.shape)} bytes={item.bytes} used={when}")
    for path in sorted(directory.glob(f"*{REFUSED}")):
        with contextlib.suppress(FileNotFoundError):
            lines.append(f"{path.stem} refused: {' '.join(path.read_text(errors='replace').split())[:500]}")
    return lines


def forget(directory: Path) -> None:
    """Remove them all, and what is known of those that did not work."""
    for item in kept(directory):
        discard(directory, item.key)
    for suffix in (REFUSED, ALONE):
        for path in directory.glob(f"*{suffix}"):
            path.unlink(missing_ok=True)
