"""Ordinary users for tests of an engine without root: made with subordinate ids, given `dutchman`, and removed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dutchman import ROOT, demo_archive, needs_oci, wait_for
from mounting import PATIENCE

from engine import host, hostmounts
from engine.runtimes import rootless
from engine.runtimes.pids import start_time

Done = subprocess.CompletedProcess[str]
DEVICES = (Path("/dev/fuse"), Path("/dev/net/tun"))  # readable for all where udev makes them


class Person:
    """An ordinary user with a home and a shell in which `dutchman` is a command."""

    def __init__(self, base: Path, name: str) -> None:
        self.name, self.base, self.home = name, base, base / name
        subprocess.run(
            ["useradd", "--no-create-home", "--home-dir", self.home, "--shell", "/bin/sh", name], check=True, timeout=30
        )
        self.uid, self.gid = (int(self._id(flag)) for flag in ("-u", "-g"))
        for table, option in (("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")):
            if not rootless.subordinate(Path(table), self.uid, name):  # most systems' useradd gives them
                first = 400_000 + 65_536 * (self.uid % 1000)
                subprocess.run(["usermod", option, f"{first}-{first + 65535}", name], check=True, timeout=30)
        self.first = rootless.subordinate(Path("/etc/subuid"), self.uid, name)[0][0]
        self.home.mkdir(mode=0o700)
        os.chown(self.home, self.uid, self.gid)
        self.mount = self.home / "FlyingDutchman"
        self.store = self.home / ".local/share/dutchman"
        place = base / ("run" * 30)  # longer than an address of a socket may be: none may depend on it
        place.mkdir(exist_ok=True)
        place.chmod(0o1777)
        self.runtime = place / f"dutchman-{self.uid}"
        self.group: Path | None = None  # the cgroup their shells are in; None: where the test is

    def _id(self, flag: str) -> str:
        return subprocess.run(["id", flag, self.name], check=True, capture_output=True, text=True, timeout=10).stdout

    def sh(self, script: str, *, code: int | None = 0, timeout: float = 60) -> Done:
        """A shell script of this user's, in their home."""
        environ = {
            "HOME": str(self.home),
            "USER": self.name,
            "LC_ALL": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(self.runtime.parent),
            "PATH": f"{self.base / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{self.base / 'project'}:{self.base / 'packages'}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        enter = [] if self.group is None else ["sh", "-c", 'echo $$ > "$0" && exec "$@"', f"{self.group}/cgroup.procs"]
        who = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.gid), "--init-groups"]
        done = subprocess.run(
            [*enter, *who, "bash", "-c", script],
            env=environ,
            cwd=self.home.parent,
            capture_output=True,
            text=True,
            timeout=max(timeout, 2 * PATIENCE),
            stdin=subprocess.DEVNULL,
        )
        assert code is None or done.returncode == code, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def out(self, script: str) -> str:
        return self.sh(f"cd {self.mount} && {script}").stdout.rstrip("\n")

    def make(self, name: str, config: str) -> None:
        self.out(f"mkdir containers/{name} && printf '%s' {shlex.quote(config)} > containers/{name}/config.yaml")

    def await_state(self, name: str, state: str) -> None:
        wait_for(lambda: self.out(f"cat containers/{name}/state") == state, 30, f"{name} {state}")

    def processes(self) -> list[int]:
        """What runs as this user or as one of their subordinate ids."""
        out = []
        for entry in Path("/proc").iterdir():
            try:
                owner = entry.stat().st_uid
                ours = owner == self.uid or self.first <= owner < self.first + 65536
                if entry.name.isdigit() and ours and start_time(int(entry.name)) is not None:  # and no zombie
                    out.append(int(entry.name))
            except FileNotFoundError:
                continue
        return out

    def leave(self) -> None:
        for pid in self.processes():
            with_pidfd(pid)
        wait_for(lambda: not self.processes(), what=f"{self.name}'s processes end")
        for point, _, _ in reversed(hostmounts.mounts()):
            if f"{point}/".startswith(f"{self.base}/"):
                hostmounts.unmount(Path(point))
        host.remove_tree(self.runtime)
        subprocess.run(["userdel", self.name], check=True, timeout=30, capture_output=True)


def with_pidfd(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def python_for(person: Person) -> Path | None:
    """An interpreter this user may run that has what the engine needs; None when there is none."""
    for binary in (person.base / "python" / "bin" / Path(sys.executable).resolve().name, "/usr/bin/python3"):
        tried = person.sh(f"{binary} -c 'import fdfs.cli_daemon, fdfs.mount, pydantic, ssl' 2> /dev/null", code=None)
        if tried.returncode == 0:
            return Path(binary)
    return None


@contextmanager
def two_people() -> Iterator[tuple[Person, Person]]:
    """Two of them. Skips where that cannot be."""
    needs_oci()
    for program in ("useradd", "newuidmap", "setpriv", "slirp4netns"):
        if rootless.tool(program) is None:
            pytest.skip(f"needs {program}")
    if reason := rootless.forbidden():
        pytest.skip(reason.reason)
    base = Path(tempfile.mkdtemp(prefix="dutchman-people-"))
    base.chmod(0o755)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in DEVICES if path.exists()}
    for path in modes:
        path.chmod(0o666)
    made: list[Person] = []
    # wherever this runs from, an ordinary user may not get there
    shown = {"project": ROOT, "packages": Path(sysconfig.get_paths()["purelib"]), "python": Path(sys.base_prefix)}
    try:
        for name, source in shown.items():
            (base / name).mkdir()
            hostmounts.bind(source, base / name)
            hostmounts.make_read_only(base / name)
        for letter in "ab":
            made.append(Person(base, f"dutchman{letter}{os.getpid()}"))
        binary = python_for(made[0])
        if binary is None:
            pytest.skip("no Python that an ordinary user may run has the packages of this one")
        script = base / "bin" / "dutchman"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec "{binary}" -m fdfs "$@"\n')
        script.chmod(0o755)
        shutil.copy(demo_archive(), base / "demo.tar")
        (base / "demo.tar").chmod(0o644)
        yield made[0], made[1]
    finally:
        for person in made:
            person.leave()
        for path, mode in modes.items():
            path.chmod(mode)
        for name in shown:
            hostmounts.unmount(base / name)
        host.remove_tree(base)
