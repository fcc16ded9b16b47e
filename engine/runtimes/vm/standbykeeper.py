"""The process that keeps a machine standing by (standbys.py), until it is taken over (standby.py). Floor 2.

It is QEMU's parent, which dies with it. It ends when the daemon does (its standard input), when its directory is gone,
when it has waited for IDLE_SECONDS or memory becomes low. Once a driver has engaged it, it sets the guest up for that
container and ends with the driver's call, until the container's owner has taken the machine; with the owner after that:
it is a shell then that waits for that end. Whatever is killed, what is left has a name nobody takes, and the next
keeper, or the container's next start, removes it.
"""

from __future__ import annotations

import contextlib
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
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from engine import host, hostmounts, userids
from engine.errors import EngineError, RuntimeFailure
from engine.hostfiles import socket_address
from engine.runtimes.pids import start_time
from engine.runtimes.vm import network, sharing, standby, templates
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.guestsetup import MAIN, preparation, run_words
from engine.runtimes.vm.launch import launch, pass_over
from engine.runtimes.vm.templates import Template
from engine.runtimes.vm.transport import SerialWay

ASIDE = ".warming-"
LIMIT_SECONDS = 120  # for one to be ready, on a busy host
ANSWER_SECONDS = 60.0
IDLE_SECONDS = 900.0
LOOK_SECONDS = 5.0
NICE = 10
PROGRAM = "/warm"  # the agent, as a container's program
SHARED = ("resolv.conf", "hostname", "hosts")


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
    sweep(directory.parent.parent)
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    kept = _Kept(place, request)
    try:
        _note(lock, request, 0)
        kept.warm()
        final = directory / f"{standby.NAME}{request['key']}"
        listener = socket.socket(socket.AF_UNIX)
        with socket_address(place / standby.SOCKET) as address:
            listener.bind(address)
        listener.listen(1)
        assert kept.qemu is not None
        _note(lock, request, kept.qemu.pid)
        os.rename(place, final)
        kept.place = final
        signal.alarm(0)
        print("ready", flush=True)
        kept.wait(listener)
    finally:
        kept.end()


def _note(lock: int, request: Mapping[str, Any], machine: int) -> None:
    """For who lists them (standbys.py); `machine`: QEMU's pid, once it is ready."""
    shape = {name: request["machine"][name] for name in ("memory", "cpus")} | {"networks": request["taps"]}
    os.pwrite(lock, json.dumps(shape | {"pid": os.getpid(), "qemu": machine, "since": int(time.time())}).encode(), 0)


def sweep(kernels: Path, young: bool = True) -> None:
    """What killed keepers left."""
    for pattern in (ASIDE, standby.NAME):
        for left in kernels.glob(f"*/templates/{pattern}*"):
            if not alive(left, young):
                host.remove_tree(left)


