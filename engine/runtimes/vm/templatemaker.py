"""Makes templates (templates.py), in the background, after a machine had to be booted. Floor 2.

Only here: the process that makes one (shim.py template), the daemon's side of it, and which templates are given up.

One is made at a time per store, in a process of its own: the lock goes with it, QEMU ends with it, it ends with the
daemon or after LIMIT_SECONDS, and whatever is left when it is killed has a name nobody takes for a template (the next
one removes it).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from engine import host, hostmounts
from engine.errors import Busy, EngineError, RuntimeFailure
from engine.runtimes.vm import network, templates
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.launch import launch, pass_over
from engine.runtimes.vm.templates import ABOUT, MAKING, RAM, STATE, Kept
from engine.runtimes.vm.transport import SerialWay

log = logging.getLogger(__name__)

LIMIT_SECONDS = 180  # for one template, on a busy host
HELLO_SECONDS = 120.0
SAVE_SECONDS = 30.0
MOST = 16  # templates of a store
MOST_BYTES = 4 << 30  # of them on disk
NICE = 10


# --- the daemon's side ------------------------------------------------------------------------------------------------


class Makers:
    """Asks for templates. Thread-safe; never waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._making: subprocess.Popen[bytes] | None = None
        self._closed = False

    def want(self, program: Sequence[str], directory: Path, request: Mapping[str, Any]) -> bool:
        """Have it made, unless it is there, did not work lately, or another is being made: the next start asks again.
        `program` is the shim with its options; `request`: make()."""
        key = request["key"]
        if (directory / key).exists():
            return False
        if why := templates.refused(directory, key):
            log.info("template %s is not made again for now: %s", key, why)
            return False
        with self._lock:
            if self._closed or self._making is not None:
                return False
            self._making = subprocess.Popen(
                [*program, "template", key],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
            threading.Thread(target=self._wait, args=(self._making, request), name="template", daemon=True).start()
        return True

    def _wait(self, process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
        assert process.stdin is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed; its status tells
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()  # and stays open: the maker ends when this process does
        said = process.stderr.read()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stderr.close()
        with self._lock:
            self._making = None
        words = " ".join(said.decode(errors="replace").split())[-500:]
        if process.returncode == 0:
            log.info("template %s was made%s", request["key"], f": {words}" if words else "")
        elif not self._closed:
            log.info("template %s was not made (status %d): %s", request["key"], process.returncode, words)

    def close(self) -> None:
        """What is being made is given up."""
        with self._lock:
            self._closed = True
            process = self._making
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()


# --- the process that makes one ---------------------------------------------------------------------------------------


def main(stdin: IO[str]) -> int:
    """Of `shim.py template`. The request is a line on standard input, whose end is this process's; 0: it is there."""
    signal.alarm(LIMIT_SECONDS)
    os.nice(NICE)
    request = json.loads(stdin.readline())

    def end_with_daemon() -> None:
        stdin.read()
        os._exit(4)

    threading.Thread(target=end_with_daemon, daemon=True).start()
    try:
        make(Path(request["directory"]), request)
    except Busy as error:
        print(error, file=sys.stderr)
        return 3
    except (EngineError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make(directory: Path, request: Mapping[str, Any]) -> None:
    """`request`: key and facts (templates.wanted), machine (values of qemu.Machine), taps. `directory` is a kernel's
    templates. Busy while another is made."""
    store = directory.parent.parent
    lock = os.open(store / ".templates", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another template is being made") from None
        for left in store.glob(f"*/templates/{MAKING}*"):
            host.remove_tree(left)
        final = directory / request["key"]
        if final.exists():
            return
        directory.mkdir(exist_ok=True, mode=0o700)
        aside = Path(tempfile.mkdtemp(dir=directory, prefix=MAKING))
        try:
            _fill(aside, request)
            aside.rename(final)
            host.fsync_dir(directory)
        finally:
            host.remove_tree(aside)
        for item in given_up([one for place in templates.places(store) for one in templates.kept(place)]):
            remove(item)
    finally:
        os.close(lock)


def _fill(aside: Path, request: Mapping[str, Any]) -> None:
    (aside / "shares").mkdir()
    taps: list[int] = []
    if request["taps"]:
        hostmounts.unshare(hostmounts.CLONE_NEWNET)
        taps = network.make_taps(Path("/proc/self/ns/net"), request["taps"])
    values = request["machine"] | {"share": str(aside / "shares"), "ram": str(aside / RAM), "making": True}
    parent = os.getpid()

    def child() -> None:
        host.die_with_parent(signal.SIGKILL, parent)
        if host.LINUX:
            os.umask(0o077)

    state = os.open(aside / STATE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    way = SerialWay()
    process, console, watch = launch(aside, values, way, child, taps=taps)
    try:
        pass_over(console)
        link = AgentClient(way.ours, deadline=HELLO_SECONDS)
        link.call("SYNC")
        _save(watch, state)
    except (EngineError, GuestError) as error:
        process.kill()
        process.wait()
        said = " ".join((aside / "qemu.log").read_bytes()[:4096].decode(errors="replace").split())[-500:]
        raise RuntimeFailure(f"{error.reason}{': ' + said if said else ''}") from error
    finally:
        process.kill()
        process.wait()
    _describe(aside, request, link.greeting, state)


def _save(control: socket.socket, state: int) -> None:
    """Have QEMU write the state. RuntimeFailure with its words."""
    control.settimeout(SAVE_SECONDS)
    capabilities = templates.ignore_shared()
    capabilities["arguments"]["capabilities"].append({"capability": "events", "state": True})
    lines: list[tuple[dict[str, Any], list[int]]] = [
        ({"execute": "qmp_capabilities"}, []),
        (capabilities, []),
        ({"execute": "getfd", "arguments": {"fdname": "state"}}, [state]),
        ({"execute": "migrate", "arguments": {"uri": "fd:state"}}, []),
    ]
    with control.makefile("rb") as stream:
        try:
            for line, descriptors in lines:
                socket.send_fds(control, [json.dumps(line).encode() + b"\n"], descriptors)
            while answer := stream.readline(templates.MAX_TEXT):
                said = json.loads(answer)
                if "error" in said:
                    raise RuntimeFailure(f"QEMU: {said['error'].get('desc')}")
                if said.get("event") != "MIGRATION":
                    continue
                status = said["data"]["status"]
                if status == "completed":
                    return
                if status in ("failed", "cancelled"):
                    raise RuntimeFailure(f"QEMU could not save the guest: {status}")
        except (OSError, ValueError) as error:
            raise RuntimeFailure(f"QEMU did not save the guest: {error}") from error
    raise RuntimeFailure("QEMU ended before the guest was saved")


def _describe(aside: Path, request: Mapping[str, Any], hello: bytes, state: int) -> None:
    """Make the files durable, and say in template.json what they are."""
    os.fsync(state)
    with open(aside / RAM, "rb") as ram:
        os.fchmod(ram.fileno(), 0o600)
        os.fsync(ram.fileno())
        there = os.fstat(ram.fileno())
    saved = os.fstat(state)
    checksum = zlib.crc32(os.pread(state, saved.st_size, 0))
    about = {
        "facts": request["facts"],
        "hello": hello.hex(),
        "tsc_khz": request["machine"]["tsc_khz"],
        "memory": request["machine"]["memory"],
        "cpus": request["machine"]["cpus"],
        "taps": request["taps"],
        RAM: {"size": there.st_size, "mtime_ns": there.st_mtime_ns},
        STATE: {"size": saved.st_size, "mtime_ns": saved.st_mtime_ns, "crc32": checksum},
    }
    os.close(state)
    (aside / "shares").rmdir()
    for name in ("qemu.log", "qmp.sock"):
        (aside / name).unlink(missing_ok=True)
    host.write_atomic(aside / ABOUT, json.dumps(about).encode(), 0o600)
    host.fsync_dir(aside)


# --- those given up ---------------------------------------------------------------------------------------------------


def given_up(all_of_them: Sequence[Kept], most: int = MOST, most_bytes: int = MOST_BYTES) -> list[Kept]:
    """Which templates are to go: those of another host or another QEMU, then those used least lately. Never the one
    used last."""
    now = templates.host_facts()
    out, held, size = [], 0, 0
    for item in sorted(all_of_them, key=lambda item: -item.used_ns):
        qemu_facts = item.facts.get("qemu") or [""]
        stale = item.facts.get("host") != now or qemu_facts != templates.program(str(qemu_facts[0]))
        if stale or (held and (held >= most or size + item.bytes > most_bytes)):
            out.append(item)
        else:
            held, size = held + 1, size + item.bytes
    return out


def remove(item: Kept) -> bool:
    """False while a machine is being started from it."""
    with contextlib.suppress(FileNotFoundError), open(item.place / ABOUT, "rb") as about:
        try:
            fcntl.flock(about, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        templates.discard(item.place.parent, item.key)
    return True
