"""Guest kernels: several at once, one of them the default; import, removal. Floor 2.

Only here: the directory of a kernel. It is made aside and renamed into place, so what is there is whole; a restart has
nothing to reconcile but litter. No state but files, so all callers, other processes too, see the same. Thread-safe.

    kernels/default             a symlink to the one containers get that name none
    kernels/<name>/vmlinux      what QEMU boots: ELF (x86_64) or Image (aarch64), unpacked
                   kernel.json  what is known of it
                   modules/     NAME.ko, and `order`: names in the order they are loaded in
                   initfs       fetched with it, if so
                   initfs-<hash of the agent>.cpio    made from an agent when first wanted
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import host, kernelimage, kernelmodules, kernelpackage
from engine.errors import AlreadyExists, Busy, Damaged, InvalidArgument, NotFound, TooLarge
from engine.kernelimage import KernelFile
from engine.kernelmodules import Chosen
from engine.runtimes.vm import initfs
from engine.runtimes.vm.standbykeeper import sweep
from engine.runtimes.vm.templates import MAKING

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+~-]{0,127}\Z")
DEFAULT = "default"
HINT = "echo 'import PATH' > kernels/ctl: a vmlinux, a vmlinuz with everything built in, or Debian's linux-image-….deb"
KEPT_INITFS = 4  # made for agents of the past, per kernel
ASIDE = ".import-"
PART = ".fetch-"  # of a download that can be resumed, then its digest
PART_SECONDS = 7 * 86400.0  # for which nobody went on with it
Record = Callable[[str, str, Mapping[str, Any]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    directory: Path
    version: str  # as `uname -r` says it in a guest
    arch: str  # as `uname -m` says it
    acpi: bool  # whether it finds its devices by ACPI alone (no CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)
    digest: str  # of the file it came from
    source: str
    format: str = ""
    verified: str = ""  # against what the digest was checked
    image_digest: str = ""  # of `image`
    features: tuple[str, ...] = ()  # empty: not known (no configuration in it)

    @property
    def image(self) -> Path:
        return self.directory / "vmlinux"

    @property
    def modules(self) -> list[str]:
        """In the order they are loaded in; none when everything is built in."""
        listed = self.directory / "modules" / "order"
        return listed.read_text().split() if listed.exists() else []

    def initfs(self, agent: Path | None) -> Path:
        """The initial file system with this agent, made when it is not there yet; without an agent the one fetched."""
        if agent is None:
            if not (fetched := self.directory / "initfs").exists():
                raise NotFound(f"no initfs was fetched with kernel {self.name}", at=self.name)
            return fetched
        data = agent.read_bytes()
        path = self.directory / f"initfs-{hashlib.sha256(data).hexdigest()[:16]}.cpio"
        if not path.exists():
            modules = [(name, (self.directory / "modules" / f"{name}.ko").read_bytes()) for name in self.modules]
            host.write_atomic(path, initfs.build(data, modules))
            for old in self.made()[KEPT_INITFS:]:
                old.unlink(missing_ok=True)
        return path

    def made(self) -> list[Path]:
        """Initial file systems made for agents, newest first."""
        found = []
        for path in self.directory.glob("initfs-*.cpio"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        return [path for _, path in sorted(found, reverse=True)]


def told(kernel: Kernel) -> dict[str, str]:
    """What an event tells of it."""
    return {key: getattr(kernel, key) for key in ("version", "arch", "digest", "source", "verified")}


class Kernels:
    """`users` names the containers that want a kernel or run with it (None: whatever is the default). What changes is
    done within `record(type of event, name, data)`."""

    def __init__(
        self,
        directory: Path,
        users: Callable[[str | None], Sequence[str]] = lambda name: (),
        record: Record = lambda type_, name, data: nullcontext(),
    ) -> None:
        self.directory = directory
        self.users_of = users
        self._record = record
        self._lock = threading.RLock()  # held for renames and unlinks, never while a kernel is read

    # --- reading ------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        try:
            found = sorted(entry.name for entry in os.scandir(self.directory) if NAME.match(entry.name))
        except FileNotFoundError:
            return []
        return [name for name in found if name != DEFAULT and (self.directory / name / "kernel.json").exists()]

    def all(self) -> list[Kernel]:
        """Every kernel that is whole, by name."""
        out = []
        for name in self.names():
            with suppress(NotFound, Damaged):  # removed meanwhile; told where it is asked for by its name
                out.append(self._load(name))
        return out

    def _load(self, name: str) -> Kernel:
        try:
            facts = json.loads((self.directory / name / "kernel.json").read_bytes())
            facts["features"] = tuple(facts.get("features", ()))
            return Kernel(name, self.directory / name, **facts)
        except FileNotFoundError as error:
            raise NotFound(f"no kernel {name!r} is here", at=name, hint=HINT) from error
        except (ValueError, TypeError) as error:
            raise Damaged(f"kernel.json of {name} is damaged: {error}", at=name, hint="remove and import it") from error

    def get(self, name: str | None = None, arch: str = "") -> Kernel:
        """The kernel `name`, or the default one; of `arch` where that is given. NotFound says how to get one;
        InvalidArgument when `name` is for another."""
        if not name:
            name = self.default(arch)
            if name is None:
                other = arch not in ("", platform_arch())
                words = f"no guest kernel {f'for {arch} ' if arch else ''}is here"
                raise NotFound(words, at=arch or None, hint=HINT + (f"; add arch={arch}" if other else ""))
        if not NAME.match(name) or name == DEFAULT:
            raise NotFound(f"no kernel {name[:140]!r} is here", at=name[:140], hint=HINT)
        kernel = self._load(name)
        if arch and kernel.arch != arch:
            raise InvalidArgument(f"kernel {name} is for {kernel.arch}, the guest is {arch}", at=name)
        return kernel

    def default(self, arch: str = "") -> str | None:
        """The one chosen, else that with the newest version; None when there are none. `arch`: of that architecture;
        else one of another than this host's only where there is no other."""
        every = self.all()
        try:
            chosen = os.path.basename(os.readlink(self.directory / DEFAULT))
        except OSError:
            chosen = ""
        others = {kernel.name for kernel in every if arch and kernel.arch != arch}
        if chosen and chosen not in others and (self.directory / chosen / "kernel.json").exists():
            return chosen
        found = [kernel for kernel in every if kernel.arch == (arch or platform_arch())]
        if not found and not arch:
            found = every
        newest = max(found, key=lambda item: [int(part) for part in re.findall(r"\d+", item.version)], default=None)
        return None if newest is None else newest.name

    def users(self, name: str) -> list[str]:
        """Containers that name this kernel, and, when it is the default, those of virtual machines that name none."""
        out = list(self.users_of(name))
        if name == self.default():
            out += self.users_of(None)
        return sorted(set(out))

    # --- changing -----------------------------------------------------------------------------------------------

    def choose(self, name: str) -> None:
        """Make `name` the default."""
        with self._lock:
            self.get(name)
            aside = self.directory / f"{ASIDE}default"
            aside.unlink(missing_ok=True)
            aside.symlink_to(name)
            with self._record("kernelChosen", name, {}):
                aside.rename(self.directory / DEFAULT)
                host.fsync_dir(self.directory)

    def remove(self, name: str) -> None:
        """Busy while a container wants it."""
        with self._lock:
            if name not in self.names():  # one that is damaged can be removed
                self.get(name)
            if users := self.users(name):
                raise Busy(
                    f"kernel {name} is used by {', '.join(users[:8])}",
                    at=name,
                    hint="give them another kernel (config/kernel), or remove them first",
                )
            aside = Path(tempfile.mkdtemp(dir=self.directory, prefix=ASIDE))
            with self._record("kernelRemoved", name, {}):
                (self.directory / name).rename(aside / name)
                link = self.directory / DEFAULT
                if link.is_symlink() and os.path.basename(os.readlink(link)) == name:
                    link.unlink()
                host.fsync_dir(self.directory)
        shutil.rmtree(aside)

    def unused(self) -> list[Kernel]:
        """What no container wants or runs with and is no default, of any architecture, by name."""
        defaults = {self.default(), *(self.default(arch) for arch in kernelimage.ARCHITECTURES)}
        return [kernel for kernel in self.all() if kernel.name not in defaults and not self.users(kernel.name)]

    def clean(self) -> None:
        """Remove what a daemon left that ended in the middle of an import or of making a template or a machine that was
        to stand by, and downloads that nobody went on with for a week."""
        here = self.directory
        for path in [*here.glob(f"{ASIDE}*"), *here.glob(f"*/{host.ASIDE}*"), *here.glob(f"*/templates/{MAKING}*")]:
            path.unlink() if path.is_symlink() or path.is_file() else host.remove_tree(path)
        sweep(here, young=False)
        for path in self.directory.glob(f"{PART}*"):
            if time.time() - path.lstat().st_mtime > PART_SECONDS:
                path.unlink()

    def import_(
        self,
        path: Path,
        name: str | None = None,
        arch: str | None = None,
        check: Callable[[], None] = lambda: None,
        digest: str = "",
    ) -> Kernel:
        """A kernel file or a Debian kernel package, for `arch` (this machine's unless given); `digest` pins it."""
        if not path.is_file():
            raise NotFound("no such file", at=str(path))
        if path.stat().st_size > 2 << 30:
            raise TooLarge("a file of more than 2 GiB is no kernel", at=str(path))
        with open(path, "rb") as file:
            found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            if digest and found != digest:
                raise Damaged(f"the file is {found}, not {digest}", at=digest)
            file.seek(0)
            packaged = kernelpackage.is_package(file.read(8))
        if packaged:
            self.directory.mkdir(parents=True, exist_ok=True)
            package = kernelpackage.read(path, self.directory, arch or platform_arch(), check)
            kernel = kernelimage.read(package.image, arch or platform_arch())
            config = package.config or kernel.config
            return self._keep(kernel, package.chosen, name, config, found, str(path), digest)
        return self.add(path.read_bytes(), str(path), name, arch, digest=digest)

    def add(
        self,
        data: bytes,
        source: str,
        name: str | None = None,
        arch: str | None = None,
        *,
        digest: str = "",
        config: str = "",
        initfs: bytes = b"",
        event: str = "kernelImported",
    ) -> Kernel:
        """A kernel file with everything built in. `digest`: of what it came in, checked already."""
        kernel = kernelimage.read(data, arch or platform_arch())
        config = kernel.config or config
        chosen = kernelmodules.choose((), lambda name: b"", (), config, kernel.arch)
        found = digest or "sha256:" + hashlib.sha256(data).hexdigest()
        return self._keep(kernel, chosen, name, config, found, source, digest, initfs, event)

    def _keep(
        self,
        kernel: KernelFile,
        chosen: Chosen,
        name: str | None,
        config: str,
        digest: str,
        source: str,
        pinned: str,
        fetched: bytes = b"",
        event: str = "kernelImported",
    ) -> Kernel:
        name = name or kernel.version
        check_kernel_name(name)
        if name in self.names():
            raise AlreadyExists(f"a kernel {name} is here", at=name, hint=f"rmdir kernels/{name} removes it")
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=self.directory, prefix=ASIDE))
        try:
            cmdline = kernelmodules.settings(config).get("VIRTIO_MMIO_CMDLINE_DEVICES") == "y"
            facts: dict[str, Any] = {
                "version": kernel.version,
                "arch": kernel.arch,
                # without a configuration: the parameter of that name is in the image when the option is
                "acpi": not (cmdline if config else b"virtio_mmio.device" in kernel.data),
                "digest": digest,
                "source": source,
                "format": kernel.format,
                "verified": pinned,
                "image_digest": "sha256:" + hashlib.sha256(kernel.data).hexdigest(),
                "features": chosen.features,
            }
            host.write_atomic(aside / "vmlinux", kernel.data)
            if fetched:
                host.write_atomic(aside / "initfs", fetched)
            if chosen.modules:
                (aside / "modules").mkdir()
                for module, data in chosen.modules:
                    host.write_atomic(aside / "modules" / f"{module}.ko", data)
                order = "".join(f"{module}\n" for module, _ in chosen.modules)
                host.write_atomic(aside / "modules" / "order", order.encode())
            host.write_atomic(aside / "kernel.json", json.dumps(facts, indent=1).encode() + b"\n")
            aside.chmod(0o755)
            made = Kernel(name, self.directory / name, **facts)
            with self._lock, self._record(event, name, told(made)):
                try:
                    aside.rename(self.directory / name)
                except OSError as error:
                    raise AlreadyExists(f"a kernel {name} is here", at=name) from error
                host.fsync_dir(self.directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return self._load(name)


def check_kernel_name(name: str) -> str:
    if not NAME.match(name) or name in (DEFAULT, "ctl", "error"):
        raise InvalidArgument(
            "kernel names are letters, digits, '_', '.', '+', '~' and '-', start with a letter or digit, at most 128",
            at=name[:140],
        )
    return name


def platform_arch() -> str:
    """This machine's architecture, as uname says it on Linux (macOS says arm64)."""
    machine = platform.machine()
    return {"arm64": kernelimage.AARCH64, "AMD64": kernelimage.X86_64}.get(machine, machine)
