"""Every module can be imported on macOS: what Python has on Linux alone is taken away, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# what CPython has on Linux and not on macOS (the "Availability" lines of its library reference; errno.h, sys/socket.h)
SCRIPT = r'''
import ctypes, errno, fcntl, importlib, mmap, os, pkgutil, resource, select, signal, socket, sys, time

LACKS = {
    os: """eventfd pidfd_ memfd_ MFD_ EFD_ O_PATH O_TMPFILE O_NOATIME O_DIRECT O_LARGEFILE O_RSYNC
        posix_fadvise POSIX_FADV_ posix_fallocate getxattr setxattr listxattr removexattr XATTR_
        sched_setaffinity sched_getaffinity sched_setscheduler sched_getscheduler sched_setparam
        sched_getparam sched_rr_ sched_param pipe2 setresuid setresgid getresuid getresgid copy_file_range
        splice SPLICE_ getrandom GRND_ fdatasync ST_NODEV ST_NOEXEC ST_NOATIME ST_NODIRATIME ST_RELATIME
        ST_APPEND ST_MANDLOCK ST_SYNCHRONOUS ST_WRITE RWF_ P_PIDFD login_tty unshare setns CLONE_""",
    signal: """pidfd_send_signal SIGRTMIN SIGRTMAX SIGPOLL SIGPWR SIGSTKFLT SIGCLD sigtimedwait sigwaitinfo""",
    fcntl: """F_ADD_SEALS F_GET_SEALS F_SEAL_ F_SETPIPE_SZ F_GETPIPE_SZ F_OFD_ F_NOTIFY F_SETLEASE F_GETLEASE
        F_SETSIG F_GETSIG DN_ LOCK_MAND LOCK_READ LOCK_WRITE LOCK_RW F_EXLCK F_SHLCK""",
    socket: """AF_VSOCK VMADDR_ VM_SOCKETS_ SO_VM_ AF_NETLINK NETLINK_ AF_PACKET PACKET_ AF_ALG ALG_ AF_CAN CAN_
        AF_TIPC TIPC_ SOCK_CLOEXEC SOCK_NONBLOCK SO_PEERCRED SO_PASSCRED SO_PEERSEC SO_DOMAIN SO_PROTOCOL
        SO_BINDTODEVICE SO_MARK SCM_CREDENTIALS MSG_NOSIGNAL MSG_CMSG_CLOEXEC MSG_MORE MSG_CONFIRM
        MSG_ERRQUEUE TCP_USER_TIMEOUT TCP_KEEPIDLE""",
    select: """epoll EPOLLIN EPOLLOUT EPOLLPRI EPOLLERR EPOLLHUP EPOLLET EPOLLONESHOT EPOLL_""",
    errno: """EREMOTEIO EBADFD ENOKEY EUCLEAN ENONET ESTRPIPE EMEDIUMTYPE ENOMEDIUM EHWPOISON ERFKILL EKEY ECHRNG
        ECOMM ELIB EL2 EL3 ELN EUNATCH ENOCSI EBADE EBADR EXFULL ENOANO EBADRQC EBADSLT ENOPKG EADV ESRMNT
        EDOTDOT ENOTUNIQ EREMCHG ERESTART EISNAM ENAVAIL ENOTNAM""",
    resource: """prlimit RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_OFILE""",
    mmap: """MAP_POPULATE MAP_STACK MAP_DENYWRITE MAP_EXECUTABLE MADV_REMOVE MADV_DONTFORK MADV_DOFORK
        MADV_HUGEPAGE""",
    time: """CLOCK_BOOTTIME CLOCK_TAI CLOCK_MONOTONIC_COARSE pthread_getcpuclockid""",
}
C = "prctl unshare setns umount2 syncfs fallocate eventfd pidfd_open capset personality mount_setattr fsopen setresuid"


def ours():
    for package in ("engine", "fdfs"):
        yield package
        top = importlib.import_module(package)
        for module in pkgutil.walk_packages(top.__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                yield module.name


def load():
    return [importlib.import_module(name).__name__ for name in ours()]


load()  # what others wrote stays as it was found here
for name in [name for name in sys.modules if name.split(".")[0] in ("engine", "fdfs")]:
    del sys.modules[name]
for module, names in LACKS.items():
    for lacking in names.split():
        for name in dir(module):
            if name == lacking or lacking[-1] == "_" and name.startswith(lacking):
                delattr(module, name)
found = ctypes.CDLL.__getattr__


def lookup(self, name):
    if name in C.split():
        raise AttributeError(f"no {name} in macOS's C library")
    return found(self, name)


ctypes.CDLL.__getattr__ = lookup
sys.platform = "darwin"
os.uname = lambda: os.uname_result(("Darwin", "mac", "23.0.0", "Darwin Kernel Version 23.0.0", "arm64"))
loaded = load()
from engine import host
assert host.MACOS and not host.LINUX
print(len(loaded))
exec(sys.argv[1])
'''


def on_macos(script: str = "") -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT, script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_can_be_imported_and_finds_its_places() -> None:
    """Apple silicon: accelerator, machine, places, what is to be installed, signals as the guest numbers them."""
    said = on_macos(
        r"""
import os, platform, shutil, tempfile
from pathlib import Path
from engine import doctor, hostfiles, programs
from engine.errors import Unsupported
from engine.runtimes import select
from engine.runtimes.base import parse_signal
from engine.runtimes.vm import accel, qemu

platform.machine = lambda: "arm64"
os.environ["HOME"] = "/Users/jo"
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

shutil.which = lambda *a, **k: None
rows = {check.name: check for check in doctor.examine()}
assert rows["qemu"].advice == "brew install qemu", rows
assert "macfuse" in rows["macFUSE"].advice and "fuse-t" in rows["macFUSE"].advice
assert programs.advice("e2fsprogs") == "brew install e2fsprogs"
try:
    select.open_runtime("vm", Path("/x"))
except Unsupported as error:
    assert "conmon" in error.reason, error
else:
    raise AssertionError
assert [parse_signal(text) for text in ("USR1", "CHLD", "SIGSTOP", "RTMIN+1", "64")] == [10, 17, 19, 35, 64]

with tempfile.TemporaryDirectory() as place:
    tempfile.tempdir = place
    os.environ.pop("XDG_RUNTIME_DIR", None)
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
print("right")
"""
    )
    assert said.endswith("right\n") and int(said.split()[0]) > 150  # modules


def test_signals_are_numbered_as_here() -> None:
    """Linux tells what the table of engine/runtimes/base.py has to say."""
    import signal

    from engine.runtimes.base import RTMAX, RTMIN, SIGNALS

    if sys.platform == "linux":
        names = {name[3:]: int(number) for name, number in signal.Signals.__members__.items() if name[3:5] != "RT"}
        assert names.items() <= SIGNALS.items() and set(SIGNALS) - set(names) <= {"STKFLT"}
        assert (int(signal.SIGRTMIN), int(signal.SIGRTMAX)) == (RTMIN, RTMAX)
