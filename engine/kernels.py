"""Guest kernels of a store: `kernels/<name>/{vmlinux,kernel.json,modules/}`, and `kernels/default`. Floor 2.

Only here: which there are and which one is meant. What a kernel file is, is in kernelimage.py. A kernel is made aside
and renamed into place, so what is there is whole. Thread-safe: no state but files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import host, kernelimage, kernelpackage
from engine.errors import AlreadyExists, InvalidArgument, NotFound, TooLarge
from engine.runtimes.vm import initfs

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
MAX_FILE = 512 << 20  # bytes
HINT = "echo 'import /path/to/vmlinux' > kernels/ctl"


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    directory: Path
    version: str  # as `uname -r` says it in a guest
    arch: str
    acpi: bool  # whether it finds its devices by ACPI alone
    digest: str  # of the file as it was imported
    source: str

    @property
    def image(self) -> Path:
        return self.directory / "vmlinux"

    def initfs(self, agent: Path) -> Path:
        """The initial file system with this agent, made when it is not there yet."""
        data = agent.read_bytes()
        path = self.directory / f"initfs-{hashlib.sha256(data).hexdigest()[:16]}.cpio"
        if not path.exists():
            names = self._modules()
            modules = [(name, (self.directory / "modules" / f"{name}.ko").read_bytes()) for name in names]
            host.write_atomic(path, initfs.build(data, modules))
        return path

    def _modules(self) -> list[str]:
        """In the order they are loaded in; none when everything is built in."""
        listed = self.directory / "modules" / "order"
        return listed.read_text().split() if listed.exists() else []


class Kernels:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> list[Kernel]:
        """Every kernel, by name."""
        if not self.directory.is_dir():
            return []
        return [self._load(entry) for entry in sorted(self.directory.iterdir()) if (entry / "kernel.json").exists()]

    def _load(self, directory: Path) -> Kernel:
        facts = json.loads((directory / "kernel.json").read_bytes())
        return Kernel(directory.name, directory, **facts)

    def get(self, name: str | None) -> Kernel:
        """The kernel `name`, or the default: the one chosen, else the newest version. NotFound says how to get one."""
        if name:
            if NAME.match(name) and (self.directory / name / "kernel.json").exists():
                return self._load(self.directory / name)
            raise NotFound(f"no kernel {name!r} is here", at=name, hint=HINT)
        chosen = self.directory / "default"
        if chosen.is_symlink():
            target = os.path.basename(os.readlink(chosen))
            if (self.directory / target / "kernel.json").exists():
                return self._load(self.directory / target)
        found = self.all()
        if not found:
            raise NotFound("no guest kernel is here", hint=HINT)
        return max(found, key=lambda kernel: [int(part) for part in re.findall(r"\d+", kernel.version)])

    def import_file(self, path: Path, name: str | None = None) -> Kernel:
        """A kernel file with everything built in, or a Debian kernel package. Damaged, TooLarge, AlreadyExists."""
        if path.stat().st_size > MAX_FILE:
            raise TooLarge(f"more than {MAX_FILE} bytes", at=str(path))
        if path.suffix == ".deb":
            data, modules = kernelpackage.read(path)
            return self.add(data, path.name, name, modules=modules)
        return self.add(path.read_bytes(), path.name, name)

    def add(
        self,
        data: bytes,
        source: str,
        name: str | None = None,
        arch: str | None = None,
        modules: Sequence[tuple[str, bytes]] = (),
    ) -> Kernel:
        """Keep a kernel and what is to be loaded into it. Damaged, InvalidArgument, TooLarge from reading it."""
        found = kernelimage.read(data, arch)
        name = name or found.version
        if not NAME.match(name):
            raise InvalidArgument("a kernel's name: letters, digits and _.+- expected", at=name[:80])
        target = self.directory / name
        if target.exists():
            raise AlreadyExists(f"kernel {name} is here", at=name, hint=f"echo remove > kernels/{name}/ctl")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        aside = Path(tempfile.mkdtemp(dir=self.directory, prefix=".import-"))
        try:
            facts = {
                "version": found.version,
                "arch": found.arch,
                "acpi": "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y" not in found.config,
                "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
                "source": source,
            }
            host.write_atomic(aside / "vmlinux", found.data)
            (aside / "modules").mkdir(mode=0o755)
            for module, content in modules:
                host.write_atomic(aside / "modules" / f"{module}.ko", content)
            host.write_atomic(aside / "modules" / "order", "".join(f"{module}\n" for module, _ in modules).encode())
            host.write_atomic(aside / "kernel.json", json.dumps(facts).encode())
            os.chmod(aside, 0o755)
            os.rename(aside, target)
            host.fsync_dir(self.directory)
        except BaseException:
            host.remove_tree(aside)
            raise
        return self._load(target)
