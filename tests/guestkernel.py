"""A real guest kernel for tests: Debian's, fetched by tools/setup test into .cache/kernels, imported once per machine.

$DUTCHMAN_TEST_KERNEL names another kernel file to take (a tuned vmlinux boots in half the time).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from engines import add_busybox

from engine import kernelimage, kernelmodules, kernelpackage
from engine.engine import Engine
from engine.kernels import Kernel, Kernels

CACHE = Path(__file__).parents[1] / ".cache" / "kernels"
SOURCES = (kernelimage, kernelmodules, kernelpackage)


def package() -> Path:
    """Debian's kernel package. Skips where there is none."""
    found = sorted(CACHE.glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("no guest kernel: tools/setup test fetches one into .cache/kernels where apt-get knows it")
    return found[-1]


def stocked(store: Path, kernel: Path | None = None) -> Kernel:
    """A new store with the image busybox, and a kernel: that file's, or of the package. For benches."""
    with Engine(store, runtime="oci") as engine:
        add_busybox(engine)
        return engine.kernels.import_(kernel or package())


def guest_kernels() -> Kernels:
    """The cache's kernels, with one in it; its directory serves as a store's `kernels`. Read-only for tests."""
    given = os.environ.get("DUTCHMAN_TEST_KERNEL")
    path = Path(given) if given else package()
    about = f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in SOURCES)
    key = hashlib.sha256(about.encode() + code).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    kernels = Kernels(CACHE / f"imported-{key}")
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run beside each other
        if not kernels.names():
            kernels.clean()
            kernels.import_(path)
    return kernels


def copy_kernels(store: Path, *, templates: bool = False) -> None:
    """Give a store these kernels, to do with as it likes. With `templates` also those there are: then it boots no
    machine whose like has been booted; without them none that may be in the making comes along either."""
    given, own = guest_kernels().directory, store / "kernels"
    ignore = shutil.ignore_patterns("templates", ".*")
    shutil.copytree(given, own, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    for made in given.glob("*/templates/[0-9a-f]*/template.json") if templates else ():
        target = own / made.parent.relative_to(given)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            shutil.copytree(made.parent, target)
        except (shutil.Error, FileNotFoundError):  # it has just been given up
            shutil.rmtree(target, ignore_errors=True)


def share_kernels(store: Path) -> None:
    """Give a store these kernels, to be used alone: the templates it makes are for other tests, too."""
    store.mkdir(parents=True, mode=0o700, exist_ok=True)
    (store / "kernels").symlink_to(guest_kernels().directory)


def guest_kernel() -> Kernel:
    return guest_kernels().get(None)
