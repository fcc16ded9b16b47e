"""Guests by themselves: the agent over hybrid vsock, and on another architecture. Slow: each boots an emulated machine.

vhost-device-vsock plays no one: it is Debian's, the one a host would run. `tools/setup slow` fetches what these need.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bareguests import WAIT, bare_guest, program, rootfs, start
from guestkernel import CACHE, guest_kernel
from runtimebench import skip_or_fail

from engine.errors import DeadlineExceeded, Unreachable
from engine.kernels import Kernels
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.qemu import VsockDevice
from engine.runtimes.vm.streams import Data
from engine.runtimes.vm.vsock import Hybrid, Port, health

SLOW = bool(os.environ.get("DUTCHMAN_SLOW_TESTS"))  # a machine that is emulated takes seconds to boot
CID, ECHO = 3, 5000
DAEMON = CACHE.parent / "vhost-device-vsock" / "usr/bin/vhost-device-vsock"


def found(path: Path | str | None, what: str) -> Path:
    if path is None or not Path(path).exists():
        skip_or_fail(f"{what} is not here: tools/setup slow gets it")
    return Path(str(path))


@pytest.fixture
def vhost(tmp_path: Path) -> Iterator[Hybrid]:
    """The daemon behind a guest's vsock, its sockets in `tmp_path`."""
    binary = found(shutil.which("vhost-device-vsock") or DAEMON, "vhost-device-vsock")
    argv = [str(binary), "--guest-cid", str(CID), "--socket", "vhost.sock", "--uds-path", "guest.vsock"]
    with open(tmp_path / "vhost.log", "wb") as log:
        process = subprocess.Popen(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not (tmp_path / "vhost.sock").exists():
            assert process.poll() is None, (tmp_path / "vhost.log").read_text()
        yield Hybrid(tmp_path / "guest.vsock")
    finally:
        process.kill()
        process.wait()


pytestmark = pytest.mark.timeout(600)  # the first build of an architecture takes minutes

if SLOW:

    def test_the_agent_and_the_ports_of_a_guest_over_hybrid_vsock(tmp_path: Path, vhost: Hybrid) -> None:
        kernel = guest_kernel()
        binary = found(shutil.which(f"qemu-system-{kernel.arch}"), "qemu")
        with bare_guest(tmp_path, kernel, binary, VsockDevice(socket="vhost.sock")) as guest:
            client = guest.patiently(lambda: vhost.agent(deadline=20))
            assert client.hello.text("kernel") == kernel.version and client.ping(deadline=WAIT) > 0

            rootfs(client, program(tmp_path, kernel.arch))
            stream = start(client, "echo", str(ECHO))
            event = stream.next(deadline=WAIT)
            assert isinstance(event, Data) and event.data == b"listening\n"

            line = vhost.dial(ECHO, deadline=WAIT)
            sent = os.urandom(1 << 20)
            got = bytearray()
            for at in range(0, len(sent), 1 << 16):
                line.send(sent[at : at + (1 << 16)], deadline=WAIT)
                while len(got) < at + (1 << 16):
                    got += line.receive(deadline=WAIT)
            line.end()
            assert got == sent and line.receive(deadline=WAIT) == b""
            line.close()
            with pytest.raises(Unreachable, match="port 5001 of the guest"):
                vhost.dial(5001, deadline=WAIT)

            # the agent has one host at a time: another waits, and is greeted when the first has gone
            with pytest.raises(DeadlineExceeded, match="hello"):
                health(vhost, deadline=1.0)
            client.close()
            for _ in range(3):
                assert 0 < health(vhost, deadline=WAIT) < WAIT
            client = vhost.agent(deadline=WAIT)
            client.call("SIGNAL", {"id": "main", "signal": 9}, deadline=WAIT)  # what ran goes on meanwhile
            client.close()

    def test_a_guest_of_another_architecture_boots_and_runs_a_program(tmp_path: Path) -> None:
        packages = sorted((CACHE.parent / "kernels-arm64").glob("linux-image-*_arm64.deb"))
        package = found(packages[-1] if packages else None, "Debian's kernel for arm64")
        binary = found(shutil.which("qemu-system-aarch64"), "qemu-system-aarch64")
        with open(package, "rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        kernel = Kernels(tmp_path / "kernels").import_(package, arch="aarch64", digest=digest)
        assert (kernel.arch, kernel.verified) == ("aarch64", digest) and kernel.format in ("Image", "zboot")
        assert set(kernel.features) >= {"erofs", "ext4", "overlay", "virtio_net", "virtio_pci", "vsock", "9p"}

        with bare_guest(tmp_path, kernel, binary) as guest:
            client = AgentClient(guest.serial, deadline=WAIT)
            assert (client.hello.text("arch"), client.hello.text("kernel")) == ("aarch64", kernel.version)
            rootfs(client, program(tmp_path, "aarch64"))
            stream = start(client, "hello", "7", stdin=1)
            stream.write(b"through the port\n" * 1000, deadline=WAIT)
            stream.end_input(deadline=WAIT)
            end, out, err = stream.wait(deadline=WAIT)
            assert end.code == 7 and err == b""
            assert out == b"aarch64 pid 1\n" + b"through the port\n" * 1000
            client.call("POWEROFF", deadline=WAIT)
            client.close()
            assert guest.process.wait(WAIT) == 0


def test_the_engines_ports_are_its_own() -> None:
    """No two alike, all in the engine's range, none where agents of others listen (1024 and up, 0x10000000 and up)."""
    assert len({port.value for port in Port}) == len(Port.__members__)
    assert all(0xFD00 <= port <= 0xFDFF for port in Port)
