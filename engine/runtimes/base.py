"""What a runtime driver is: the facts it is given, the facts it reports, and the protocol every driver keeps.

Floor 2. Only here: the dataclasses that cross the driver boundary and the rules that turn a container's config and
its image's config into what runs (`make_spec`). Drivers are `oci` (runc or crun under conmon) and `fake` (in memory);
`tests/test_2_runtimes.py` is the contract both keep. Everything here is immutable and free of threads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine import envfile
from engine.config import ContainerConfig, MountKind, Namespace
from engine.errors import InvalidArgument
from engine.model import ImageConfig
from engine.netconfig import HOST
from engine.runtimes.netfiles import RunNetwork
from engine.runtimes.resources import Resources
from engine.runtimes.selinux import Labels
from engine.runtimes.signals import RTMAX, RTMIN, SIGNALS

if TYPE_CHECKING:
    from engine.runtimes.sessions import Console, Sessions

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Docker's


class State(StrEnum):
    """The runtime's view of a container (runtime-spec runtime.md#state, plus paused as runc reports, plus absent)."""

    ABSENT = "absent"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount inside the container. `source` is a host path that exists (None for tmpfs); `target` is absolute."""

    kind: MountKind
    source: Path | None
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()  # further mount(8) options, e.g. size=64m for a tmpfs
    some_ids: bool = False  # only some owners can be there; root may be none of them


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of a container, everything resolved that needs no look into its root filesystem."""

    id: str  # 64 hex digits (any [a-zA-Z0-9_.-]+ works)
    name: str
    directory: Path  # containers/<id>; the driver keeps bundle/, run/ and logs/ in it
    rootfs: Path  # a ready, mounted directory
    argv: tuple[str, ...]  # ENTRYPOINT and CMD already joined; never empty
    env: tuple[str, ...]  # KEY=VALUE, PATH and HOSTNAME included; HOME is added by the driver when absent
    cwd: str  # absolute; created when absent, as Docker does
    user: str  # "", or user[:group], names or numbers as written
    hostname: str
    config: ContainerConfig
    image: ImageConfig
    mounts: tuple[Mount, ...] = ()
    layers: tuple[Path, ...] = ()  # the image as EROFS, and the data it refers to, in the order of its device table
    network: RunNetwork = dataclasses.field(default_factory=RunNetwork)
    labels: Labels = dataclasses.field(default_factory=Labels)  # of SELinux
    # lets go of `rootfs` and what it lies on: called, once, by a driver whose guest gets the disk. Busy while in use
    release: Callable[[], None] = dataclasses.field(default=lambda: None, compare=False)

    @property
    def log(self) -> Path:
        """The log file of the current segment, CRI format."""
        return self.directory / "logs" / "ctr.log"


@dataclass(frozen=True, slots=True)
class Status:
    state: State
    pid: int | None = None  # of the container's first process, on the host; None unless created, running or paused
    exit_code: int | None = None  # when stopped and known
    oom: bool = False
    finished_ns: int | None = None  # Unix time


@dataclass(frozen=True, slots=True)
class Exit:
    exit_code: int  # 128 + signal when killed by one
    oom: bool = False
    finished_ns: int = 0  # Unix time
    reason: str = ""  # for people; empty when the process simply ended


@dataclass(frozen=True, slots=True)
class Probe:
    ok: bool
    reason: str  # which and why, or why not
    version: str = ""


class Runtime(Protocol):
    """A driver. Thread-safe; calls for one id are serialised by the caller. Every call is bounded by a deadline.

    Errors: RuntimeFailure with the runtime's own words, NotFound for an id it does not know, Busy for a wrong state,
    DeadlineExceeded, Unsupported, InvalidArgument for a spec that cannot be (it names the field).
    """

    name: str

    @property
    def sessions(self) -> Sessions:
        """Further processes in its running containers."""
        ...

    @property
    def console(self) -> Console:
        """The input and terminals of the containers themselves."""
        ...

    def probe(self) -> Probe:
        """Whether this host can, and which and why. Never raises."""
        ...

    def create(self, spec: RunSpec) -> int:
        """The process exists and waits, argv not yet executed. Returns its host pid. Failing leaves nothing behind."""
        ...

    def start(self, id: str) -> None:
        """Execute argv. An executable that cannot be run raises RuntimeFailure; then the container is stopped."""
        ...

    def signal(self, id: str, signum: int) -> None:
        """To the first process only. Busy when there is none; SIGKILL also reaches a paused one."""
        ...

    def pause(self, id: str) -> None: ...

    def resume(self, id: str) -> None: ...

    def update(self, id: str, resources: Resources) -> None:
        """Put these limits in place of those it has, running or paused. InvalidArgument for ones that cannot be;
        RuntimeFailure when the kernel refuses, as for less memory than is in use. Then it has the limits it had."""
        ...

    def plug(self, id: str, interface: str) -> None:
        """An interface was set up in the namespace a running container has joined: see that the container has it.
        Busy when it cannot; then nothing is changed."""
        ...

    def unplug(self, id: str, interface: str, addresses: Sequence[str]) -> None:
        """The opposite, before the interface goes; `addresses` it has, with their prefix lengths. Idempotent."""
        ...

    def status(self, id: str) -> Status:
        """What really runs, from the runtime and its files. An unknown id is `absent`, never an error."""
        ...

    def watch(self, id: str, on_exit: Callable[[str, Exit], None]) -> None:
        """Call `on_exit` once, from the driver's thread, when the process has ended (also when it already has).

        Also re-attaches after a restart of the daemon. A later call for the same id replaces the earlier one. An id
        the driver knows nothing of ends at once with exit code 255 and a reason.
        """
        ...

    def reopen_log(self, id: str) -> None:
        """Have the log writer reopen its file by name (after a rename)."""
        ...

    def delete(self, id: str) -> None:
        """Idempotent: kill what is left, remove cgroup and runtime files. Logs stay; watchers are not called."""
        ...

    def probe_exec(self, id: str, argv: Sequence[str], *, deadline: float) -> tuple[int, bytes]:
        """Run `argv` in the running container, as its own user, environment and directory: the exit code and the first
        4 KiB of what it printed. After `deadline` seconds it is killed with all it started: DeadlineExceeded. Busy for
        a container that does not run, or is paused. Not serialised with other calls for the same id.
        """
        ...

    def close(self) -> None:
        """Stop watching. Containers go on running."""
        ...


