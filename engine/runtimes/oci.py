"""The `oci` driver: runc or crun, under conmon, on Linux as root.

Floor 2. The daemon holds nothing a container needs: conmon is its own session and cgroup, all facts are files in
`containers/<id>/run`, so a later daemon finds every run again. Who waits for the ends of conmons is watches.py.

What can happen while no daemon looks, and what is found then:
    the process ended            exit file -> stopped with its code
    conmon was killed            no exit file, process perhaps alive -> `watch` kills it and reports 137 with a reason
    the daemon died in `create`  no facts.json, but pid files -> created; `delete` clears it
    the host restarted           facts of another boot -> stopped, 255, with a reason
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import host, userids
from engine.config import ContainerConfig
from engine.errors import Busy, DeadlineExceeded, EngineError, NotFound, RuntimeFailure, Unsupported
from engine.logs import mend
from engine.runtimes import cgroups, conmon, pids, probing, spec, stdio, unprivileged
from engine.runtimes.base import Exit, Joined, Probe, RunSpec, State, Status, make_spec
from engine.runtimes.calls import call, find_conmon, first_line, search_path, words
from engine.runtimes.conmon import Facts, Files
from engine.runtimes.oci_sessions import OciSessions
from engine.runtimes.resources import Resources
from engine.runtimes.watches import UNKNOWN, Watches

log = logging.getLogger(__name__)

RUNTIMES = ("runc", "crun")  # in order of preference: runc also does cgroup v1 and hybrid
DEADLINE = 20.0  # seconds for one call of the runtime
LAST_WORDS = 5.0  # seconds for a killed process, or conmon after it, to end
LIVE = (State.CREATED, State.RUNNING, State.PAUSED)


class OciRuntime(Joined):
    name = "oci"
    create_deadline = conmon.CREATE_DEADLINE
    host_limits = True  # limits are those of cgroups here

    def __init__(self, containers: Path, *, state: Path | None = None, runtimes: tuple[str, ...] = RUNTIMES) -> None:
        """`containers` holds a directory per id; `state`, not on the same disk, is for what must not survive a boot."""
        self._containers = containers
        base = state or host.runtime_dir() / "oci"
        self._state, self._exits = base / "runtime", base / "exits"
        self._runtimes = runtimes
        self._cgroups = cgroups.Cgroups.detect()
        self._lock = threading.Lock()  # guards the fields below; never held over a wait
        self._probed: tuple[Probe, str, str] | None = None  # result, runtime path, conmon path
        self._advice = "see `dutchman doctor`"
        self._flags: tuple[str, ...] = ()  # those of conmon.FLAGS that it knows
        self._probe_lock = threading.Lock()
        self._directories: dict[str, Path] = {}
        self._watches = Watches(self._finish)
        self.console = stdio.OciConsole(lambda id: (self._expect(id, *LIVE), self._files(id))[1])
        tools = lambda: (*self._tools(), self._flags)  # noqa: E731
        self.sessions = OciSessions(
            self._state, self._exits, lambda id: self._files(id).directory, tools, self._cgroups
        )

    # --- probing ------------------------------------------------------------------------------------------------

    def probe(self) -> Probe:
        with self._probe_lock:
            if self._probed is None or not self._probed[0].ok:
                try:
                    self._probed = self._find()
                except Unsupported as error:
                    self._probed, self._advice = (Probe(False, error.reason), "", ""), error.hint or self._advice
                except (OSError, EngineError, subprocess.SubprocessError) as error:
                    self._probed = Probe(False, f"probing failed: {error}"), "", ""
            return self._probed[0]

    def _find(self) -> tuple[Probe, str, str]:
        if userids.alone():
            return Probe(False, "you have no subordinate ids (see `dutchman doctor`); runtime vm needs none"), "", ""
        monitor, self._flags = find_conmon()
        refused = []
        for name in self._runtimes:
            binary = shutil.which(name, path=search_path())
            if binary is None:
                refused.append(f"{name} is not installed")
                continue
            fault = self._try(binary)
            if fault is not None:
                refused.append(f"{name} refuses: {fault}")
                continue
            version = first_line([binary, "--version"])
            why = f"; {'; '.join(refused)}" if refused else ""
            reason = f"{name} works here (cgroup v{self._cgroups.version}){why}"
            return Probe(True, reason, f"{version}, {first_line([monitor, '--version'])}"), binary, monitor
        return Probe(False, "; ".join(refused)), "", ""

    def _try(self, binary: str) -> str | None:
        """None when `binary` can set up a container here, else why not.

        An empty root filesystem, so that all is set up (cgroups, namespaces, mounts, seccomp) until the very last step
        fails: its executable is not there. That it complains of this, and of nothing else, is the proof.
        """
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="dutchman-probe-") as place:
            bundle = Path(place)
            (bundle / "rootfs").mkdir()
            name = "probe-" + bundle.name.rpartition("-")[2]
            config = ContainerConfig(command=("/dutchman-probe",))  # type: ignore[call-arg]
            run = make_spec(id=name, name=name, directory=bundle, rootfs=bundle / "rootfs", config=config)
            spec.prepare(run)
            (bundle / "config.json").write_text(json.dumps(spec.build(run, self._cgroups)))
            base = [binary, "--root", str(self._state)]
            done = call([*base, "run", "--bundle", place, name], 10.0)
            call([*base, "delete", "--force", name], 10.0)
            cgroups.remove(self._cgroups, name)
            said = words(done)
            return None if "/dutchman-probe" in said else said or f"exit status {done.returncode}"

    def _tools(self) -> tuple[str, str]:
        result = self.probe()
        if not result.ok or self._probed is None:
            reason = result.reason.removeprefix(f"runtime {self.name}: ")
            raise Unsupported(f"runtime {self.name}: {reason}", hint=self._advice)
        return self._probed[1], self._probed[2]

    # --- the protocol -------------------------------------------------------------------------------------------

    def create(self, spec_: RunSpec) -> int:
        runtime, monitor = self._tools()
        with self._lock:
            self._directories[spec_.id] = spec_.directory
        now = self.status(spec_.id).state
        if now not in (State.ABSENT, State.STOPPED):
            raise Busy(f"the container is {now}")
        self.delete(spec_.id)
        with self._lock:
            self._directories[spec_.id] = spec_.directory
        files = self._files(spec_.id)
        config = spec.build(spec_, self._cgroups, guest=not self.host_limits)
        for directory in (files.bundle, files.run, files.kept_exit.parent, files.spare, files.log.parent):
            directory.mkdir(parents=True, exist_ok=True)
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        mend(files.log)
        spec.prepare(spec_, guest=not self.host_limits)
        self._ready(spec_, files, config)
        (files.bundle / "config.json").write_text(json.dumps(config, separators=(",", ":")))
        files.resources.write_text(json.dumps(self._limits(Resources.of(spec_.config))))
        stdio.note_terminal(files, spec_.config.tty)
        try:
            arguments = ["--root", str(self._state)]
            tty = spec_.config.tty
            stdin = spec_.config.stdin
            facts = conmon.launch(
                monitor, runtime, arguments, files,
                terminal=tty, stdin=stdin, flags=self._flags, deadline=self.create_deadline,
            )  # fmt: skip
            facts.save(files.facts)
        except BaseException:
            self.delete(spec_.id, runtime)
            raise
        move = threading.Thread(target=cgroups.adopt_monitor, args=(self._cgroups, facts.conmon), daemon=True)
        move.start()  # aside: it is slow, and nothing waits for it
        return facts.pid

    def _ready(self, spec_: RunSpec, files: Files, config: dict[str, Any]) -> None:
        """What another runtime needs before conmon starts it; `config` is about to be written."""

    def start(self, id: str) -> None:
        self._expect(id, State.CREATED)
        self._call(id, "start")

    def signal(self, id: str, signum: int) -> None:
        facts = self._expect(id, *LIVE)
        conmon.send_signal(facts.pid, facts.pid_start, signum, "container")
        if signum == signal.SIGKILL:
            cgroups.thaw(self._cgroups, id)  # a frozen process of cgroup v1 dies only when thawed

    def pause(self, id: str) -> None:
        self._expect(id, State.RUNNING)
        unprivileged.refuse("pause", self._cgroups)
        self._call(id, "pause")

    def resume(self, id: str) -> None:
        self._expect(id, State.PAUSED)
        self._call(id, "resume")

    def update(self, id: str, resources: Resources) -> None:
        self._expect(id, State.RUNNING, State.PAUSED)
        files = self._files(id)
        new = json.dumps(self._limits(resources))
        aside = files.bundle / "resources.new"
        if not aside.exists() and files.resources.exists() and files.resources.read_text() == new:
            return  # they are in force, and no update was cut short
        if self.host_limits:
            unprivileged.refuse("update", self._cgroups)
            cgroups.make_room(self._cgroups, id, resources.memory)
        aside.write_text(new)
        try:
            self._call(id, "update", "--resources", str(aside))
            if not resources.memory_reservation:
                cgroups.drop_reservation(self._cgroups, id)
        except EngineError:
            try:
                self._call(id, "update", "--resources", str(files.resources))  # some of them may have been set
            except EngineError as error:
                log.error("container %s: a failed update was not undone: %s", id, error)
            aside.unlink()
            raise
        os.replace(aside, files.resources)

    def _limits(self, resources: Resources) -> dict[str, Any]:
        """`linux.resources` of an update, every limit in it."""
        limits = resources.update(swap=self._cgroups.swap, cpus=cgroups.all_cpus(self._cgroups))
        if self._cgroups.version == 2:  # version 1 refuses by itself; 2 would kill
            limits["memory"]["checkBeforeUpdate"] = True
            if not resources.memory_reservation:
                del limits["memory"]["reservation"]  # -1 would mean all of it: drop_reservation
        return unprivileged.limits(limits, self._cgroups) if self.host_limits else limits

    def status(self, id: str) -> Status:
        """From files and /proc alone, no process is started: cheap enough to ask often."""
        files = self._files(id)
        facts = self._facts(files)
        finished = conmon.exit_code(files)
        if finished is not None:
            return Status(State.STOPPED, None, finished[0], files.oom.exists(), finished[1])
        if facts is None:
            return Status(State.ABSENT)
        if facts.boot != pids.boot_id() or pids.start_time(facts.pid) != facts.pid_start:
            if facts.boot == pids.boot_id() and pids.start_time(facts.conmon) == facts.conmon_start:
                # the process has ended and conmon is about to say how: still running for a few milliseconds
                return Status(State.RUNNING, facts.pid)
            finished = conmon.exit_code(files)  # it may have come between the two looks
            code, when = finished if finished is not None else (UNKNOWN, None)
            return Status(State.STOPPED, None, code, files.oom.exists(), when)
        if (self._state / id / "exec.fifo").exists():  # runc and crun keep it from `create` to `start`
            return Status(State.CREATED, facts.pid)
        return Status(State.PAUSED if cgroups.frozen(self._cgroups, id) else State.RUNNING, facts.pid)

    def watch(self, id: str, on_exit: Callable[[str, Exit], None]) -> None:
        facts = self._facts(self._files(id))
        pidfd = -1
        if facts is not None and facts.boot == pids.boot_id():
            found = pids.open_process(facts.conmon, facts.conmon_start)
            pidfd = -1 if found is None else found
        self._watches.watch(id, pidfd, on_exit)

    def reopen_log(self, id: str) -> None:
        conmon.reopen_log(self._files(id))

    def delete(self, id: str, runtime: str | None = None) -> None:
        self._watches.forget(id)
        files = self._files(id)
        facts = self._facts(files)
        if facts is not None or (self._state / id).exists():
            if facts is not None and facts.boot == pids.boot_id():
                self._end(facts, id)
            binary = runtime or (facts.runtime if facts is not None else self._tools()[0])
            if (self._state / id).exists():
                done = call([binary, "--root", str(self._state), "delete", "--force", id], DEADLINE)
                if done.returncode and (self._state / id).exists():
                    raise RuntimeFailure(f"delete: {words(done)}")
        if facts is not None and facts.boot == pids.boot_id():
            pidfd = pids.open_process(facts.conmon, facts.conmon_start)
            if pidfd is not None:
                try:
                    if not pids.ended(pidfd, LAST_WORDS):  # it drains the last output, which is worth a moment
                        pids.send(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                finally:
                    os.close(pidfd)
        conmon.kill_conmon(files)
        cgroups.remove(self._cgroups, id)
        for place in (files.spare, files.run, files.bundle):
            host.remove_tree(place)
        with self._lock:
            self._directories.pop(id, None)

    def probe_exec(self, id: str, argv: Sequence[str], *, deadline: float) -> tuple[int, bytes]:
        facts = self._expect(id, State.RUNNING)
        files = self._files(id)
        command = [facts.runtime, "--root", str(self._state)]
        code, output = probing.run(command, files.bundle, files.run, id, argv, deadline)
        if code:
            self._expect(id, State.RUNNING)  # else it was its end, not its health, that was found
        return code, output

    def close(self) -> None:
        self.sessions.close()
        self._watches.close()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, id: str) -> Exit:
        """conmon of `id` has ended: what became of the container. Writes down what would be lost."""
        files = self._files(id)
        facts = self._facts(files)
        if facts is None and conmon.exit_code(files) is None:
            return Exit(UNKNOWN, False, time.time_ns(), "the runtime knows nothing of this container")
        reason = ""
        if conmon.exit_code(files) is None and facts is not None:
            if facts.boot != pids.boot_id():
                code, reason = UNKNOWN, "the host was restarted"
            else:
                try:
                    killed = self._end(facts, id)
                    code = 137 if killed else UNKNOWN
                    reason = "conmon was killed; the container was killed with it"
                    reason = reason if killed else "conmon was killed before it could note the exit code"
                except DeadlineExceeded as error:
                    code, reason = 137, f"conmon was killed; {error.reason}"
            if conmon.exit_code(files) is None:
                conmon.note_exit(files, code, reason)
        try:
            reason = files.reason.read_text()[:500]
        except FileNotFoundError:
            pass
        oom = cgroups.oom_kills(self._cgroups, id) > 0 or files.oom.exists()
        if oom:
            try:
                files.oom.parent.mkdir(parents=True, exist_ok=True)
                files.oom.touch()
            except OSError as error:
                log.warning("container %s: that it was out of memory is not noted: %s", id, error)
            reason = reason or "out of memory: the kernel killed a process of the container"
        code, when = conmon.exit_code(files) or (UNKNOWN, time.time_ns())
        return Exit(code, oom, when, reason)

    # --- pieces -------------------------------------------------------------------------------------------------

    def _files(self, id: str) -> Files:
        with self._lock:
            return Files(self._directories.get(id) or self._containers / id, id, self._exits)

    def _facts(self, files: Files) -> Facts | None:
        """facts.json, or the same from the pid files when the daemon died before it wrote that."""
        facts = Facts.load(files.facts)
        if facts is not None:
            return facts
        try:
            monitor, pid = (int(path.read_text()) for path in (files.conmon_pid, files.pid))
        except (OSError, ValueError):
            return None
        started = pids.start_time(pid)
        if started is None or not (self._state / files.id).exists():
            return None
        try:
            runtime, _ = self._tools()
        except Unsupported:
            return None
        return Facts(runtime, monitor, pids.start_time(monitor) or 0, pid, started, pids.boot_id())

    def _expect(self, id: str, *states: State) -> Facts:
        now = self.status(id).state
        facts = self._facts(self._files(id))
        if now is State.ABSENT or facts is None:
            raise NotFound("the runtime has no such container")
        if now not in states:
            raise Busy(f"the container is {now}")
        return facts

    def _call(self, id: str, verb: str, *options: str) -> None:
        facts = self._facts(self._files(id))
        binary = facts.runtime if facts is not None else self._tools()[0]
        done = call([binary, "--root", str(self._state), verb, *options, id], DEADLINE)
        if done.returncode:
            raise RuntimeFailure(words(done) or f"{verb} failed with exit status {done.returncode}")

    def _end(self, facts: Facts, id: str) -> bool:
        """Kill the container's first process, and with it its whole pid namespace; False when it had ended already."""
        process = pids.open_process(facts.pid, facts.pid_start)
        if process is None:
            return False
        try:
            pids.send(process, signal.SIGKILL)
            cgroups.thaw(self._cgroups, id)
            if not pids.ended(process, LAST_WORDS):
                raise DeadlineExceeded(f"process {facts.pid} does not end after SIGKILL")
        except ProcessLookupError:
            return False
        finally:
            os.close(process)
        return True
