"""Writable views answer as a plain directory of the same file system does: bound by the kernel, and through FUSE alone.

tests/posixcases.py runs on both and the answers are compared, whole: results, errnos, and what stat shows afterwards. A
sample is taken of the large matrices; DUTCHMAN_POSIX_EVERY=1 takes every case (minutes through FUSE). What FUSE alone
cannot do is listed here with what it answers instead, and in README.md under Limits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import add_busybox
from mounting import ROOT, Daemon, can_mount

from engine import host, hostmounts
from engine.engine import Engine

REASON = can_mount() or (None if host.LINUX and host.is_root() else "acting as other users needs root on Linux")
if REASON and os.environ.get("CI") == "true" and host.LINUX and host.is_root():
    raise RuntimeError(f"this test must run in CI: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

SAMPLE = {"single": 97, "pairs": 67, "scenes": 1}
# scene -> what the view answers where libfuse 2 has no such request; None: anything, it is checked elsewhere
FUSE_ALONE: dict[str, Any] = {
    "seek_hole": [0, 4 << 20],  # one piece of data: right, but not helpful
    "renameat2": ["EEXIST", "EINVAL", "ENOENT", ["a", "b"]],
    "tmpfile": "ENOTSUP",
    "acl_enforced": "EACCES",  # the kernel above knows mode bits only
    "append_flag_changes": "oneTend",
}


@pytest.fixture(scope="module", params=["bound", "fuse alone"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    place = Path(tempfile.mkdtemp(prefix="dutchman-posix-"))
    with Engine(place / "store", runtime="fake") as engine:
        add_busybox(engine)
    running = Daemon(place, binds=request.param == "bound", allow_other=True)
    try:
        with running:
            running.sh("mkdir volumes/v containers/c; echo busybox > containers/c/config/image")
            yield running
    finally:
        shutil.rmtree(place, ignore_errors=True)


def answers(place: Path, matrix: str, every: int) -> dict[str, Any]:
    place.mkdir()
    command = [sys.executable, str(ROOT / "tests/posixcases.py"), str(place), matrix, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(plain: Path, view: Path, matrix: str, bound: bool) -> None:
    every = int(os.environ.get("DUTCHMAN_POSIX_EVERY", SAMPLE[matrix] * (2 if bound else 1)))
    wanted, found = answers(plain, matrix, every), answers(view, matrix, every)
    assert len(wanted) > 10
    if not bound:
        for name, instead in FUSE_ALONE.items():
            if name in wanted:
                assert found[name] == instead, name
                del wanted[name], found[name]
        if "fallocate" in wanted:  # allocate, keep size, punch, zero: as it is; collapse the kernel refuses
            assert found["fallocate"][:6] == wanted["fallocate"][:6]
            del wanted["fallocate"], found["fallocate"]
    for name in list(wanted):
        if name.endswith("on device") and found[name][0] == "EACCES":
            del wanted[name], found[name]  # nodev
        elif name.endswith("on fifo") and not bound and found[name][0] == wanted[name][0]:
            del wanted[name], found[name]  # a pipe is the kernel's own: writing to it does not reach the host's times
    different = {name: (wanted[name], found.get(name)) for name in wanted if wanted[name] != found.get(name)}
    assert not different, json.dumps(different, indent=1)[:6000]


def view_of(daemon: Daemon, path: str) -> tuple[Path, bool]:
    """(the view, whether the kernel binds it); waits for the bind where there is one."""
    bound = daemon._env["DUTCHMAN_NO_BIND"] == "0"
    daemon.sh(f"ls {path}")
    if bound:
        daemon.until(f"ls {path} > /dev/null; cat /proc/mounts", f"{daemon.mount}/{path}")
    return daemon.mount / path, bound


@pytest.mark.parametrize("matrix", SAMPLE)
def test_a_volume_is_a_directory(daemon: Daemon, matrix: str) -> None:
    view, bound = view_of(daemon, "volumes/v/data")
    plain = daemon.store / "plain"
    plain.mkdir(exist_ok=True)
    compare(plain / matrix, view / matrix, matrix, bound)


def test_a_root_file_system_is_a_directory(daemon: Daemon) -> None:
    """Compared with the container's own overlay, which is what it is."""
    view, bound = view_of(daemon, "containers/c/rootfs")
    merged = next(
        Path(point) for point, kind, _ in hostmounts.mounts() if kind == "overlay" and str(daemon.store) in point
    )
    for matrix in ("single", "pairs"):
        compare(merged / matrix, view / f"{matrix}-seen", matrix, bound)
