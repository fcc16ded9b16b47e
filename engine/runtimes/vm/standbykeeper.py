"""The process that keeps a machine standing by (standbys.py), until it is taken over (standby.py). Floor 2.

It is QEMU's parent, which dies with it. It ends when the daemon does (its standard input), when its directory is gone,
when it has waited for IDLE_SECONDS or memory becomes low; when it was taken over, with who did that: it is a shell then
that waits for that end. Whatever is killed, what is left has a name nobody takes, and the next keeper removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from engine import host, userids
from engine.errors import EngineError, RuntimeFailure
from engine.hostfiles import socket_address
from engine.runtimes.vm import network, qemu, standby, templates
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.templates import Template

ASIDE = ".warming-"
LIMIT_SECONDS = 120  # for one to be ready, on a busy host
ANSWER_SECONDS = 60.0
IDLE_SECONDS = 900.0
LOOK_SECONDS = 5.0
NICE = 10
PROGRAM = "/warm"  # the agent, as a container's program
SHARED = ("resolv.conf", "hostname", "hosts")
CLONE_NEWNS, CLONE_NEWNET, MS_SLAVE = 0x20000, 0x40000000, 1 << 19  # <linux/sched.h>, <sys/mount.h>
LOCKED = os.ST_NOSUID | getattr(os, "ST_NODEV", 0) | getattr(os, "ST_NOEXEC", 0)  # same as MS_*


def enough(request: Mapping[str, Any]) -> bool:
    """Whether the host has memory for a machine more: as much again, and a tenth of all, is left then."""
    memory = int(request["machine"]["memory"]) << 20
    known = {}
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            known[name] = int(value.split()[0]) << 10
    return known["MemAvailable"] > 2 * memory + known["MemTotal"] // 10


def main() -> int:
    """Of `shim.py standby`. The request is a line on standard input, whose end is this process's until it is taken
    over; `ready` is said on standard output, or why not."""
    if os.fork():
        return 0
    os.setsid()
    signal.alarm(LIMIT_SECONDS)
    if host.is_root() and userids.rootless() is None:
        os.nice(NICE)  # who takes it over can undo that
    data = b""
    while not data.endswith(b"\n"):
        if not (more := os.read(0, 1 << 16)):
            return 4
        data += more
    try:
        keep(json.loads(data))
    except (EngineError, OSError, ValueError) as error:
        print(error if isinstance(error, EngineError) else f"{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def keep(request: Mapping[str, Any]) -> None:
    """`request`: key and facts (templates.wanted), machine (values of qemu.Machine), taps, directory (of templates),
    place (in there, with the program's disks: make_disks), plan (parts, overlay, capabilities, seccomp) and document
    (throwaway) of what is run."""
    directory, place = Path(request["directory"]), Path(request["place"])
    _sweep(directory.parent.parent)
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    kept = _Kept(place, request)
    try:
        kept.warm()
        final = directory / f"{standby.NAME}{request['key']}"
        listener = socket.socket(socket.AF_UNIX)
        with socket_address(place / standby.SOCKET) as address:
            listener.bind(address)
        listener.listen(1)
        memory = request["machine"]["memory"]
        os.write(lock, json.dumps({"pid": os.getpid(), "memory": memory, "since": int(time.time())}).encode())
        os.rename(place, final)
        kept.place = final
        signal.alarm(0)
        print("ready", flush=True)
        kept.wait(listener)
    finally:
        kept.end()


def _sweep(kernels: Path) -> None:
    """What killed keepers left."""
    for pattern in (ASIDE, standby.NAME):
        for left in kernels.glob(f"*/templates/{pattern}*"):
            if not alive(left):
                host.remove_tree(left)


def alive(place: Path) -> bool:
    """Whether its keeper lives. One that was just begun counts as alive."""
    try:
        with open(place / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - place.stat().st_mtime < LIMIT_SECONDS
    return False


class _Kept:
    def __init__(self, place: Path, request: Mapping[str, Any]) -> None:
        self.place, self.request = place, request
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.qemu: subprocess.Popen[bytes] | None = None
        self._ours: list[socket.socket] = []
        self._hello = b""

    def end(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()
        host.remove_tree(self.place)

    # --- until it is ready

    def warm(self) -> None:
        self._unshare(CLONE_NEWNS)
        host.mount("none", Path("/"), "none", host.MS_REC | MS_SLAVE)
        store = str(self.place.parents[3])
        for point, kind, _ in reversed(list(host.mounts())):  # they would be kept alive here when others end them
            if point.startswith(f"{store}/") or kind.startswith("fuse"):
                with contextlib.suppress(PermissionError):
                    host.unmount(Path(point))
        taps: list[int] = []
        if self.request["taps"]:
            self._unshare(CLONE_NEWNET)
            taps = network.make_taps(Path("/proc/self/ns/net"), self.request["taps"])
        shares = self.place / "shares"
        shares.mkdir(mode=0o700)
        for number, name in enumerate(SHARED):
            (shares / str(number)).write_text(f"{name}\n")
        with templates.found(self.place.parent, self.request) as template:
            if template is None:
                raise RuntimeFailure("its template is gone")
            self._launch(template, taps)
            self._run(template)
        standby.ask(self._ours[2], "stop")
        for name in ("image", "upper"):
            (self.place / name).unlink()
        for path in shares.iterdir():
            path.unlink()

    def _unshare(self, what: int) -> None:
        if self._libc.unshare(what) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"unshare: {os.strerror(number)}")

    def _launch(self, template: Template, taps: list[int]) -> None:
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        self._ours = list(ours)
        values = dict(self.request["machine"]) | {
            "ram": str(template.ram),
            "tsc_khz": template.tsc_khz,
            "image": str(self.place / "image"),
            "upper": str(self.place / "upper"),
        }
        machine = qemu.Machine(
            **values,
            agent=theirs[0].fileno(),
            console=theirs[1].fileno(),
            watch=theirs[2].fileno(),
            taps=tuple(taps),
            share=str(self.place / "shares"),
            standby=True,
        )

        parent = os.getpid()

        def child() -> None:
            host.die_with_parent(signal.SIGKILL, parent)
            os.setsid()

        with open(self.place / "qemu.log", "wb") as words:
            self.qemu = subprocess.Popen(
                qemu.command(machine),
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd=self.place,
                pass_fds=[*(end.fileno() for end in theirs), *taps, template.state],
                preexec_fn=child,
            )
        for fd in taps:
            os.close(fd)
        for end in theirs:
            end.close()
        threading.Thread(target=_drain, args=(self._ours[1],), daemon=True).start()
        self._ours[2].sendall(b'{"execute": "qmp_capabilities"}\n' + templates.load(template))

    def _run(self, template: Template) -> None:
        from engine.runtimes.vm.owner import MAIN, preparation, run_words  # it imports the other half of this

        plan, document = self.request["plan"], self.request["document"]
        self._hello = template.hello
        # a duplicate: the connection is somebody else's later
        link = AgentClient(self._ours[0].dup(), deadline=None, hello=template.hello)
        try:
            templates.confirm(link)
            link.calls(preparation(plan, document), deadline=ANSWER_SECONDS)
            stream, _ = link.open("RUN", run_words(plan, document), deadline=ANSWER_SECONDS)
            link.call("START", {"id": MAIN}, deadline=ANSWER_SECONDS)
            stream.end_input()
            end, out, err = stream.wait(deadline=ANSWER_SECONDS)
            if (end.code, out) != (0, b"warm\n"):
                raise RuntimeFailure(f"the program ended with {end.code}: {(out + err)[-200:]!r}")
            link.call("RESET", {"disk": ["/dev/vda", "/dev/vdb"]}, deadline=ANSWER_SECONDS)
        except GuestError as error:
            raise RuntimeFailure(error.reason) from error
        finally:
            link.close()

    # --- after

    def wait(self, listener: socket.socket) -> None:
        """Until it is taken over, which replaces this process, or is no longer wanted."""
        assert self.qemu is not None
        pidfd = os.pidfd_open(self.qemu.pid)
        until = time.monotonic() + IDLE_SECONDS
        poll = select.poll()
        for fd in (0, listener.fileno(), pidfd):
            poll.register(fd, select.POLLIN)
        while time.monotonic() < until and self.place.exists() and enough(self.request):
            ready = [fd for fd, _ in poll.poll(LOOK_SECONDS * 1000)]
            if listener.fileno() in ready:
                owner, _ = listener.accept()
                listener.close()
                self._hand_over(owner, pidfd)
            if ready:  # the daemon has ended, or QEMU has
                return

    def _hand_over(self, owner: socket.socket, pidfd: int) -> NoReturn:
        assert self.qemu is not None
        for name in (standby.SOCKET, "lock"):
            (self.place / name).unlink()
        shares = os.open(self.place / "shares", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        known = json.dumps({"pid": self.qemu.pid, "hello": self._hello.hex()}).encode()
        socket.send_fds(owner, [known], [*(end.fileno() for end in self._ours), pidfd])
        data, fds, _, _ = socket.recv_fds(owner, standby.MAX_LINE, standby.MOST_SHARES + 8)
        if not data:
            raise RuntimeFailure("who took it over has ended")
        wish = json.loads(data)
        try:
            trees = fds[1:] if wish["taps"] else fds
            for number in range(wish["taps"]):
                _move_tap(f"tap{number}", fds[0])
            for number, (tree, (is_dir, writable)) in enumerate(zip(trees, wish["shares"], strict=True)):
                self._attach(shares, str(number), tree, is_dir, writable)
        except (EngineError, OSError, subprocess.SubprocessError) as error:
            owner.sendall(f"{error}\n".encode())
            raise
        for fd in fds:
            os.close(fd)
        owner.sendall(b"ok\n")
        print("taken", flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(owner.fileno(), 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        # a child that has ended keeps its number until this process ends: no other can have it
        os.execv("/bin/sh", ["sh", "-c", 'read -r end; kill -9 "$1"', "dutchman-vm-keeper", str(self.qemu.pid)])

    def _attach(self, shares: int, name: str, tree: int, is_dir: bool, writable: bool) -> None:
        if is_dir:
            os.mkdir(name, dir_fd=shares)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=shares))
        target = Path(f"/proc/self/fd/{shares}/{name}")
        try:
            host.move_mount(tree, target)
        except OSError as error:
            raise OSError(error.errno, f"attaching what is shared: {error.strerror}") from error
        host.mount("none", target, "none", host.MS_REC | MS_SLAVE)
        if not writable:  # whatever the guest says
            kept = os.statvfs(target).f_flag & LOCKED  # without root the kernel refuses to drop them
            host.mount("none", target, "none", host.MS_BIND | host.MS_REMOUNT | host.MS_RDONLY | kept)


def _move_tap(name: str, namespace: int) -> None:
    argv = [
        shutil.which("ip", path=network.PATHS) or "ip",
        "link",
        "set",
        "dev",
        name,
        "netns",
        f"/proc/self/fd/{namespace}",
    ]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10.0, pass_fds=[namespace])
    if done.returncode:
        raise RuntimeFailure(f"ip: {' '.join(done.stderr.decode(errors='replace').split())[:300]}")


def _drain(console: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while console.recv(4096):
            continue
