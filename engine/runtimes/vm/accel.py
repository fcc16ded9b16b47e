"""Which accelerator QEMU can use here: found out by running guest code. Floor 2.

Only here: the probe and its memory. That /dev/kvm opens proves nothing: a para-virtual one runs guest code a thousand
times slower than its CPU, or has QEMU abort. So QEMU is started, in a child with a time limit, with a guest of a few
instructions: a loop of LOOPS turns, then the machine is told to end with a status only that guest would give.

What was found counts for this boot and this QEMU, and is kept in `accelerator.json` of host.runtime_dir(), so that only
the first VM of a boot pays for it. `refuse` takes back what looked good and failed with a real guest. Thread-safe.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from engine import host
from engine.errors import Unsupported
from engine.programs import find
from engine.runtimes import pids

log = logging.getLogger(__name__)

LIMIT = 3.0  # seconds for the probing guest; natively it takes about 10 ms
LOOPS = 0x0131 << 16  # turns of its loop
STATUS = 0x15  # what it writes to the exit device; QEMU ends with twice this and one more
KEPT = 16  # programs of QEMU that are remembered
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class Accelerator(StrEnum):
    KVM = "kvm"
    HVF = "hvf"
    TCG = "tcg"

    @property
    def hardware(self) -> bool:
        return self is not Accelerator.TCG


@dataclass(frozen=True, slots=True)
class Choice:
    accelerator: Accelerator
    reason: str  # why this one, and what speaks against the better one


@dataclass(frozen=True, slots=True)
class Here:
    """What virtual machines of this host are made with."""

    arch: str
    qemu: Path
    choice: Choice


def architecture() -> str:
    """x86_64 or aarch64. Unsupported for any other machine."""
    import platform  # takes a while, as do others below: the process that owns a machine needs none of them

    found = MACHINES.get(platform.machine().lower())
    if found is None:
        raise Unsupported(f"runtime vm: no virtual machines for {platform.machine()}")
    return found


def package(arch: str) -> str:
    """What to install for QEMU."""
    if host.MACOS:
        return "brew install qemu"
    return "apt-get install qemu-system-" + {"x86_64": "x86", "aarch64": "arm"}[arch]


def find_qemu(arch: str) -> Path:
    """QEMU's program for `arch`. Unsupported, with what to install, when it is not there."""
    if arch not in MACHINES.values():
        raise Unsupported(f"runtime vm: no virtual machines for {arch}", at=arch)
    name = f"qemu-system-{arch}"
    found = find(name)
    if found is None:
        raise Unsupported(f"runtime vm: {name} is not installed", hint=package(arch))
    return Path(found)


def candidate(system: str) -> Accelerator:
    """The accelerator a host of that kind (sys.platform's names) may have in hardware."""
    return Accelerator.HVF if system == "darwin" else Accelerator.KVM


def guest_image(arch: str) -> bytes:
    """The probing guest: a firmware of 64 KiB on x86-64, a flat kernel on aarch64."""
    if arch == "aarch64":
        code = (
            0x52A00000 | (LOOPS >> 16) << 5,  # movz w0, #LOOPS >> 16, lsl 16
            0x71000400,  # subs w0, w0, #1
            0x54FFFFE1,  # b.ne back to it
            0x52B08000,  # movz w0, #0x8400, lsl 16
            0x72800100,  # movk w0, #8: PSCI SYSTEM_OFF
            0xD4000002,  # hvc #0
            0x14000000,  # b to itself
        )
        return struct.pack("<7I", *code)
    code_at, reset_at, size = 0xFF00, 0xFFF0, 0x10000
    program = b"\x66\xb9" + struct.pack("<I", LOOPS)  # mov ecx, LOOPS
    program += b"\x66\x49\x75\xfc"  # dec ecx; jnz back to it
    program += bytes((0xB0, STATUS, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD))  # mov al, STATUS; out 0xf4, al; hlt; jmp to hlt
    image = bytearray(b"\xf4" * size)
    image[code_at : code_at + len(program)] = program
    image[reset_at : reset_at + 3] = b"\xe9" + struct.pack("<h", code_at - (reset_at + 3))  # where a reset begins
    return bytes(image)


def probe_argv(qemu: Path, arch: str, accelerator: Accelerator, image: str) -> list[str]:
    """QEMU with the probing guest in the file `image`."""
    cpu = "host" if accelerator.hardware else "max"
    argv = [str(qemu), "-accel", accelerator, "-cpu", cpu, "-m", "64", "-nodefaults", "-no-user-config", "-nographic"]
    if arch == "aarch64":
        return [*argv, "-M", "virt", "-no-reboot", "-kernel", image]
    return [*argv, "-M", "microvm", "-bios", image, "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-no-reboot"]


