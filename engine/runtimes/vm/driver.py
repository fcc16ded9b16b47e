"""The `vm` driver: each container in a virtual machine of its own, under conmon as everywhere (oci.py).

Floor 2. The runtime conmon calls is shim.py, which speaks runc's command line; so logs, exit codes, sessions, probes of
health, attaching and what a later daemon finds are those of the `oci` driver. Only here: what a machine is made of (its
plan, bundle/vm.json), and which files of the host must be let go before a guest has them.

    conmon ── owner (shim.py create: the container's pid) ── QEMU ── agent ── the container's processes
         └─── stand-in of each session (shim.py exec) ── run/vm/agent.sock ──┘
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import host, userids
from engine.config import Namespace
from engine.errors import Busy, DeadlineExceeded, EngineError, InvalidArgument, NotFound, RuntimeFailure, Unsupported
from engine.kernels import Kernels
from engine.mountspec import Consistency
from engine.netconfig import HOST
from engine.runtimes import conmon, foreign, pids
from engine.runtimes.base import Exit, Probe, RunSpec, State, Status
from engine.runtimes.calls import find_monitor, first_line, program
from engine.runtimes.conmon import Facts
from engine.runtimes.netfiles import NetworkMode
from engine.runtimes.oci import OciRuntime
from engine.runtimes.resources import Resources, online_cpus
from engine.runtimes.spec import CAPABILITIES
from engine.runtimes.users import read_in_root
from engine.runtimes.vm import (
    accel,
    agentbuild,
    bpf,
    disks,
    network,
    qemu,
    scratch,
    sharing,
    shim,
    standbys,
    templates,
    translate,
    transport,
    usernetworks,
    virtiofs,
    vsock,
)
from engine.runtimes.vm.client import GuestError
from engine.runtimes.vm.guestsetup import MAIN
from engine.runtimes.vm.owner import GONE, SOCKET
from engine.runtimes.vm.pausing import Pausing
from engine.runtimes.vm.templatemaker import Makers

log = logging.getLogger(__name__)

PING_SECONDS = 5.0
KILL_SECONDS = 1.5  # for a guest to kill a process
WRITTEN_SECONDS = 7.0  # for it to end after that, its disk written out; less than Execution waits
START_SECONDS = 60.0  # with the networks to be set up
LATER_SECONDS = 0.5  # after a start: until then the CPUs are the container's
NET_SECONDS = 15.0  # for one interface of a running guest
MAYBE = "for want of memory, if it was the kernel: dmesg tells"
NICS = 4  # of a machine in networks, at least: one that runs takes no more; microvm without ACPI has room for these


class VmRuntime(OciRuntime):
    name = "vm"
    host_limits = False  # its limits are the guest's
    create_deadline = 90.0  # seconds: an emulated guest on a busy host takes its time to boot

    def __init__(self, containers: Path, *, state: Path | None = None, kernels: Path | None = None) -> None:
        """`kernels`: the directory of the kernel manager; beside `containers` unless given."""
        super().__init__(containers, state=state or host.runtime_dir() / "vm")
        self._kernels = Kernels(kernels or containers.parent / "kernels")
        self._accelerators = accel.Accelerators()
        self._makers = Makers()
        self._pausing = Pausing(self._vm)
        self._standbys = standbys.Standbys()
        self.sessions.before = self.ping  # of a mute machine it is said at once

    # --- probing ------------------------------------------------------------------------------------------------

    def _find(self) -> tuple[Probe, str, str]:
        monitor, self._flags = find_monitor(self._state)
        kernel = self._kernels.get(self._kernels.default(accel.architecture()))  # else what there is
        agentbuild.check(kernel.arch, agents())
        here = self._accelerators.of(kernel.arch)
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        shim = program(self._state, "dutchman-vm", "vm.shim")
        reason = f"{here.choice.reason}; kernel {kernel.name}"
        version = f"{first_line([str(here.qemu), '--version'])}, {first_line([monitor, '--version'])}"
        return Probe(True, reason, version), str(shim), monitor

    # --- the protocol -------------------------------------------------------------------------------------------

    def _ready(self, spec_: RunSpec, files: conmon.Files, config: dict[str, Any]) -> None:
        """Everything the owner needs, before conmon starts it."""
        settings = spec_.config
        if HOST in settings.networks:
            raise InvalidArgument("networks: a virtual machine cannot have the host's", at="networks")
        for kind in ("pid", "ipc", "uts"):
            if getattr(settings, kind) is Namespace.HOST:
                raise InvalidArgument(f"{kind}: a virtual machine cannot have the host's", at=kind)
        if settings.cpuset and not host.LINUX:
            raise Unsupported("cpuset: this host ties no process to processors", at="cpuset")
        if not spec_.layers:
            raise Unsupported("the vm runtime needs the image's layers")
        arch = foreign.machine_of(spec_.image)
        here = self._accelerators.of(arch)
        choice = here.choice
        kernel = self._kernels.get(settings.kernel, arch)
        way = transport.choose(settings.vm_transport, kernel.features)
        if settings.init:
            foreign.check_init(arch)
        place = spec_.directory / "vm"
        place.mkdir(exist_ok=True, mode=0o700)
        files_ = [*spec_.layers, scratch.make(place / scratch.NAME)]
        *parts, free = disks.describe(files_, place / "image.vmdk")
        joined = spec_.network.mode is NetworkMode.JOINED
        own = usernetworks.describe(spec_.network.links, spec_.network.ports)
        networks = max(1, len(settings.networks)) if joined else 0
        taps = max(networks, NICS - (way != transport.SERIAL)) if joined else 0  # it is one device more
        seccomp = config.get("linux", {}).pop("seccomp", None)
        cpuinfo = Path("/proc/cpuinfo")
        initfs = kernel.initfs(agentbuild.build(arch, agents()))
        machine = {
            "arch": arch,
            "accelerator": str(choice.accelerator),
            "kernel": str(kernel.image),
            "initfs": str(initfs),
            "memory": qemu.memory_of(settings.memory),
            "cpus": math.ceil(settings.cpus or 1),
            "acpi": kernel.acpi,
            "image": str(place / "image.vmdk"),
            "upper": str(place / "upper.ext4"),
            "owners": host.is_root() and not userids.alone(),
            "qemu": str(here.qemu),
            "tsc_khz": qemu.tsc_khz(cpuinfo.read_text()) if cpuinfo.exists() else 0,
        }
        plan = {
            "machine": machine,
            "parts": [[part.start, part.length] for part in parts],
            scratch.NAME: free.start,
            "oom": str(files.oom),  # to be made when the guest's kernel kills for want of memory
            "accelerators": str(self._accelerators.directory),
            # the host must be able to read what the overlay writes down about its layers
            "overlay": "" if userids.rootless() is None else ",userxattr",
            "netns": str(spec_.network.path or ""),
            "taps": taps,
            "transport": way,
            "networks": networks,  # those it starts with
            "usernets": own,
            # with a cache a program can map a file shared and writable, and what two machines append gets lost
            "consistent": any(item.consistency is Consistency.CONSISTENT for item in settings.volumes),
            "exports": None if host.LINUX else sharing.numbers(translate.bind_sources(config)),
            "capabilities": {name: bit for bit, name in enumerate(CAPABILITIES)},
            "seccomp": "" if seccomp is None else _filter(json.dumps(seccomp), arch),
        }
        # QEMU's 9p makes a file as root and gives it away: where root has no id it makes none
        picky = any(mount.some_ids and not mount.read_only for mount in spec_.mounts)
        fast = settings.fast_start and host.LINUX and way == transport.SERIAL  # HVF saves no guests
        served = virtiofs.find() if "virtiofs" in kernel.features and (picky or not fast) else ""
        if fast and not served:
            made_of = {"kernel": [kernel.digest, kernel.image_digest], "initfs": initfs.name}
            wish = templates.wanted(machine, taps, made_of | {"version": self.probe().version})
            plan["template"] = wish | {"directory": str(kernel.directory / "templates")}
        elif served:
            machine["virtiofs"], plan["virtiofsd"] = True, served
        # sessions look users up in the files the container started with; the guest has the disk from here on
        names = place / "names"
        for name in ("passwd", "group"):
            (names / "etc").mkdir(parents=True, exist_ok=True)
            (names / "etc" / name).write_bytes(read_in_root(spec_.rootfs, f"/etc/{name}"))
        config["root"]["path"] = str(names)
        spec_.release()
        if "template" in plan and (known := self._standbys.engage(spec_.id, self._vm(spec_.id), plan, config)):
            plan["standby"] = known
        (files.bundle / "vm.json").write_text(json.dumps(plan))  # as config.json: written anew for each run

    def create(self, spec_: RunSpec) -> int:
        made = False
        try:
            pid = super().create(spec_)
            made = True
        finally:
            self._standbys.left(spec_.id, made)
        with contextlib.suppress(FileNotFoundError):
            log.info("machine of container %s: %s", spec_.id[:12], (self._vm(spec_.id) / "how").read_text())
        return pid

    def start(self, id: str) -> None:
        """Asked of its owner directly: a process of the runtime would take longer to come up than the container."""
        self._expect(id, State.CREATED)
        try:
            link = shim.connect(self._vm(id))
            try:
                link.call("START", {"id": MAIN}, deadline=START_SECONDS)
            finally:
                link.close()
        except GuestError as error:
            raise RuntimeFailure(shim.as_runc(error)) from error
        plan = self._plan(id)
        if "template" in plan:
            document = json.loads((self._files(id).bundle / "config.json").read_bytes())
            later = threading.Timer(LATER_SECONDS, self._prepare_next, (plan, document))
            later.daemon = True
            later.start()

    def _prepare_next(self, plan: dict[str, Any], document: dict[str, Any]) -> None:
        """For the next machine of this shape: a template, or one that stands by."""
        wish = plan["template"]
        try:
            program = [self._tools()[0], "--root", str(self._state)]
            request = wish | {"machine": plan["machine"], "taps": plan["taps"]}
            directory = Path(wish["directory"])
            self._makers.want(program, directory, request)
            if (directory / wish["key"]).exists():
                request["agent"] = str(agentbuild.build(plan["machine"]["arch"], agents()))
                request["plan"] = {name: plan[name] for name in ("overlay", "capabilities", "seccomp")}
                self._standbys.want(program, directory, request | {"document": standbys.throwaway(document)})
        except (EngineError, OSError) as error:
            log.warning("no machine is prepared for the next container of this shape: %s", error)

    def signal(self, id: str, signum: int) -> None:
        """SIGKILL is for the container's process in the guest, whose file systems are then written out as after any
        end: what a killed process has written is not lost with the machine. A machine that does not do so is killed."""
        state = self.status(id).state
        if signum != signal.SIGKILL or state not in (State.RUNNING, State.PAUSED):
            super().signal(id, signum)
            return
        facts = self._expect(id, State.RUNNING, State.PAUSED)
        try:
            if state is State.PAUSED:
                self._pausing.wake(id)
            link = shim.connect(self._vm(id))
            try:
                link.call("SIGNAL", {"id": MAIN, "signal": int(signal.SIGKILL)}, deadline=KILL_SECONDS)
            finally:
                link.close()
        except (EngineError, OSError) as error:
            log.info("container %s: its machine is killed: %s", id[:12], error)
            self._note(id, f"killed with its virtual machine, which did not do it: {error}")
            super().signal(id, signum)
            return

        def insist() -> None:
            if pids.start_time(facts.pid) != facts.pid_start:
                return  # as it should
            self._note(id, f"killed with its virtual machine, which did not end within {WRITTEN_SECONDS:g} s")
            with contextlib.suppress(EngineError):  # it has ended
                conmon.send_signal(facts.pid, facts.pid_start, signal.SIGKILL, "container")

        timer = threading.Timer(WRITTEN_SECONDS, insist)
        timer.daemon = True
        timer.start()

    def _note(self, id: str, reason: str) -> None:
        """Why it ends, for `_finish`."""
        with contextlib.suppress(OSError):  # a full disk: it is in the daemon's log
            self._files(id).reason.write_text(reason)

    def _finish(self, id: str) -> Exit:
        """As every driver; 137 is told apart: an owner that was killed leaves its socket, and nobody's words."""
        end = super()._finish(id)
        if end.exit_code == GONE and not end.reason and (self._vm(id) / SOCKET).exists():
            facts = self._facts(self._files(id))
            who = f"process {facts.pid} of this host, which owned" if facts else "the process that owned"
            end = replace(end, reason=f"{who} its virtual machine, was killed, not the container; {MAYBE}")
        return end

    def _end(self, facts: Facts, id: str) -> bool:
        ended = super()._end(facts, id)
        host.remove_tree(self._state / id)  # as the runtime's own delete would, without a process for it
        return ended

    def close(self) -> None:
        super().close()
        self._makers.close()
        self._standbys.close()

    def pause(self, id: str) -> None:
        self._expect(id, State.RUNNING)
        self._pausing.pause(id)

    def resume(self, id: str) -> None:
        self._expect(id, State.PAUSED)
        self._pausing.resume(id)

    def awake(self, id: str) -> contextlib.AbstractContextManager[None]:
        """In the block a paused machine tells of its files, and nothing of the container runs: Pausing.awake."""
        return self._pausing.awake(id)

    def update(self, id: str, resources: Resources) -> None:
        """As every driver; InvalidArgument for more than its machine was made with."""
        machine = self._plan(id)["machine"]
        again = "stop it, set it, start it: its virtual machine is made anew"
        if resources.memory is not None and qemu.memory_of(resources.memory) > (has := int(machine["memory"])):
            raise InvalidArgument(
                f"memory: its virtual machine has {has} MiB, {has - qemu.OVERHEAD} of them for the container",
                at="memory",
                hint=again,
            )
        if resources.cpus is not None and math.ceil(resources.cpus) > (has := int(machine["cpus"])):
            raise InvalidArgument(f"cpus: its virtual machine has {has}", at="cpus", hint=again)
        if resources.cpuset and not host.LINUX:
            raise Unsupported("cpuset: this host ties no process to processors", at="cpuset")
        files, state = self._files(id), self.status(id).state
        known, cut_short = files.resources, (files.bundle / "resources.new").exists()
        awake: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if cut_short or not known.exists() or known.read_text() != json.dumps(self._limits(resources)):
            if state is State.PAUSED:
                awake = self._pausing.awake(id)
            if state is State.RUNNING:
                self.ping(id)  # else who asked would wait for several deadlines
        with awake:
            super().update(id, resources)

    def _limits(self, resources: Resources) -> dict[str, Any]:
        return resources.update(swap=self._cgroups.swap, cpus=online_cpus())

    def plug(self, id: str, interface: str) -> None:
        """As every driver; Busy when the machine has no interface left for it."""
        plan, number = self._plan(id), int(interface.removeprefix("eth"))
        has = int(plan["taps"]) if "networks" in plan else 0  # those of older releases have none to spare
        if number >= has:
            raise Busy(f"its virtual machine was started with {has} network interfaces", hint="restart it")
        namespace = Path(plan["netns"])
        try:
            (found,) = network.join(namespace, 1, number)
            self._net(id, network.words(found))
        except BaseException:
            network.part(namespace, number)
            raise

    def unplug(self, id: str, interface: str, addresses: Sequence[str]) -> None:
        plan = self._plan(id)
        if "networks" not in plan:
            raise Busy("its virtual machine keeps the networks it was started with", hint="stop it first")
        self._net(id, network.empty_words(interface, addresses))
        network.part(Path(plan["netns"]), int(interface.removeprefix("eth")))

    def _plan(self, id: str) -> dict[str, Any]:
        try:
            plan: dict[str, Any] = json.loads((self._files(id).bundle / "vm.json").read_bytes())
        except FileNotFoundError:
            raise NotFound("the runtime has no such container") from None
        return plan

    def _net(self, id: str, words: dict[str, Any]) -> None:
        """What an interface of the running guest is to be."""
        if self.status(id).state is State.PAUSED:
            raise Busy("its virtual machine is paused", hint="resume it first")
        try:
            link = shim.connect(self._vm(id))
            try:
                link.call("NET", words, deadline=NET_SECONDS)
            finally:
                link.close()
        except GuestError as error:
            raise RuntimeFailure(f"its virtual machine: {error}") from error

    def status(self, id: str) -> Status:
        found = super().status(id)
        if found.state is State.RUNNING and self._pausing.paused(id):
            return Status(State.PAUSED, found.pid)
        return found

    def ping(self, id: str) -> float:
        """Seconds its agent takes to answer. DeadlineExceeded when it is mute; Unreachable."""
        try:
            return vsock.health(vsock.Serial(self._vm(id) / "agent.sock"), deadline=PING_SECONDS)
        except DeadlineExceeded as error:
            raise DeadlineExceeded("its virtual machine does not answer", hint="it may hang: kill, start") from error

    def _vm(self, id: str) -> Path:
        return self._files(id).run / "vm"


@functools.lru_cache(16)
def _filter(profile: str, arch: str) -> str:
    """Compiling takes 20 ms, and most containers have the same profile."""
    return bpf.compile_profile(json.loads(profile), arch).hex()


def agents() -> Path:
    """Where agents are built, for all stores of a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dutchman" / "agents"
