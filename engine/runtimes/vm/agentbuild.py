"""The guest's agent as a static program, built from guest/*.c by Zig's C compiler, which carries musl for each target.

Floor 2. Same sources and compiler, same bytes. Built once per sources, compiler and architecture, into a cache of the
caller. Thread- and process-safe: one builds at a time, the others wait for it; made aside, renamed into place; what one
that was killed has left is removed by the next, and its compiler ends with it. Deterministic: no paths, times or build
ids inside. Those of other releases are removed but for the last few; what another process uses has its shared flock(2).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from engine import host
from engine.errors import RuntimeFailure, Unsupported

SOURCES = Path(__file__).parent / "guest"
ARCHITECTURES = ("x86_64", "aarch64")
FLAGS = ("-static", "-Os", "-s", "-std=gnu11", "-Wall", "-fno-sanitize=all", "-g0", "-Wl,--build-id=none")
DEADLINE = 600  # seconds: the first build of an architecture makes its C library too
LOOK = 0.5  # seconds between two looks at the compiler, or at who builds
ASIDE, LOCK = ".agent-", ".lock"
NAME = re.compile(r"agent-(?P<architecture>[^-]+)-(?P<sources>[^-]+)-.+")
KEEP = 4  # agents of an architecture: going back to another release need not build again

_guard = threading.Lock()
_held: dict[Path, int] = {}  # what this process uses -> a descriptor with the lock; for as long as it lives


def compiler() -> str:
    """Version of the Zig compiler. Unsupported where it is not installed."""
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(
            "runtime vm: the guest's agent is not built, and its compiler, Python's ziglang, is not installed",
            hint=f"{sys.executable} -m pip install ziglang (the extra `vm` of this project has it)",
        ) from None


@functools.cache
def build_id() -> str:
    """16 hex digits of the sources and flags; the agent says them in its HELLO."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def built(architecture: str, cache: Path) -> Path | None:
    """The agent of these sources, by whichever compiler, when it is there."""
    return next(iter(sorted(cache.glob(f"agent-{architecture}-{build_id()}-*"))), None)


def check(architecture: str, cache: Path) -> None:
    """Unsupported, with what to do, when `build` could not give an agent. Builds nothing."""
    if architecture not in ARCHITECTURES:
        raise Unsupported(f"no agent for the architecture {architecture}")
    if built(architecture, cache) is None:
        compiler()


def build(
    architecture: str,
    cache: Path,
    tell: Callable[[str], None] = lambda text: None,
    check_on: Callable[[], None] = lambda: None,
) -> Path:
    """The agent for `architecture` (uname's name) below `cache`, made when absent. RuntimeFailure: no build.

    `tell` hears what is waited for; `check_on` is called often, to end it by raising.
    """
    check(architecture, cache)
    while True:
        found = built(architecture, cache) or _make(architecture, cache, tell, check_on)
        if _hold(found):
            return found


def _hold(agent: Path) -> bool:
    """Nobody removes it while this process lives. False when somebody has."""
    with _guard:
        try:
            fd = os.open(agent, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        fcntl.flock(fd, fcntl.LOCK_SH)
        now, old = os.fstat(fd), _held.get(agent)
        if now.st_nlink == 0 or (old is not None and os.path.sameopenfile(old, fd)):
            os.close(fd)
            return now.st_nlink > 0
        if old is not None:
            os.close(old)
        _held[agent] = fd
        with suppress(OSError):  # a cache that is not to be written to
            os.utime(agent)  # it is the one used last
    prune(agent.parent)
    return True


def prune(cache: Path) -> None:
    """Remove agents of other sources, but for the last KEEP of an architecture and those in use."""
    found: list[tuple[int, Path]] = []
    for path in cache.glob("agent-*"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    kept: Counter[str] = Counter()
    for _, path in sorted(found, reverse=True):
        if (ours := NAME.fullmatch(path.name)) is None or not path.is_file():
            continue
        kept[ours["architecture"]] += 1
        if kept[ours["architecture"]] <= KEEP or ours["sources"] == build_id():
            continue
        with suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # else it is gone, and another may have its name
                path.unlink()


def _make(architecture: str, cache: Path, tell: Callable[[str], None], check_on: Callable[[], None]) -> Path:
    version = compiler()
    target = cache / f"agent-{architecture}-{build_id()}-{version}"
    cache.mkdir(parents=True, exist_ok=True)

    def look(seconds: float) -> None:
        check_on()
        tell(f"Zig {version} builds the agent of guests, once: {seconds:.0f} s (1 to 4 minutes with its C library)")

    with _alone(cache, tell, check_on):
        if (found := built(architecture, cache)) is not None:
            return found
        for left in cache.glob(f"{ASIDE}*"):
            host.remove_tree(left)
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=cache) as aside:
            made = Path(aside) / "agent"
            compile_sources(architecture, made, look)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.chmod(0o755)
            made.replace(target)
    return target


@contextmanager
def _alone(cache: Path, tell: Callable[[str], None], check_on: Callable[[], None]) -> Iterator[None]:
    """Nobody else builds below `cache`; the lock goes with this process."""
    with open(cache / LOCK, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check_on()
                tell("another process builds the agent of guests")
                time.sleep(LOOK)
        yield


def compile_sources(architecture: str, output: Path, look: Callable[[float], None] = lambda seconds: None) -> None:
    """Compile now, whatever a cache has. `look` is called often with the seconds it has taken; it may raise."""
    names = [path.name for path in sorted(SOURCES.glob("*.c"))]
    argv = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl", *FLAGS]
    argv += [f'-DBUILD="{build_id()}"', "-o", str(output.absolute()), *names]
    began = time.monotonic()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            argv,
            cwd=SOURCES,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            start_new_session=True,
            preexec_fn=partial(host.die_with_parent, signal.SIGKILL, os.getpid()),
        )
        try:
            while (taken := time.monotonic() - began) < DEADLINE:
                look(taken)
                try:
                    process.wait(LOOK)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                raise RuntimeFailure(f"the compiler took longer than {DEADLINE} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # it has children
            process.wait()
            raise
        words.seek(0)
        said = words.read()
    if process.returncode:
        raise RuntimeFailure(f"the guest's agent does not compile: {said.decode(errors='replace')[-2000:]}")
