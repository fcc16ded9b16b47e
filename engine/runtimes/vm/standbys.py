"""Machines that stand by: started from a template before anybody asks for one, warmed up, stopped. Floor 2.

Only here: the daemon's side. standbykeeper.py is the process that keeps one, standby.py how one is taken over.

An emulated CPU runs everything slowly once: so a program of ours has been run, on disks of ours that are gone, in the
way a container's will be. A machine that has run a container is never one of these. It takes no CPU while it waits,
only the memory it has written to. There is one per daemon, of the template used last (DUTCHMAN_STANDBY=0 in the
daemon's environment: none), not while memory is low, and not for long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import host
from engine.errors import EngineError
from engine.hostfiles import share
from engine.runtimes.vm import disks, standby, templates, translate
from engine.runtimes.vm.standbykeeper import ASIDE, PROGRAM, SHARED, alive, enough
from engine.store import erofs
from engine.store.merge import Node

log = logging.getLogger(__name__)

VARIABLE = "DUTCHMAN_STANDBY"
AGAIN_SECONDS = 600.0  # for which none is made of a template with which it did not work


class Standbys:
    """Asks for one. Thread-safe; never waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engaged: dict[str, standby.Engaged] = {}  # by the container that starts in it
        self._key = ""  # of the one there is, or that is being made
        self._ready = False
        self._handle = -1  # its keeper's standard input
        self._turn = 0  # counts them: descriptors have the numbers of earlier ones
        self._closed = os.environ.get(VARIABLE, "1") == "0"

    def want(self, program: Sequence[str], directory: Path, request: Mapping[str, Any]) -> None:
        """Have one made of this template, unless there is one, or one is being made. `program` is the shim with its
        options; `request`: keep()."""
        key = str(request["key"])
        with self._lock:
            if self._closed or self._key == key or (self._key and not self._ready):
                return
            if failed(directory, key) or not enough(request):
                return
            self._give_up()
            process = subprocess.Popen(
                [*program, "standby", key],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
            assert process.stdin is not None
            self._key, self._ready, self._handle = key, False, os.dup(process.stdin.fileno())
            self._turn += 1
            arguments = (key, self._turn, process, dict(request) | {"directory": str(directory)})
            threading.Thread(target=self._follow, args=arguments, name="standby", daemon=True).start()

    def _follow(self, key: str, turn: int, process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
        assert process.stdin is not None and process.stdout is not None
        why = ""
        try:
            line = self._request(request)
        except (EngineError, OSError) as error:
            log.warning("no machine of template %s stands by: %s", key, error)
            line, why = b"", str(error)
        process.wait()  # it has left another behind
        with contextlib.suppress(BrokenPipeError):  # which was killed
            process.stdin.write(line)
            process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the handle is a duplicate
        if not line:
            with self._lock:
                if self._turn == turn:
                    self._give_up()
        words = b""
        with process.stdout as said:
            while data := os.read(said.fileno(), 4096):
                words = (words + data)[-2000:]
                if words == b"ready\n":
                    log.info("a machine of template %s stands by", key)
                    with self._lock:
                        self._ready = self._ready or self._turn == turn
        told = " ".join(words.decode(errors="replace").split())[-500:] or why or "its process was killed"
        with self._lock:
            if self._turn == turn:
                self._give_up()
                if not words.startswith(b"ready\n"):
                    with contextlib.suppress(OSError):  # its kernel is gone; a full disk: it is in the log
                        host.write_atomic(Path(request["directory"]) / f"{key}{templates.ALONE}", told.encode(), 0o600)
        log.info("the machine of template %s: %s", key, told)

    def _request(self, request: dict[str, Any]) -> bytes:
        """The line for its keeper: `request` with the disks made, which needs more than a keeper has."""
        place = Path(tempfile.mkdtemp(dir=request["directory"], prefix=ASIDE))
        try:
            parts = make_disks(place, Path(request["agent"]))
        except BaseException:
            host.remove_tree(place)
            raise
        request |= {"place": str(place), "plan": request["plan"] | {"parts": parts}}
        return json.dumps(request).encode() + b"\n"

    def _give_up(self) -> None:
        """The lock is held."""
        if self._handle >= 0:
            os.close(self._handle)
        self._key, self._handle = "", -1

    # --- for a container that starts

    def engage(
        self, id: str, place: Path, plan: Mapping[str, Any], document: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Have the one there is set up for container `id`, with the files its run/vm, `place`, is to have: what its
        owner must know of it. None when there is none, or it cannot be had: it is as if there had been none.
        `left` must follow."""
        directory, key = Path(plan["template"]["directory"]), plan["template"]["key"]
        engaged = None
        try:
            if (engaged := standby.engage(directory, key)) is None:
                return None
            cpus = document.get("linux", {}).get("resources", {}).get("cpu", {}).get("cpus")
            keeper, machine = engaged.pids
            standby.ordinary(keeper, None)
            standby.ordinary(machine, translate.cpu_numbers(cpus) if cpus else None)
            upper = os.open(plan["machine"]["upper"], os.O_RDWR | os.O_CLOEXEC)
            try:
                share(upper, standby.SECONDS)  # what locks it does so until QEMU has ended
                standby.set_up(engaged, place, plan, document, upper, translate.bind_sources(document))
            finally:
                os.close(upper)
        except (EngineError, OSError, ValueError, KeyError) as error:
            log.warning("container %s: what stood by does not work: %s", id[:12], error)
            if engaged is not None:
                engaged.end()
                host.remove_tree(place)
            return None
        with self._lock:
            self._engaged[id] = engaged
        return {"pid": engaged.pids[1], "started": engaged.started}

    def left(self, id: str, taken: bool) -> None:
        """The container's owner has what was engaged for it, or never will."""
        with self._lock:
            engaged = self._engaged.pop(id, None)
        if engaged is not None:
            engaged.leave() if taken else engaged.end()

    def close(self) -> None:
        """Its keeper ends now, and the machine with it."""
        with self._lock:
            self._closed = True
            self._give_up()


def make_disks(place: Path, agent: Path) -> list[list[int]]:
    """`image` and `upper`, as a container's, with the agent as PROGRAM: where the image's parts lie."""
    program = agent.read_bytes()
    digest = hashlib.sha256(program).digest()
    root, file = Node(stat.S_IFDIR | 0o755, 0, None), Node(stat.S_IFREG | 0o755, 0, None)
    file.size, file.sha256, file.data = len(program), digest, f"sha256:{digest.hex()}"
    assert root.kids is not None
    root.kids[PROGRAM.removeprefix("/").encode()] = file
    blocks = -(-len(program) // erofs.BLOCK)
    with open(place / "image", "w+b") as image:
        _, size = erofs.write(root, image, None, [file.data], bytes(16), lambda _: blocks)
        image.seek(size)
        image.write(program.ljust(blocks * erofs.BLOCK, b"\0"))
    disks.make_upper(place / "upper", 64 << 20)
    return [[0, size], [size, blocks * erofs.BLOCK]]


def throwaway(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is run for warming up: a program of ours, in the way `document`, a container's, is."""
    process = document["process"]
    kept = {name: process[name] for name in ("capabilities", "rlimits", "noNewPrivileges") if name in process}
    mounts = [mount for mount in document.get("mounts", ()) if mount.get("type") in _KINDS]
    mounts = [mount for mount in mounts if str(mount["destination"]).startswith(("/proc", "/dev", "/sys"))]
    shared = [
        {"destination": f"/etc/{name}", "type": "bind", "source": name, "options": ["rbind", "rprivate", "rw"]}
        for name in SHARED
    ]
    linux = document.get("linux", {})
    return {
        "process": {"args": [PROGRAM, "warm"], "env": ["PATH=/"], "cwd": "/", "user": {"uid": 0, "gid": 0}} | kept,
        "mounts": [*mounts, *shared],
        "linux": {name: linux[name] for name in ("maskedPaths", "readonlyPaths") if name in linux},
        "hostname": "standby",
    }


_KINDS = {"proc", "tmpfs", "devpts", "sysfs", "cgroup", "mqueue"}


# --- all of them ------------------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    place: Path
    ready: bool
    known: Mapping[str, Any]  # standbykeeper.py, _note

    @property
    def shape(self) -> str:
        return templates.shape(self.known["memory"], self.known["cpus"], self.known["networks"])

    @property
    def held(self) -> int:
        """MiB of memory that it has written to: what it costs."""
        text = Path(f"/proc/{self.known['qemu']}/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) >> 10


def standing(directory: Path) -> list[Standing]:
    """Those of a kernel, whose templates are in `directory`: ready, or being made."""
    out = []
    for pattern in (standby.NAME, ASIDE):
        for place in sorted(directory.glob(f"{pattern}*")):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads((place / "lock").read_bytes())
                if alive(place):
                    out.append(Standing(place, pattern == standby.NAME, known))
    return out


def failed(directory: Path, key: str) -> str:
    """Why none of a template is made for now; empty when one may be."""
    return templates.refused(directory, key, templates.ALONE, AGAIN_SECONDS)


def failures(directory: Path) -> list[str]:
    """A line for each template of a kernel of which none is made for now."""
    lines = []
    for path in sorted(directory.glob(f"*{templates.ALONE}")):
        with contextlib.suppress(FileNotFoundError):
            again = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime + AGAIN_SECONDS))
            if why := failed(directory, path.stem):
                lines.append(f"{path.stem} none stands by before {again}: {why}")
    return lines


def listing(directory: Path) -> list[str]:
    """A line for each that stands by, of a kernel, and for each that could not."""
    lines = failures(directory)
    for item in standing(directory):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ends
            if item.ready:
                when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(item.known["since"]))
                key, pid = item.place.name.removeprefix(standby.NAME), item.known["pid"]
                lines.append(f"{key} standby {item.shape} held={item.held}M pid={pid} since={when}")
    return lines


def summary(kernels: Path) -> dict[str, str]:
    """Of all kernels, for `status`."""
    directories = templates.places(kernels)
    made = [item for directory in directories for item in templates.kept(directory)]
    size = sum(item.bytes for item in made)
    shapes = ", ".join(sorted({templates.shape(*item.shape) for item in made}))
    lines = []
    for item in (item for directory in directories for item in standing(directory)):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ends
            lines.append(f"{item.shape} held={item.held}M" if item.ready else f"{item.shape} is being made")
    alone = [line for directory in directories for line in failures(directory)]
    return {
        "templates": f"{len(made)}, {size >> 20} MiB: {shapes}" if made else "0",
        "standbys": "; ".join([f"{len(lines)}: {', '.join(lines)}" if lines else "0", *alone]),
    }


def forget(directory: Path) -> None:
    """End it: as if somebody had engaged it, and had ended."""
    for place in directory.glob(f"{standby.NAME}*"):
        with contextlib.suppress(OSError, EngineError, ValueError):
            if (engaged := standby.engage(directory, place.name.removeprefix(standby.NAME))) is not None:
                engaged.end()