def alive(place: Path, young: bool = True) -> bool:
    """Whether its keeper lives. One that was just begun counts as alive if `young` ones do."""
    try:
        with open(place / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return young and time.time() - place.stat().st_mtime < LIMIT_SECONDS
    return False


class _Kept:
    def __init__(self, place: Path, request: Mapping[str, Any]) -> None:
        self.place, self.request = place, request
        self.qemu: subprocess.Popen[bytes] | None = None
        self._ours: list[socket.socket] = []
        self._hello = b""
        self._given = False

    def end(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()
        host.remove_tree(self.place)

    # --- until it is ready

    def warm(self) -> None:
        hostmounts.unshare(hostmounts.CLONE_NEWNS)
        hostmounts.keep_to_itself()
        sharing.let_go(self.place.parents[3], self.place)  # others end them
        taps: list[int] = []
        if self.request["taps"]:
            hostmounts.unshare(hostmounts.CLONE_NEWNET)
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

    def _launch(self, template: Template, taps: list[int]) -> None:
        values = self.request["machine"] | {
            "ram": str(template.ram),
            "tsc_khz": template.tsc_khz,
            "image": str(self.place / "image"),
            "upper": str(self.place / "upper"),
            "share": str(self.place / "shares"),
            "standby": True,
        }
        parent = os.getpid()

        def child() -> None:
            host.die_with_parent(signal.SIGKILL, parent)
            os.setsid()

        way = SerialWay()
        launched = launch(self.place, values, way, child, taps=taps, state=[template.state])
        self.qemu, self._ours = launched.process, [way.ours, launched.console, launched.watch]
        pass_over(launched.console)
        launched.watch.sendall(b'{"execute": "qmp_capabilities"}\n' + templates.load(template))

    def _run(self, template: Template) -> None:
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
            if self.request["taps"]:  # addresses for documentation, RFC 5737 and 3849
                addresses = ("192.0.2.2/24", "2001:db8::2/64")
                routes = (network.Route("default", "192.0.2.1"), network.Route("default", "2001:db8::1"))
                some = network.Interface("eth0", "02:00:00:00:00:02", 1500, addresses, routes)
                for words in (network.words(some), network.empty_words("eth0", addresses)):
                    with contextlib.suppress(GuestError):  # a kernel without IPv6
                        link.call("NET", words, deadline=ANSWER_SECONDS)
            link.call("RESET", {"disk": ["/dev/vda", "/dev/vdb"]}, deadline=ANSWER_SECONDS)
        except GuestError as error:
            raise RuntimeFailure(error.reason) from error
        finally:
            link.close()

    # --- after

    def wait(self, listener: socket.socket) -> None:
        """Until it is engaged, or is no longer wanted."""
        assert self.qemu is not None
        pidfd = os.pidfd_open(self.qemu.pid)
        until = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < until and self.place.exists() and enough(self.request):
            ready = _first(LOOK_SECONDS, 0, listener.fileno(), pidfd)
            if ready == listener.fileno():
                driver, _ = listener.accept()
                listener.close()
                self._engaged(driver, pidfd)
            if ready >= 0:  # the daemon has ended, or QEMU has
                return

    def _engaged(self, driver: socket.socket, pidfd: int) -> None:
        """Set the guest up as the driver says, and give it to the container's owner, which replaces this process."""
        assert self.qemu is not None
        for name in (standby.SOCKET, "lock"):
            (self.place / name).unlink()
        owners = socket.socket(socket.AF_UNIX)
        with socket_address(self.place / standby.OWNERS) as address:
            owners.bind(address)
        owners.listen(1)
        print("taken", flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(driver.fileno(), 0)
        os.dup2(null, 1)
        known: dict[str, Any] = {"keeper": os.getpid(), "pid": self.qemu.pid, "started": start_time(self.qemu.pid)}
        standby.send(driver, known, [pidfd])
        wish, fds = standby.receive(driver)
        if not wish:
            return  # it was not wanted after all
        self.place = self.place.rename(wish["place"])
        standby.send(driver, {"place": wish["place"]})
        threading.Thread(target=self._end_with_driver, daemon=True).start()
        try:
            known = self._set_up(wish, fds)
        except (EngineError, OSError, ValueError, subprocess.SubprocessError) as error:
            self.qemu.kill()
            self.qemu.wait()
            known = {"failed": error.reason if isinstance(error, EngineError | GuestError) else str(error)}
        for fd in fds:
            os.close(fd)
        if _first(None, owners.fileno(), 0, pidfd if "failed" not in known else -1) != owners.fileno():
            return
        owner, _ = owners.accept()
        self._given = True
        if "failed" in known:
            standby.send(owner, known)
            return
        known |= {"pid": self.qemu.pid, "hello": self._hello.hex()}
        standby.send(owner, known, [*(end.fileno() for end in self._ours), pidfd])
        os.dup2(owner.fileno(), 0)
        os.dup2(null, 2)
        # a child that has ended keeps its number until this process ends: no other can have it
        os.execv("/bin/sh", ["sh", "-c", 'read -r end; kill -9 "$1"', "dutchman-vm-keeper", str(self.qemu.pid)])

    def _end_with_driver(self) -> None:
        """While the guest is set up nobody looks at standard input."""
        _first(None, 0)
        if not self._given and self.qemu is not None:
            self.qemu.kill()

    def _set_up(self, wish: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """What the container's owner would do: the stream of RUN, or what the guest says against it."""
        plan, document, (upper, *trees) = wish["plan"], wish["document"], fds
        moved: Future[None] = Future()
        if plan["taps"]:
            namespace, *trees = trees
            # aside, for that takes as long as all else
            threading.Thread(target=_move_taps, args=(plan["taps"], namespace, moved), daemon=True).start()
        else:
            moved.set_result(None)
        shares = os.open(self.place / "shares", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for number, (tree, (is_dir, writable)) in enumerate(zip(trees, wish["shares"], strict=True)):
            self._attach(shares, str(number), tree, is_dir, writable)
        standby.go_on(self._ours[2], plan["machine"]["image"], upper)
        link = AgentClient(self._ours[0].dup(), deadline=None, hello=self._hello)
        try:
            link.calls(preparation(plan, document), deadline=ANSWER_SECONDS)
            try:
                stream, _ = link.open("RUN", run_words(plan, document), deadline=ANSWER_SECONDS)
            except GuestError as error:
                return {"stream": 0, "refused": [error.errno, error.verb, error.step]}
            moved.result()
            return {"stream": stream.number, "refused": None}
        finally:
            link.close()

    def _attach(self, shares: int, name: str, tree: int, is_dir: bool, writable: bool) -> None:
        if is_dir:
            os.mkdir(name, dir_fd=shares)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=shares))
        target = Path(f"/proc/self/fd/{shares}/{name}")
        try:
            hostmounts.move_mount(tree, target)
        except OSError as error:
            raise OSError(error.errno, f"attaching what is shared: {error.strerror}") from error
        hostmounts.mount("none", target, "none", hostmounts.MS_REC | hostmounts.MS_SLAVE)
        if not writable:  # whatever the guest says
            hostmounts.make_read_only(target)


def _move_taps(count: int, namespace: int, done: Future[None]) -> None:
    target = f"/proc/self/fd/{namespace}"
    lines = "".join(f"link set dev tap{number} netns {target}\n" for number in range(count))
    try:
        ip = subprocess.run(
            [shutil.which("ip", path=network.PATHS) or "ip", "-batch", "-"],
            input=lines.encode(),
            capture_output=True,
            timeout=10.0,
            pass_fds=[namespace],
        )
        if ip.returncode:
            raise RuntimeFailure(f"ip: {' '.join(ip.stderr.decode(errors='replace').split())[:300]}")
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)


def _first(seconds: float | None, *fds: int) -> int:
    """The first of these that can be read, or is at its end; -1 after so many seconds. Those below 0 do not count."""
    poll = select.poll()
    for fd in fds:
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
    return next((fd for fd in fds if fd in ready), -1)
