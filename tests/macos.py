"""A Python without what it has on Linux alone, which takes itself to be on macOS."""

from __future__ import annotations

import os
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
import platform, selectors, types
from engine.runtimes import pids as real_pids
real_machine = platform.machine()
selectors.select = types.SimpleNamespace(**vars(select))
real_pids.os, real_pids.signal = types.SimpleNamespace(**vars(os)), types.SimpleNamespace(**vars(signal))
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


def on_macos(script: str = "", seconds: float = 300, **environment: str) -> str:
    """What `script` prints in such a process, after how many modules of ours were imported there."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# after that, for what is to be done for real: processes are held as on Linux, sockets and files are this host's anyway
REAL = r"""
import platform, tempfile
from engine.runtimes import pids
platform.machine, tempfile._O_TMPFILE_WORKS = lambda: real_machine, False
for name in ("boot_id", "start_time", "hold", "open_process", "send", "ended", "words", "everybody", "parent"):
    setattr(pids, name, getattr(real_pids, name))
"""
