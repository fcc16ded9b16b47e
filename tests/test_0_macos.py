"""Every module can be imported on macOS: what Python has on Linux alone is taken away, in a process of its own."""

from __future__ import annotations

import sys

from macos import on_macos


def test_every_module_can_be_imported_and_finds_its_places() -> None:
    """Apple silicon: accelerator, machine, places, what is to be installed, signals as the guest numbers them."""
    said = on_macos(
        r"""
import os, platform, shutil, tempfile
from pathlib import Path
from engine import doctor, hostfiles, hostmounts, programs
from engine.errors import AccessDenied, Unsupported
from engine.runtimes import select
from engine.runtimes.base import parse_signal
from engine.runtimes.vm import accel, qemu

platform.machine = lambda: "arm64"
os.environ["HOME"] = "/Users/jo"
held = tempfile.TemporaryDirectory()
os.environ["XDG_RUNTIME_DIR"] = held.name  # for what is written down
assert str(host.default_store()) == "/Users/jo/Library/Application Support/FlyingDutchman"
assert accel.architecture() == "aarch64" and accel.candidate(sys.platform) is accel.Accelerator.HVF
assert "/opt/homebrew/opt/e2fsprogs/sbin" in programs.MAC_PLACES.split(":")

shutil.which = lambda name, mode=0, path=None: f"/opt/homebrew/bin/{name}" if path and "homebrew" in path else None
assert str(accel.find_qemu("aarch64")) == "/opt/homebrew/bin/qemu-system-aarch64"
store = host.default_store()
machine = qemu.Machine("aarch64", "hvf", str(store / "kernels/k/Image"), "/i", 512, 1, True, str(store / "image.vmdk"),
    "/upper.ext4", 5, qemu=str(accel.find_qemu("aarch64")))
argv = qemu.command(machine)
assert argv[:7] == ["/opt/homebrew/bin/qemu-system-aarch64", "-M", "virt", "-accel", "hvf", "-cpu", "host"], argv
assert not any("memfd" in word or "microvm" in word or "tap," in word for word in argv), argv
assert any(f"file.filename={store}/image.vmdk" in word for word in argv)
path = next(word for word in argv if word.startswith("socket,id=qmp")).split("path=")[1].split(",")[0]
assert not path.startswith("/"), "relative to QEMU's directory, whatever the store's path is"

exports = [("shares0", "/Users/jo/My Files", False), ("shares1", "/b", True)]
intel = qemu.command(qemu.Machine("x86_64", "hvf", "/k", "/i", 512, 1, False, "/image", "/upper", 5, tsc_khz=1,
    exports=exports, share="/s", owners=False))
assert intel[1:7] == ["-M", "microvm,acpi=off,rtc=on,isa-serial=off", "-accel", "hvf", "-cpu", "host"], intel
shown = [intel[at + 1] for at, word in enumerate(intel) if word == "-fsdev"]
assert shown[1] == "local,id=share1,path=/Users/jo/My Files,security_model=none,multidevs=remap", shown
assert shown[2].endswith("path=/b,security_model=none,multidevs=remap,readonly=on"), shown

shutil.which = lambda *a, **k: None
hostmounts.mounts = lambda: [("/", "apfs", "/dev/disk3s1s1")]
rows = {check.name: check for check in doctor.examine()}
assert rows["qemu"].advice == "brew install qemu", rows
assert "macfuse" in rows["macFUSE"].advice and "fuse-t" in rows["macFUSE"].advice
assert programs.advice("e2fsprogs") == "brew install e2fsprogs"
assert not [check for check in rows.values() if not check.ok and "apt-get" in check.advice], rows
assert select.preferred(Path("/x")) == "vm"
vm = select.open_runtime("vm", Path("/x"))
assert not vm.probe().ok and "conmon" not in vm.probe().reason, vm.probe()
try:
    select.open_runtime("oci", Path("/x"))
except Unsupported as error:
    assert "vm on macOS" in error.hint
else:
    raise AssertionError
assert [parse_signal(text) for text in ("USR1", "CHLD", "SIGSTOP", "RTMIN+1", "64")] == [10, 17, 19, 35, 64]

with tempfile.TemporaryDirectory() as place:
    tempfile.tempdir = place
    os.environ.pop("XDG_RUNTIME_DIR", None)
    assert str(host.runtime_dir()) == "/Users/jo/.dutchman"  # $TMPDIR is swept of what nobody touched for days
    for name in ("agent.sock", "attach.stream", "input", "control.sock"):
        assert len(f"/Users/{'j' * 31}/.dutchman/s/{'0' * 12}/{name}") < hostfiles.MAX_ADDRESS
    os.environ["HOME"] = place
    deep = Path(place, "s" * 60, "c" * 64)
    deep.mkdir(parents=True)
    with hostfiles.socket_address(Path(place) / "short.sock") as address:
        assert address == f"{place}/short.sock"
    for _ in range(2):
        with hostfiles.socket_address(deep / "agent.sock") as address:
            assert len(address) < 104, address
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(address)
            assert (deep / "agent.sock").exists()
            os.unlink(deep / "agent.sock")
    short = hostfiles.SHORT = Path(place, "short")
    os.environ["XDG_RUNTIME_DIR"] = str(Path(place, "r" * 90))  # no link in there would be short enough
    for _ in range(2):
        with hostfiles.socket_address(deep / "agent.sock") as address:
            assert address.startswith(f"{short}/dutchman-{os.geteuid()}-s/"), address
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(address)
            os.unlink(deep / "agent.sock")
    (links,) = short.iterdir()
    links.chmod(0o755)
    try:
        with hostfiles.socket_address(deep / "agent.sock"):
            raise AssertionError
    except AccessDenied as error:
        assert "yours alone" in str(error) and "XDG_RUNTIME_DIR" in error.hint
print("right")
"""
    )
    assert said.endswith("right\n") and int(said.split()[0]) > 150  # modules