class Joined:
    """Part of drivers whose processes are in the namespace themselves: what is set up there is theirs."""

    def plug(self, id: str, interface: str) -> None:
        pass

    def unplug(self, id: str, interface: str, addresses: Sequence[str]) -> None:
        pass


def command_line(config: ContainerConfig, image: ImageConfig) -> tuple[str, ...]:
    """ENTRYPOINT and CMD as Docker joins them: an own entrypoint drops the image's CMD. EINVAL when nothing is left."""
    runtime = image.runtime
    if config.entrypoint is not None:
        entrypoint, command = config.entrypoint, config.command or ()
    else:
        entrypoint = runtime.entrypoint or ()
        command = (runtime.cmd or ()) if config.command is None else config.command
    argv = tuple(entrypoint) + tuple(command)
    if not argv or not argv[0]:
        raise InvalidArgument("command: nothing to run: neither the image nor the config names a command", at="command")
    for index, word in enumerate(argv):
        if "\0" in word:
            raise InvalidArgument(f"command: argument {index} contains a NUL byte", at="command")
    return argv


def environment(config: ContainerConfig, image: ImageConfig, hostname: str) -> tuple[str, ...]:
    """PATH, HOSTNAME, TERM (with a tty), the image's, those of env_file, the config's; later ones win, order kept."""
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if config.tty:
        merged["TERM"] = "xterm"
    for item in image.runtime.env or ():
        key, _, value = item.partition("=")
        if key and "\0" not in item:
            merged[key] = value
    merged.update(envfile.read(config.env_file))
    merged.update(config.env)
    return tuple(f"{key}={value}" for key, value in merged.items())


def check_names_of_host(hostname: str, domainname: str) -> None:
    """InvalidArgument for what the kernel (64 bytes) or /etc/hosts (words in lines) cannot hold."""
    for field, value in (("hostname", hostname), ("domainname", domainname)):
        if len(value.encode()) > 64 or not value.isprintable() or any(c in value for c in " /\0"):
            raise InvalidArgument(f"{field}: at most 64 printable characters without spaces", at=value[:80])


def make_spec(
    *,
    id: str,
    name: str,
    directory: Path,
    rootfs: Path,
    config: ContainerConfig,
    image: ImageConfig | None = None,
    mounts: Sequence[Mount] = (),
    layers: Sequence[Path] = (),
    labels: Labels | None = None,
    release: Callable[[], None] = lambda: None,
) -> RunSpec:
    """The run of `config` on `image`. InvalidArgument names the field that makes it impossible."""
    image = image or ImageConfig()
    # with the host's network its name, too: names resolve as they do there
    hostname = config.hostname or (os.uname().nodename if HOST in config.networks else id[:12])
    if config.uts is Namespace.HOST:
        for field, value in (("hostname", config.hostname), ("domainname", config.domainname)):
            if value:
                raise InvalidArgument(f"{field}: would change the host: uts is host", at=field)
        hostname = os.uname().nodename
    check_names_of_host(hostname, config.domainname or "")
    return RunSpec(
        id=id,
        name=name,
        directory=directory,
        rootfs=rootfs,
        argv=command_line(config, image),
        env=environment(config, image, hostname),
        cwd=config.workdir or image.runtime.working_dir or "/",
        user=image.runtime.user if config.user is None else config.user,
        hostname=hostname,
        config=config,
        image=image,
        mounts=tuple(mounts),
        layers=tuple(layers),
        labels=labels or Labels(),
        release=release,
    )


def parse_signal(text: str) -> int:
    """Linux's signal number of SIGTERM, TERM, term, 15, RTMIN+3 or RTMAX-2, as Docker takes them. EINVAL otherwise."""
    word = text.strip().upper()
    if word.isascii() and word.isdigit() and len(word) < 4:
        number = int(word)
        if 1 <= number <= RTMAX:
            return number
        raise InvalidArgument(f"signal: {text} is not between 1 and {RTMAX}", at=text[:40])
    word = word.removeprefix("SIG")
    for base, origin, sign in (("RTMIN", RTMIN, 1), ("RTMAX", RTMAX, -1)):
        if word == base:
            return origin
        rest = word.removeprefix(base + ("+" if sign > 0 else "-"))
        if rest != word and rest.isascii() and rest.isdigit() and len(rest) < 3:
            number = origin + sign * int(rest)
            if RTMIN <= number <= RTMAX:
                return number
    if word in SIGNALS:
        return SIGNALS[word]
    raise InvalidArgument(f"signal: unknown signal {text!r}", at=text[:40], hint="a name such as TERM, or a number")
