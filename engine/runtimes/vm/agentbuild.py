"""The guest's agent as a static program, built from guest/*.c by Zig's C compiler, which carries musl for each target.

Floor 2. Same sources and compiler, same bytes. Built once per sources, compiler and architecture, into a cache of the
caller. Thread- and process-safe: made aside, renamed into place. Deterministic: no paths, times or build ids inside.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.errors import RuntimeFailure, Unsupported

SOURCES = Path(__file__).parent / "guest"
ARCHITECTURES = ("x86_64", "aarch64")
FLAGS = ("-static", "-Os", "-s", "-std=gnu11", "-Wall", "-fno-sanitize=all", "-g0", "-Wl,--build-id=none")
DEADLINE = 600  # seconds: the first build of an architecture makes its C library too


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


def build(architecture: str, cache: Path) -> Path:
    """The agent for `architecture` (uname's name) below `cache`, made when absent. RuntimeFailure: no build."""
    check(architecture, cache)
    if (found := built(architecture, cache)) is not None:
        return found
    target = cache / f"agent-{architecture}-{build_id()}-{compiler()}"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".agent-", dir=cache) as aside:
        made = Path(aside) / "agent"
        compile_sources(architecture, made)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.chmod(0o755)
        made.replace(target)
    return target


def compile_sources(architecture: str, output: Path) -> None:
    """Compile now, whatever a cache has."""
    names = [path.name for path in sorted(SOURCES.glob("*.c"))]
    argv = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl", *FLAGS]
    argv += [f'-DBUILD="{build_id()}"', "-o", str(output.absolute()), *names]
    try:
        done = subprocess.run(argv, cwd=SOURCES, capture_output=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(f"the compiler took longer than {DEADLINE} s") from None
    if done.returncode:
        raise RuntimeFailure(f"the guest's agent does not compile: {done.stderr.decode(errors='replace')[-2000:]}")
