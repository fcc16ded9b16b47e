"""A guest of its own for a test, without an engine: QEMU as qemu.argv has it, the agent, a program to run in it.

The program is compiled for the guest's architecture; `rootfs` puts it into a tmpfs of the guest.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.kernels import Kernel
from engine.runtimes.vm import agentbuild, driver, protocol, qemu, verbs
from engine.runtimes.vm.accel import Accelerator
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import Words
from engine.runtimes.vm.qemu import Guest, Platform, VsockDevice
from engine.runtimes.vm.streams import Stream
from engine.runtimes.vm.vsock import Port

WAIT = 200.0  # seconds: an emulated guest of another architecture, on a busy machine
ROOTFS = "/run/rootfs"
PROGRAM = r"""
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <unistd.h>
/* hello CODE: say the machine, copy the input to the output, end with CODE.  echo PORT: of a vsock, for ever. */
int main(int argc, char **argv) {
    char text[4096];
    ssize_t count;
    if (argc == 3 && !strcmp(argv[1], "hello")) {
        struct utsname name;
        uname(&name);
        printf("%s pid %d\n", name.machine, (int)getpid());
        fflush(stdout);
        while ((count = read(0, text, sizeof text)) > 0) if (write(1, text, count) != count) return 99;
        return atoi(argv[2]);
    }
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = atoi(argv[2])};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 8)) return perror("listen"), 1;
    puts("listening");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) return perror("accept"), 1;
        while ((count = read(fd, text, sizeof text)) > 0)
            for (ssize_t done = 0, more; done < count; done += more)
                if ((more = write(fd, text + done, count - done)) <= 0) return perror("write"), 1;
        close(fd);
    }
}
"""


def program(place: Path, arch: str) -> bytes:
    (place / "program.c").write_text(PROGRAM)
    argv = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl", "-static", "-Os", "-s"]
    subprocess.run([*argv, "-o", "program", "program.c"], cwd=place, check=True, timeout=600)
    return (place / "program").read_bytes()


class BareGuest:
    """`serial`: our end of the agent's port (with `vsock` there is none)."""

    def __init__(self, place: Path, kernel: Kernel, binary: Path, vsock: VsockDevice | None = None) -> None:
        agent = agentbuild.build(kernel.arch, driver.agents())
        cpuinfo = Path("/proc/cpuinfo").read_text()
        tsc = qemu.tsc_khz(cpuinfo) if kernel.arch == "x86_64" else 0
        platform = Platform(kernel.arch, Accelerator.TCG, kernel.acpi, tsc)
        self._console, theirs = socket.socketpair()
        self.serial, port = socket.socketpair()
        guest = Guest(
            kernel=kernel.image,
            initfs=kernel.initfs(agent),
            memory=256,
            agent_fd=-1 if vsock else port.fileno(),
            console_fd=theirs.fileno(),
            vsock=vsock,
            arguments=f"fd.vsock={Port.AGENT.value}" if vsock else "",
        )
        self._said = bytearray()
        with theirs, port, open(place / "qemu.log", "wb") as log:
            fds = [theirs.fileno(), port.fileno()]
            argv = qemu.argv(binary, platform, guest)
            self.process = subprocess.Popen(
                argv, cwd=place, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._log = place / "qemu.log"
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._console.recv(4096):
                self._said += data

    def words(self) -> str:
        return self._log.read_text(errors="replace") + self._said.decode(errors="replace")[-3000:]

    def patiently(self, work: Callable[[], Any]) -> Any:
        """What `work` gives once it no longer fails; while the guest boots."""
        until = time.monotonic() + WAIT
        while True:
            try:
                return work()
            except EngineError as error:
                assert self.process.poll() is None and time.monotonic() < until, f"{error}; {self.words()}"
                time.sleep(0.2)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.serial.close()
        self._console.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._console.close()


@contextlib.contextmanager
def bare_guest(place: Path, kernel: Kernel, binary: Path, vsock: VsockDevice | None = None) -> Iterator[BareGuest]:
    guest = BareGuest(place, kernel, binary, vsock)
    try:
        yield guest
    finally:
        guest.close()


def put(client: AgentClient, path: str, data: bytes) -> None:
    """A file in the new root file system, a piece at a time."""
    handle = client.call("OPEN", {"root": "new", "path": path, "flags": "wc", "mode": "755"}, deadline=WAIT)
    for at in range(0, len(data), protocol.BULK):
        words: Words = {"handle": handle.number("handle"), "offset": at, "data": data[at : at + protocol.BULK]}
        client.call("WRITE", words, deadline=WAIT)
    client.call("CLOSE", {"handle": handle.number("handle")}, deadline=WAIT)


def rootfs(client: AgentClient, content: bytes) -> None:
    """A tmpfs with `/program`."""
    client.call("MOUNT", {"source": "tmpfs", "target": ROOTFS, "type": "tmpfs"}, deadline=WAIT)
    client.call("ROOT", {"name": "new", "path": ROOTFS}, deadline=WAIT)
    put(client, "program", content)


def start(client: AgentClient, *argv: str, **words: Any) -> Stream:
    """A container's first process, running."""
    mounts = [("proc", "/proc", "proc", "nosuid"), ("tmpfs", "/dev", "tmpfs", "nosuid")]
    listed = [protocol.fields(source, to, kind, *verbs.mount_flags([flags])) for source, to, kind, flags in mounts]
    known: dict[str, Any] = {
        "id": "main",
        "rootfs": ROOTFS,
        "argv": ["/program", *argv],
        "env": ["PATH=/"],
        "mount": listed,
    }
    stream, _ = client.open("RUN", {**known, **words}, deadline=WAIT)
    client.call("START", {"id": "main"}, deadline=WAIT)
    return stream
