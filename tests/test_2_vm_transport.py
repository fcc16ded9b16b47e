"""How an owner gets at the agent of its machine: what a host lacks is said, and what breaks before it is there."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine import host
from engine.errors import DeadlineExceeded, RuntimeFailure, Unsupported
from engine.runtimes.vm import qemu, transport
from engine.runtimes.vm.transport import HYBRID, SERIAL, VSOCK, HybridWay, SerialWay, VsockWay, choose
from engine.runtimes.vm.vsock import Port

pytestmark = pytest.mark.skipif(not host.LINUX, reason="vsock is Linux's")
KERNEL = ("erofs", "vsock")
# speaks for vhost-device-vsock: a guest that is not there yet twice, then an agent that says what it was asked
DAEMON = """#!{python} -SE
import socket, sys, time
argv = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "{mode}" == "broken":
    sys.exit("no permission")
guest = socket.socket(socket.AF_UNIX)
guest.bind(argv["--uds-path"])
guest.listen()
vhost = socket.socket(socket.AF_UNIX)
vhost.bind(argv["--socket"])
time.sleep(0.3)
vhost.listen()
for turn in range(3):
    peer, _ = guest.accept()
    asked = peer.recv(100)
    if "{mode}" == "ends":
        sys.exit(3)
    if "{mode}" == "late" and turn == 2:
        peer.sendall(b"OK 5\\n" + asked)
        time.sleep(60)
    peer.close()
time.sleep(60)
"""


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {choose(wanted, ()) for wanted in ("", "auto", SERIAL)} == {SERIAL}
    for wanted in (HYBRID, VSOCK):
        with pytest.raises(Unsupported, match=f"vm_transport: {wanted}: the guest's kernel has no vsock"):
            choose(wanted, ("erofs",))
    monkeypatch.setattr(transport, "find", lambda name: None)
    with pytest.raises(Unsupported, match="vhost-device-vsock is not installed") as caught:
        choose(HYBRID, KERNEL)
    assert "echo auto > config/vm_transport" in str(caught.value.hint)
    monkeypatch.setattr(transport, "find", lambda name: f"/usr/bin/{name}")
    assert choose(HYBRID, KERNEL) == choose(HYBRID, ()) == HYBRID
    monkeypatch.setattr(transport, "DEVICE", tmp_path / "vhost-vsock")
    with pytest.raises(Unsupported, match=r"vm_transport: vsock: this host has no .*vhost-vsock") as caught:
        choose(VSOCK, KERNEL)
    assert "modprobe vhost_vsock" in str(caught.value.hint)
    with pytest.raises(RuntimeFailure, match="No such file"):
        VsockWay()


def test_a_context_id_is_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def ioctl(fd: int, number: int, argument: bytes) -> None:
        assert number == transport.SET_GUEST_CID
        (cid,) = struct.unpack("=Q", argument)
        asked.append(cid)
        if len(asked) < 4:
            raise OSError(errno.EADDRINUSE, "taken")

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    device = tmp_path / "vhost-vsock"
    device.touch()
    monkeypatch.setattr(transport, "DEVICE", device)
    way = VsockWay()
    assert len(set(asked)) == 4 and all(3 <= cid < (1 << 32) - 1 for cid in asked)
    assert way.values["cid"] == asked[-1] and way.fds == [way.values["vhost"]]
    machine = qemu.Machine("x86_64", "kvm", "/k", "/i", 256, 1, True, "/image", "/upper", **way.values)
    argv = qemu.command(machine)
    assert f"vhost-vsock-device,guest-cid={asked[-1]},vhostfd={way.fds[0]}" in argv
    assert "virtio-mmio.force-legacy=false" in argv and not [word for word in argv if "virtserialport" in word]
    assert f"fd.vsock={Port.AGENT.value}" in argv[argv.index("-append") + 1]
    way.launched()
    monkeypatch.setattr("fcntl.ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.EADDRINUSE, "taken")))
    with pytest.raises(RuntimeFailure, match="no context id is free"):
        VsockWay()


def test_serial_is_there_at_once() -> None:
    way = SerialWay()
    theirs = socket.socket(fileno=os.dup(way.values["agent"]))
    way.launched()
    with theirs, way.connect(lambda: False, 0.0) as ours:
        theirs.sendall(b"hello")
        assert ours.recv(10) == b"hello" and way.lost() == ""


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "vhost-device-vsock"
    monkeypatch.setattr(transport, "find", lambda name: str(program))
    return program


def hybrid(program: Path, mode: str) -> HybridWay:
    program.write_text(DAEMON.format(python=sys.executable, mode=mode))
    program.chmod(0o755)
    return HybridWay(program.parent, lambda: None)


def test_a_hybrid_socket_is_dialled_until_the_agent_listens(daemon: Path) -> None:
    way = hybrid(daemon, "late")
    try:
        machine = qemu.Machine("x86_64", "tcg", "/k", "/i", 256, 1, False, "/image", "/upper", **way.values)
        taken = [word for word in qemu.command(replace(machine, share="/s")) if "-device," in word]
        kinds = [word.split(",")[0].removesuffix("-device") for word in taken]
        assert kinds == ["virtio-serial", "virtio-9p", "vhost-user-vsock", "virtio-blk", "virtio-blk"]
        assert (daemon.parent / transport.GUEST).stat().st_mode & 0o777 == 0o600
        with way.connect(lambda: False, 60.0) as line:
            line.settimeout(60)
            assert line.recv(100) == b"CONNECT %d\n" % Port.AGENT
        assert way.lost(0.0) == ""
    finally:
        way.close()
    assert way.lost() == "vhost-device-vsock, which carries its vsock, ended with status -9"


def test_what_breaks_before_the_agent_listens(daemon: Path) -> None:
    with pytest.raises(RuntimeFailure, match="does not listen: no permission"):
        hybrid(daemon, "broken")
    way = hybrid(daemon, "ends")
    with pytest.raises(RuntimeFailure, match="ended with status 3"):
        way.connect(lambda: False, 60.0)
    way.close()
    way = hybrid(daemon, "mute")
    try:
        with pytest.raises(RuntimeFailure, match="the machine ended before its agent listened"):
            way.connect(lambda: True, 60.0)
        with pytest.raises(DeadlineExceeded, match="did not listen in time"):
            way.connect(lambda: False, 0.0)
    finally:
        way.close()


def test_who_listens(tmp_path: Path) -> None:
    code = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.bind('a');print(flush=True);sys.stdin.readline();"
    code += "s.listen();print(flush=True);sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert not transport.listens(process.pid, "a")  # it is bound
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert transport.listens(process.pid, "a")
        assert not transport.listens(process.pid, "b") and not transport.listens(os.getpid(), "a")
    assert not transport.listens(process.pid, "a")