def test_processes_signals_and_networks_there() -> None:
    """What this host can only be told: the system's structures, its numbers, what its programs print."""
    said = on_macos(
        r"""
import ctypes, signal, struct, tempfile
from pathlib import Path
from engine import hostmounts
from engine.errors import InvalidArgument, Unsupported
from engine.netconfig import PortSpec
from engine.runtimes import calls, conmon, monitor, pids, signals
from engine.runtimes.netbase import Link, Wiring
from engine.runtimes.netfiles import NetworkMode
from engine.runtimes.vm import qemu, translate, usernetworks

def info(status, ppid, seconds, micro):  # struct proc_bsdinfo
    return struct.pack("=12I16s32s5Ii2Q", 0, status, 0, 7, ppid, *[0] * 7, b"qemu", b"qemu", *[0] * 6, seconds, micro)

class Proc:
    known = {7: info(2, 5, 1700, 250), 8: info(5, 5, 1, 1)}
    def proc_pidinfo(self, pid, flavor, arg, buffer, size):
        assert (flavor, size) == (3, 136)
        ctypes.memmove(buffer, self.known.get(pid, b""), len(self.known.get(pid, b"")))
        return len(self.known.get(pid, b""))
    def proc_listpids(self, kind, of, buffer, size):
        if buffer is not None:
            ctypes.memmove(buffer, struct.pack("=3i", 7, 8, 0), 12)
        return 12

asked = []
class Libc:
    def kqueue(self):
        return os.dup(0)
    def kevent(self, queue, change, count, events, room, patience):
        asked.append(struct.unpack("=QhHIqQ", change))
        return 0
    def sysctl(self, names, count, buffer, size, new, length):
        assert list(names) == [1, 49, 7] and count == 3
        data = struct.pack("=i", 3) + b"/bin/sh\0\0\0\0sh\0-c\0a b\0HOME=/\0"
        ctypes.memmove(buffer, data, len(data))
        size._obj.value = len(data)
        return 0

proc = Proc()
pids._libproc, pids._libc = lambda: proc, Libc()
assert (pids.start_time(7), pids.start_time(8), pids.start_time(9)) == (1700000250, None, None)
assert (pids.parent(7), pids.parent(9), pids.everybody()) == (5, 0, [7, 8])
assert pids.words(7) == [b"sh", b"-c", b"a b"]
held = pids.open_process(7, 1700000250)
assert held.pid == 7 and asked == [(7, -5, 1, 0x80000000, 0, 0)]
os.close(held)
assert pids.open_process(7, 1) is None

signal.SIGUSR1, signal.SIGCHLD = 30, 20
assert (signals.of_host(10), signals.of_host(15), signals.of_host(17)) == (30, 15, 20)
assert (signals.of_linux(30), signals.of_linux(15), signals.of_linux(29 + 64)) == (10, 15, 0)
try:
    signals.of_host(40)
except InvalidArgument as error:
    assert "40" in error.reason
else:
    raise AssertionError
assert translate.RLIMITS["RLIMIT_NOFILE"] == 7 and translate.RLIMITS["RLIMIT_AS"] == 9

with tempfile.TemporaryDirectory(prefix="a b") as place:
    name, flags = calls.find_monitor(Path(place))
    assert Path(name).name.startswith("dutchman-monitor-") and flags == conmon.FLAGS
    assert "engine.runtimes.monitor" in Path(name).read_text() and os.access(name, os.X_OK)
    os.environ["DUTCHMAN_MONITOR"] = "conmon"
    try:
        calls.find_monitor(Path(place))
    except Unsupported:
        pass
    else:
        raise AssertionError

table = "/dev/disk3s1s1 on / (apfs, sealed, local)\ndutchman on /Users/jo/a (b) c (macfuse, nodev, mounted by jo)\n"
assert hostmounts.mounts_told(table) == [("/", "apfs", "/dev/disk3s1s1"), ("/Users/jo/a (b) c", "macfuse", "dutchman")]

link = Link("n1", "dutchman", (("10.88.0.0/16", "10.88.0.1"),), False, "eth0", ("10.88.0.7",), ())
inner = Link("n2", "inner", (("10.89.0.0/24", "10.89.0.1"),), True, "eth1", ("10.89.0.3",), ())
ports = [PortSpec(host_ip="127.0.0.1", host=8080, host_last=8081, container=80, container_last=81)]
network = usernetworks.of_run(Wiring(Path(), "", "web", [inner, link], ports, ()))
assert network.mode is NetworkMode.GUEST and network.resolvers == ("10.89.0.254",)
inside, outside = usernetworks.describe(network.links, network.ports)
assert (inside["ports"], inside["words"]["route"]) == ([], [])
assert outside["words"] == {
    "iface": "eth1", "mtu": 1500, "up": 1, "addr": ["10.88.0.7/16"], "route": ["0.0.0.0/0\x0010.88.0.1\x000"]
}, outside
assert qemu.net_options(1, qemu.user_net(outside), "pci") == [
    "-netdev",
    "user,id=net1,ipv6=off,net=10.88.0.0/16,host=10.88.0.1,dns=10.88.255.254,dhcpstart=10.88.0.7"
    ",hostfwd=tcp:127.0.0.1:8080-10.88.0.7:80,hostfwd=tcp:127.0.0.1:8081-10.88.0.7:81",
    "-device", "virtio-net-pci,netdev=net1,romfile=",
]
assert ",restrict=on" in qemu.net_options(0, qemu.user_net(inside), "pci")[1]
try:
    sctp = [PortSpec(container=80, container_last=80, protocol="sctp")]
    usernetworks.GuestNetworks().setup(Wiring(Path(), "", "web", [link], sctp, ()))
except Unsupported as error:
    assert "sctp" in error.reason
else:
    raise AssertionError
print("right")
"""
    )
    assert said.endswith("right\n")


def test_signals_are_numbered_as_here() -> None:
    """Linux tells what the table of engine/runtimes/signals.py has to say."""
    import signal

    from engine.runtimes.signals import RTMAX, RTMIN, SIGNALS

    if sys.platform == "linux":
        names = {name[3:]: int(number) for name, number in signal.Signals.__members__.items() if name[3:5] != "RT"}
        assert names.items() <= SIGNALS.items() and set(SIGNALS) - set(names) <= {"STKFLT"}
        assert (int(signal.SIGRTMIN), int(signal.SIGRTMAX)) == (RTMIN, RTMAX)
