"""One driver and one directory of containers, for the tests of runtime drivers."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guestkernel import guest_kernels

from engine.config import ContainerConfig
from engine.logs import ContainerLogs
from engine.runtimes import calls
from engine.runtimes.base import Exit, Mount, RunSpec, Runtime, make_spec
from engine.runtimes.fake import FakeRuntime
from engine.runtimes.oci import OciRuntime
from engine.runtimes.vm.disks import make_upper
from engine.runtimes.vm.driver import VmRuntime

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "echo", "cat", "true", "false", "seq", "id", "head", "yes", "tty", "dd", "touch", "grep")
COMMANDS: dict[str, dict[str, tuple[str, ...]]] = {
    "fake": {"true": ("true",), "exit 3": ("exit", "3"), "hello": ("echo", "hello"), "sleep": ("sleep", "inf")}
    | {
        "trap": ("sleep", "inf"),
        "deaf": ("trap", "inf"),
        "oom": ("oom",),
        "warn": ("warn", "careful"),
        "lines": ("lines", "2000"),
    },
    "oci": {
        "true": ("true",),
        "exit 3": ("sh", "-c", "exit 3"),
        "hello": ("echo", "hello"),
        "sleep": ("sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.02; done"),
        "trap": ("sh", "-c", "trap 'exit 143' TERM; echo ready; while :; do sleep 0.02; done"),
        "deaf": ("sh", "-c", "trap '' TERM INT; while :; do sleep 0.05; done"),
        "oom": ("sh", "-c", "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"),
        "warn": ("sh", "-c", "echo careful >&2"),
        "lines": ("sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"),
    },
}
COMMANDS["vm"] = COMMANDS["oci"]
SLOW = bool(os.environ.get("DUTCHMAN_SLOW_TESTS"))  # a machine that is emulated takes seconds to boot
REAL = ("oci", "vm")  # drivers that run programs
OWN = ("own",) if SLOW else ()  # vm under our own monitor in place of conmon, as on macOS
TRANSPORT = os.environ.get("DUTCHMAN_TEST_TRANSPORT", "")  # of guests' agents, in all tests of the driver
PATIENCE = {"fake": 1.0, "oci": 1.0, "vm": 8.0}  # how much longer a driver may take


def no_oci() -> str | None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if not BUSYBOX.exists():
        return "needs busybox-static"
    probe = OciRuntime(Path("/nonexistent")).probe()
    return None if probe.ok else probe.reason


def skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def no_vm() -> str | None:
    if reason := no_oci():
        return reason
    if shutil.which("mkfs.erofs") is None:
        return "needs erofs-utils"
    probe = VmRuntime(Path("/nonexistent"), kernels=guest_kernels().directory).probe()
    return None if probe.ok else probe.reason


class Bench:
    """One driver, one directory of containers, everything deleted at the end."""

    def __init__(self, kind: str, place: Path) -> None:
        self.own = kind in OWN
        self.kind, self.place, self.ids = "vm" if self.own else kind, place, list[str]()
        self.ends: queue.Queue[tuple[str, Exit]] = queue.Queue()
        self.runtime: Runtime = self.connect()

    def connect(self) -> Runtime:
        if self.kind == "fake":
            return FakeRuntime()
        if self.kind == "vm":
            vm = VmRuntime(self.place / "containers", state=self.place / "state", kernels=guest_kernels().directory)
            with pytest.MonkeyPatch.context() as patch:
                if self.own:
                    patch.setenv(calls.OWN, "own")
                vm.probe()  # chooses, for good
            return vm
        return OciRuntime(self.place / "containers", state=self.place / "state")

    def spec(
        self, command: str | tuple[str, ...], id: str = "", mounts: tuple[Mount, ...] = (), **fields: Any
    ) -> RunSpec:
        id = id or uuid.uuid4().hex * 2
        argv = COMMANDS[self.kind].get(command, (command,)) if isinstance(command, str) else command
        directory = self.place / "containers" / id
        directory.mkdir(parents=True, exist_ok=True)
        if id not in self.ids:
            self.ids.append(id)
        if self.kind == "vm" and TRANSPORT:
            fields = {"vm_transport": TRANSPORT, **fields}
        config = ContainerConfig(command=argv, **fields)
        run = make_spec(id=id, name="n", directory=directory, rootfs=self.rootfs(), config=config, mounts=mounts)
        if self.kind != "vm":
            return run
        (directory / "vm").mkdir(exist_ok=True)
        upper = directory / "vm" / "upper.ext4"
        if not upper.exists():
            make_upper(upper, 256 << 20)
        return replace(run, layers=(self.image(),))

    def image(self) -> Path:
        """The root file system as the disk of a machine."""
        path = self.place / "rootfs.erofs"
        if not path.exists():
            subprocess.run(["mkfs.erofs", "--quiet", path, self.rootfs()], check=True, stdout=subprocess.DEVNULL)
            with path.open("r+b") as file:
                file.truncate(-(-path.stat().st_size // 4096) * 4096)
        return path

    def rootfs(self) -> Path:
        root = self.place / "rootfs"
        if not root.exists():
            (root / "bin").mkdir(parents=True)
            (root / "etc").mkdir()
            (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
            (root / "etc" / "group").write_text("root:x:0:\nweb:x:34:\nadm:x:4:web\n")
            if self.kind in REAL:
                (root / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
                (root / "bin" / "busybox").chmod(0o755)
                for name in APPLETS:
                    (root / "bin" / name).symlink_to("busybox")
        return root

    def watch(self, id: str) -> None:
        self.runtime.watch(id, lambda id, end: self.ends.put((id, end)))

    def end(self, seconds: float = 40) -> Exit:
        return self.ends.get(timeout=seconds * (PATIENCE[self.kind] if seconds > 1 else 1))[1]

    def run(self, command: str | tuple[str, ...], **fields: Any) -> str:
        run = self.spec(command, **fields)
        self.runtime.create(run)
        self.watch(run.id)
        self.runtime.start(run.id)
        return run.id

    def output(self, id: str, view: str = "stdout") -> bytes:
        logs = ContainerLogs(self.place / "containers" / id / "logs")
        try:
            assert logs.caught_up(view, 40)
            return logs.read(view, 0, 1 << 30)
        finally:
            logs.close()

    def until(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        end = time.monotonic() + seconds * PATIENCE[self.kind]
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)

    def close(self) -> None:
        for id in self.ids:
            self.runtime.delete(id)
        self.runtime.close()


def bench_of(kind: str, place: Path) -> Bench:
    if kind == "oci" and (reason := no_oci()):
        skip_or_fail(reason)
    if kind in ("vm", *OWN) and (reason := no_vm()):
        skip_or_fail(reason)
    return Bench(kind, place)
