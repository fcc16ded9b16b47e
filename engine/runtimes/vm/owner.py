"""The process on the host that stands for a container in a virtual machine: it owns QEMU and the agent's connection.

Floor 2. Only here: how its machine comes to be, and what its end means. conmon takes this process for the container's
own: its standard streams are conmon's, a signal to it goes to the guest's process, SIGKILL takes the machine down with
it (QEMU is told to die with its parent), and it ends with the container's exit code. Everybody else reaches the agent
through its socket `agent.sock` (Relay). It outlives the daemon.

It imports little: a machine that stands by is ready sooner than Python. What only other machines need comes with them.

Files, below `containers/<id>/`: bundle/{config.json,vm.json}; run/vm/{agent.sock,qmp.sock,console,qemu.log,qemu.pid}.
Errors before the container waits for `start` go to the creator; later ones to run/reason, as the exit's reason.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine import host, hostfiles
from engine.errors import EngineError, RuntimeFailure
from engine.runtimes.vm import clock, faults, pump, standby, translate
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.guard import Guard
from engine.runtimes.vm.guestsetup import preparation, run_words
from engine.runtimes.vm.relay import Relay
from engine.runtimes.vm.streams import Stream

if TYPE_CHECKING:
    from engine.runtimes.vm.templates import Template
    from engine.runtimes.vm.transport import Way

log = logging.getLogger(__name__)

HELLO_SECONDS = 75.0  # for a cold boot on a busy host under TCG
POWEROFF_SECONDS = 5.0
MOUNT_SECONDS = 30.0  # for the guest to answer one request while it sets itself up
DISK_SECONDS = 5.0  # for the host to let go of the disk
CONSOLE_KEPT = 16 << 10  # bytes of the guest's last console output
TCG = "tcg"  # accel.Accelerator.TCG
SOCKET = "agent.sock"  # the relay's
GONE = 137  # exit code when the machine ended under the container: as if it had been killed


class Owner:
    def __init__(self, bundle: Path, *, guarded: bool = False) -> None:
        """`guarded`: QEMU is ended with this process by one of ours, not by the kernel."""
        self.document: dict[str, Any] = json.loads((bundle / "config.json").read_bytes())
        self.plan: dict[str, Any] = json.loads((bundle / "vm.json").read_bytes())
        self.place = bundle.parent / "run" / "vm"
        self.reason = bundle.parent / "run" / "reason"
        self._guarded = guarded
        self._guard: Guard | None = None
        self._upper = -1
        self._shared = self.place / "shares"
        self._exports: Sequence[tuple[str, str, bool]] = ()
        self._before = ""  # what was tried before the machine was started as it was
        self._keeper: socket.socket | None = None
        self.way: Way | None = None
        self._broken = ""  # QEMU's word for a machine that stopped for good
        self._console = bytearray()
        self.qemu: subprocess.Popen[bytes] | standby.Machine | None = None
        self.link: AgentClient | None = None
        self.relay: Relay | None = None
        self.stream: Stream | None = None

    # --- before start --------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """The machine runs, its agent answers, and the container's process waits. Raises with all that is known."""
        try:
            self._own()
            if not self._from_standby():
                self._shares()
                if not self._from_template():
                    self._cold()
        except (EngineError, GuestError) as error:
            self.end()
            said = " ".join(self._last_words().split())[-500:]
            hint = error.hint if isinstance(error, EngineError) else None
            raise RuntimeFailure(f"{error.reason}{': ' + said if said else ''}", hint=hint) from error

    def _own(self) -> None:
        """What the machine needs, however often it is launched."""
        self._upper = os.open(self.plan["machine"]["upper"], os.O_RDWR | os.O_CLOEXEC)
        hostfiles.share(self._upper, DISK_SECONDS)  # kept: while a guest has it, the host does not mount it
        self.place.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _cold(self) -> None:
        machine = self.plan["machine"]
        refused = "" if machine["accelerator"] == TCG else self._try_hardware()
        if machine["accelerator"] == TCG:
            self._launch().greet(HELLO_SECONDS)
        if refused:  # not before it is certain that the guest itself is not to blame
            self._refuse(refused)
        assert self.link is not None
        self._prepare(self.link)
        self._run(self.link)

    def _from_standby(self) -> bool:
        """Whether the container's process waits in a machine that stood by. Otherwise, whatever is wrong with that,
        it is as if there had been none."""
        known = self.plan.get("standby")
        if known is None:
            return False
        if self.plan["taps"]:
            import engine.runtimes.vm.network  # noqa: F401 -- at START there would be no time

        try:
            taken = standby.take(self.place)
            self.qemu, self._keeper = taken.machine, taken.keeper  # open for as long as this process lives
            link = self._meet(lambda: taken.agent, taken.console, taken.watch, b"", taken.hello, taken.stream)
        except (EngineError, OSError, ValueError, KeyError) as error:
            self._before = f"; what stood by does not work: {error}: {self._last_words()}"
            self.qemu, self._broken = None, ""
            standby.end(known["pid"], known["started"])  # which has the disk
            host.remove_tree(self.place)
            self.place.mkdir(mode=0o700)
            return False
        self._tell(f"standby {self.plan['template']['key']}")
        if taken.refused is not None:
            raise GuestError(*taken.refused)
        self.stream = link.running
        return True

    def _from_template(self) -> bool:
        """Whether the container's process waits in a machine started from a template. Whatever is wrong with that, the
        machine can be booted; only what the guest says of the container itself is raised."""
        wish = self.plan.get("template")
        if wish is None:
            return self._tell("booted")
        from engine.runtimes.vm import templates

        directory, refused, whole = Path(wish["directory"]), None, False
        try:
            with templates.found(directory, wish) as template:
                if template is None:
                    return self._tell("booted: there is no template yet")
                whole = True
                link = self._launch(template)
                templates.confirm(link)
                templates.used(template)
            self._prepare(link)
            try:
                self._run(link)
            except GuestError as error:
                refused = error
        except (EngineError, OSError) as error:
            words = f"{error}: {self._last_words()}"
            self.end()
            self._broken = ""
            if whole:
                templates.refuse(directory, wish["key"], words)
            else:
                templates.discard(directory, wish["key"])
            return self._tell(f"booted: template {wish['key']} does not work: {words}")
        self._tell(f"template {wish['key']}")
        if refused is not None:
            raise refused
        return True

    def _tell(self, how: str) -> bool:
        """For the driver, which has the log."""
        (self.place / "how").write_text((how + self._before)[:1000])
        return how.startswith("template")

    def _try_hardware(self) -> str:
        """Launch with the hardware's accelerator. When that fails: why; the plan is then to emulate. Raises what it is
        not to blame for."""
        machine = self.plan["machine"]
        try:
            self._launch(patience=faults.HELLO_SECONDS).greet(faults.HELLO_SECONDS)
            return ""
        except EngineError as error:
            if self.qemu is None:
                raise
            status, link = None, self.link
            if link is None or link.lost:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self.qemu.wait(1.0)
            said = (self.place / "qemu.log").read_text(errors="replace")[-2000:]
            why = faults.of_accelerator(machine["accelerator"], status, said, self._broken)
            if not why:
                raise
            if link is not None:
                link.close()
            self.end()
            self._broken = ""
            machine["accelerator"] = TCG
            log.warning("%s; the CPU is emulated instead: %s", why, error)
            return why

    def _refuse(self, why: str) -> None:
        """No machine of this boot is to try the hardware's accelerator again."""
        from engine.runtimes.vm.accel import Accelerators

        machine = self.plan["machine"]
        known = Accelerators(Path(self.plan["accelerators"]))
        known.refuse(Path(machine["qemu"]), machine["arch"], f"with a real guest: {why}")

    def _breaks(self, process: subprocess.Popen[bytes] | standby.Machine, status: str) -> None:
        """QEMU's word on a machine that has stopped for good. On a thread of its own."""
        if self.qemu is process:
            self._broken = status
            process.kill()

    def _launch(self, template: Template | None = None, patience: float = HELLO_SECONDS) -> AgentClient:
        from engine.runtimes.vm import launch, network, templates, transport

        plan, state = self.plan, []
        values = plan["machine"] | {"share": str(self._shared), "exports": self._exports}
        values["usernets"] = plan.get("usernets", ())
        if template is not None:
            values |= {"ram": str(template.ram), "tsc_khz": template.tsc_khz}
            state = [template.state]
        self.way = way = transport.open_way(plan.get("transport", ""), self.place, partial(self._child, os.getpid()))
        if program := plan.get("virtiofsd"):
            from engine.runtimes.vm import virtiofs  # few need it

            virtiofs.serve(program, self.place, self._shared, partial(self._child, os.getpid()))
        taps = network.make_taps(Path(plan["netns"]), plan["taps"]) if plan["taps"] else []
        self._guard = Guard() if self._guarded else None
        child = partial(self._child, os.getpid(), self._guard)
        self.qemu, console, watch = launch.launch(self.place, values, way, child, taps=taps, state=state)
        first, hello = (b"", b"") if template is None else (templates.load(template), template.hello)
        process = self.qemu
        agent = partial(way.connect, lambda: process.poll() is not None, patience)
        return self._meet(agent, console, watch, first, hello)

    def _meet(
        self,
        agent: Callable[[], socket.socket],
        console: socket.socket,
        watch: socket.socket,
        first: bytes,
        hello: bytes,
        run: int = 0,
    ) -> AgentClient:
        """QEMU runs; from here on what it and its guest say is listened to."""
        assert self.qemu is not None
        (self.place / "qemu.pid").write_text(str(self.qemu.pid))
        threading.Thread(target=self._listen, args=(console,), name="console", daemon=True).start()
        faults.follow(watch, partial(self._breaks, self.qemu), first)
        self.relay = Relay()
        self.relay.link = self.link = AgentClient(agent(), deadline=None, foreign=self.relay.took, hello=hello, run=run)
        return self.link

    def _child(self, parent: int, guard: Guard | None = None) -> None:
        if guard is None:
            host.die_with_parent(signal.SIGKILL, parent)
        else:
            guard.watch()
        cpus = self.document.get("linux", {}).get("resources", {}).get("cpu", {}).get("cpus")
        if cpus and host.LINUX:
            os.sched_setaffinity(0, translate.cpu_numbers(cpus))  # of the host: the guest has CPUs of its own
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()  # a terminal's ^C is for the guest's process

    def _shares(self) -> None:
        """Fill the directory QEMU exports with what the container's mounts name."""
        from engine.runtimes.vm import sharing  # a machine that stood by needs none of it

        sources = translate.bind_sources(self.document)
        self._shared.mkdir(exist_ok=True, mode=0o700)
        if (numbers := self.plan.get("exports")) is not None:
            sharing.gather(self._shared, sources, numbers)
            self._exports = sharing.exports(sources, numbers)
        elif sources:
            sharing.bind(self._shared, sources, self.place.parents[3])

    def _prepare(self, link: AgentClient) -> None:
        """The guest's clock, its generator of random numbers, its file systems."""
        link.calls(preparation(self.plan, self.document), deadline=MOUNT_SECONDS)

    def _run(self, link: AgentClient) -> None:
        """What runc does on a host before it waits for `start`."""
        self.stream, _ = link.open("RUN", run_words(self.plan, self.document), deadline=30.0)

    # --- start and after -----------------------------------------------------------------------------------------

    def serve(self, start_fifo: Path) -> None:
        """Answer at agent.sock from now on; `START` sets up the network first, and removes `start_fifo`."""
        assert self.relay is not None and self.link is not None

        def before_start() -> None:
            if self.plan["taps"]:
                from engine.runtimes.vm import network

                for interface in network.join(Path(self.plan["netns"]), self.plan["networks"]):
                    assert self.link is not None
                    self.link.call("NET", network.words(interface))
            for described in self.plan.get("usernets", ()):
                assert self.link is not None
                self.link.call("NET", described["words"])
            start_fifo.unlink(missing_ok=True)

        self.relay.before["START"] = before_start
        (self.place / "accelerator").write_text(
            self.plan["machine"]["accelerator"]
        )  # which may be another than planned
        self.relay.listen(self.place / SOCKET)
        clock.keep(self.link, self.place)

    def wait(self, out: int, err: int) -> NoReturn:
        """Hand on what the container prints until it ends; end as it did."""
        assert self.stream is not None
        event = pump.drain(self.stream, out, err)
        if event is None:
            assert self.link is not None
            words = self._last_words()
            why = (self.way.lost() if self.way else "") or self.link.lost
            accelerator = self.plan["machine"]["accelerator"]
            if self._broken:
                why = f"QEMU stopped it: {self._broken}"
                if accelerator != TCG:
                    self._refuse(why)
                    why += f"; {accelerator} is not used again until the host is started anew"
            self._note(f"the virtual machine ended: {why}" + (f": {words}" if words else ""))
            self.end()
            os._exit(GONE)
        if event.oom:
            self._note("out of memory: the guest's kernel killed a process of the container")
            flag = Path(self.plan["oom"])
            with contextlib.suppress(OSError):  # a full disk; the reason is written down elsewhere
                flag.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                flag.touch()
        self.end()
        os._exit(event.code)

    def end(self) -> None:
        """Power off: the guest writes out its disk; then QEMU is gone, one way or the other."""
        process = self.qemu
        if process is None:
            return
        if self.link is not None and not self.link.lost:
            with contextlib.suppress(EngineError, OSError):
                self.link.call("POWEROFF", {"reboot": 1}, deadline=POWEROFF_SECONDS)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POWEROFF_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()
        if self._guard is not None:
            self._guard.done()
        self.qemu = self._guard = None
        if self.way is not None:
            self.way.close()
        (self.place / SOCKET).unlink(missing_ok=True)  # left behind by one that was killed: driver.py, _finish

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the exit code still says that it ended
            self.reason.write_text(" ".join(text.split())[:1000])

    def _listen(self, console: socket.socket) -> None:
        """The guest's console, its last lines kept; however much it writes, nothing grows."""
        with contextlib.suppress(OSError):
            while data := console.recv(4096):
                self._console += data
                del self._console[:-CONSOLE_KEPT]

    def _last_words(self) -> str:
        """What QEMU and the guest's console said last."""
        text = bytes(self._console).decode(errors="replace")
        with contextlib.suppress(OSError):
            text = (self.place / "qemu.log").read_bytes()[-2000:].decode(errors="replace") + text
        lines = [line for line in text.splitlines() if line.strip()]
        for number, line in enumerate(lines):
            if "Kernel panic" in line:  # what comes after it are registers
                return " | ".join(lines[max(0, number - 2) : number + 1])
        return " | ".join(lines[-4:])