def runs_guests(qemu: Path, arch: str, accelerator: Accelerator, limit: float = LIMIT) -> str:
    """Empty when a guest really runs with this accelerator, within `limit` seconds; else why not."""
    if accelerator is Accelerator.KVM:
        if not os.path.exists("/dev/kvm"):
            return "there is no /dev/kvm"
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "/dev/kvm may not be opened (join the group kvm)"
    import tempfile

    with tempfile.TemporaryDirectory(prefix="dutchman-accel-") as place:
        image = Path(place) / "guest"
        image.write_bytes(guest_image(arch))
        try:
            done = subprocess.run(
                probe_argv(qemu, arch, accelerator, str(image)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return f"guest code runs far too slowly, or not at all (no end within {limit:g} s)"
        except OSError as error:
            return f"QEMU cannot be started: {error}"
    if done.returncode == (0 if arch == "aarch64" else STATUS * 2 + 1):
        return ""
    said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
    return f"QEMU ended with status {done.returncode}{': ' + said if said else ''}"


def emulated(arch: str) -> Choice:
    """For guests of another architecture than the host's."""
    return Choice(Accelerator.TCG, f"tcg, which emulates the CPU: guests are {arch}, this host is {architecture()}")


@cache
def boot_id() -> str:
    """Of this boot of the host; empty where it cannot be told."""
    try:
        return pids.boot_id()
    except (OSError, subprocess.SubprocessError):
        return ""


class Accelerators:
    """The choice of this boot. `probe` is for tests."""

    def __init__(
        self,
        directory: Path | None = None,
        probe: Callable[[Path, str, Accelerator], str] = runs_guests,
        system: str | None = None,
    ) -> None:
        self.directory = directory or host.runtime_dir()
        self._path = self.directory / "accelerator.json"
        self._probe = probe
        self._candidate = candidate(system or sys.platform)
        self._lock = threading.Lock()  # held while probing: who comes second waits for the answer

    def here(self) -> Here:
        """All three, found out as by `choose`. Unsupported says what this host lacks."""
        return self.of(architecture())

    def of(self, arch: str) -> Here:
        """The same for guests of `arch`: those of another than the host's are emulated, and nothing is tried."""
        qemu = find_qemu(arch)
        return Here(arch, qemu, self.choose(qemu, arch) if arch == architecture() else emulated(arch))

    def choose(self, qemu: Path, arch: str) -> Choice:
        """The accelerator to use, found out at the first call of a boot, within LIMIT seconds."""
        with self._lock:
            key = self._key(qemu, arch)
            kept = self._load(key)
            if kept is None:
                kept = self._probe(qemu, arch, self._candidate)
                self._save(key, kept)
            return self._choice(kept)

    def known(self, qemu: Path, arch: str) -> Choice | None:
        """The same, without probing: None when it has not been found out yet."""
        kept = self._load(self._key(qemu, arch))
        return None if kept is None else self._choice(kept)

    def refuse(self, qemu: Path, arch: str, why: str) -> None:
        """The hardware accelerator failed with a real guest: TCG from now on, until the host is started again."""
        with self._lock:
            self._save(self._key(qemu, arch), why)

    def _choice(self, refused: str) -> Choice:
        if not refused:
            return Choice(self._candidate, f"{self._candidate} runs guest code")
        return Choice(Accelerator.TCG, f"tcg, which emulates the CPU; {self._candidate} cannot be used: {refused}")

    @staticmethod
    def _key(qemu: Path, arch: str) -> list[str]:
        try:
            stamp = str(os.stat(qemu).st_mtime_ns)
        except OSError:
            stamp = ""
        return [boot_id(), str(qemu), stamp, arch]

    def _all(self) -> list[dict[str, object]]:
        """What is known of this boot, of whichever QEMU."""
        try:
            return [item for item in json.loads(self._path.read_bytes()[:65536]) if item["key"][0] == boot_id()]
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def _load(self, key: list[str]) -> str | None:
        return next((str(item.get("refused", "")) for item in self._all() if item["key"] == key and key[0]), None)

    def _save(self, key: list[str], refused: str) -> None:
        known = [{"key": key, "refused": refused[:1000]}, *(item for item in self._all() if item["key"] != key)]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            host.write_atomic(self._path, json.dumps(known[:KEPT]).encode(), 0o600)
        except OSError as error:
            log.warning("which accelerator works is not remembered: %s", error)
