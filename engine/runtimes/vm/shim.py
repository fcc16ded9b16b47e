"""The vm runtime's command line, as runc's: what conmon and the driver call. Floor 2.

Only here: its verbs. `create` leaves a process (owner.py) that stands for the container; `exec` one that stands for the
session; the others talk to the owner's socket, or to a pid. State: <root>/<id>/state.json; <root>/<id>/exec.fifo is
there until `start`, as runc has it. Errors are one line on standard error and status 1.
Source: runc's man pages; conmon's src/conmon.c for which options are used.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from engine import host, hostfiles
from engine.errors import EngineError, NotFound, RuntimeFailure, Unreachable
from engine.runtimes.monitor import STAY
from engine.runtimes.vm import pump, translate
from engine.runtimes.vm.client import AgentClient, GuestError
from engine.runtimes.vm.guestsetup import MAIN
from engine.runtimes.vm.owner import Owner

GREETING = 10.0  # seconds for the owner to answer
WITH_VALUE = {"--root", "--bundle", "-b", "--pid-file", "--console-socket", "--process", "-p", "--resources", "-r"}
WITH_VALUE |= {"--log", "--log-format", "--criu"}


def parse(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options with their values (flags: ""), and the words: verb, id, and more."""
    options: dict[str, str] = {}
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
        elif "=" in word:
            name, _, value = word.partition("=")
            options[name] = value
        else:
            options[word] = next(rest, "") if word in WITH_VALUE else ""
    return options, words


def connect(place: Path) -> AgentClient:
    """To the agent through the owner of the machine whose files are at `place`. NotFound when it does not run,
    RuntimeFailure when its socket cannot be used."""
    client = socket.socket(socket.AF_UNIX)
    try:
        with hostfiles.socket_address(place / "agent.sock") as address:
            client.connect(address)
    except (EngineError, OSError) as error:
        client.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise NotFound("the virtual machine does not run") from error
        raise RuntimeFailure(f"the virtual machine cannot be reached at {place / 'agent.sock'}: {error}") from error
    return AgentClient(client, deadline=GREETING)


def end_with_reader(pipe: int) -> Callable[[], None]:
    """This process ends, and its machine with it, when nobody can read from `pipe` any more: its creator was killed.
    What is returned ends that."""
    over, ending = os.pipe()

    def work() -> None:
        poll = select.poll()
        poll.register(pipe, 0)  # POLLERR is told anyhow
        poll.register(over, select.POLLIN)
        if all(fd != over for fd, _ in poll.poll()):
            os._exit(1)

    thread = threading.Thread(target=work, name="creator", daemon=True)
    thread.start()

    def end() -> None:
        os.write(ending, b"1")
        thread.join()
        os.close(over)
        os.close(ending)

    return end


def end_with_peer(line: int) -> Callable[[], None]:
    """This process ends when the socket `line` does: who waits for it was killed (engine/runtimes/monitor.py)."""
    peer = socket.socket(fileno=os.dup(line))

    def work() -> None:
        while peer.recv(64):
            pass
        os._exit(1)

    threading.Thread(target=work, name="monitor", daemon=True).start()
    return lambda: None  # for good


class Shim:
    def __init__(self, options: dict[str, str], id: str) -> None:
        self.options = options
        self.id = id
        self.state = Path(options["--root"]) / id

    def _saved(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.state / "state.json").read_bytes())
        except FileNotFoundError:
            raise NotFound("container does not exist") from None
        return found

    def _link(self) -> AgentClient:
        return connect(Path(self._saved()["bundle"]).parent / "run" / "vm")

    def create(self) -> None:
        bundle = Path(self.options.get("--bundle") or self.options["-b"]).resolve()
        self.state.mkdir(parents=True, mode=0o700)
        fifo = self.state / "exec.fifo"
        fifo.touch()
        pump.block_signals()
        if stay := os.environ.pop(STAY, ""):
            self._own(bundle, fifo, int(stay), end_with_peer)
        host.die_with_parent(signal.SIGKILL)  # a killed conmon leaves nobody who waits for a machine that boots
        try:
            self._leave(
                lambda writing: self._own(bundle, fifo, writing, end_with_reader), "the process that owns the machine"
            )
        except RuntimeFailure:
            host.remove_tree(self.state)
            raise
        os._exit(0)  # Python takes a while to tidy up, and conmon waits

    def _leave(self, stand: Callable[[int], NoReturn], who: str) -> None:
        """Leave a process that runs `stand`, with a descriptor to say `ready` at, or why not: RuntimeFailure then."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            stand(writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read(64 << 10)
        if said != b"ready":
            raise RuntimeFailure(said.decode(errors="replace") or f"{who} was killed")
        if path := self.options.get("--pid-file"):
            Path(path).write_text(str(pid))

    def _own(self, bundle: Path, fifo: Path, writing: int, watch: Callable[[int], Callable[[], None]]) -> NoReturn:
        """Be the process that stands for the container."""
        try:
            os.setsid()
            state = {"bundle": str(bundle), "pid": os.getpid(), "created_ns": time.time_ns()}
            (self.state / "state.json").write_text(json.dumps(state))
            owner = Owner(bundle, guarded=watch is end_with_peer)
            booted = watch(writing)
            terminal = self._terminal(owner.document["process"])
            owner.boot()
            assert owner.link is not None and owner.stream is not None
            owner.serve(fifo)
            booted()
            os.write(writing, b"ready")
            os.close(writing)
            pump.hand_on(owner.link, MAIN, terminal)
            pump.feed(owner.stream, 0 if terminal is None else terminal)
            owner.wait(*((1, 2) if terminal is None else (terminal, terminal)))
        except BaseException as error:
            if watch is end_with_peer:  # there is nobody else to do so
                host.remove_tree(self.state)
            os.write(writing, _told(error))
            os._exit(1)

    def _terminal(self, process: dict[str, Any]) -> int | None:
        path = self.options.get("--console-socket")
        if not process.get("terminal") or not path:
            return None
        size = process.get("consoleSize")
        return pump.give_terminal(path, (size["height"], size["width"]) if size else None)

    def start(self) -> None:
        self._link().call("START", {"id": MAIN}, deadline=30.0)

    def exec(self) -> int:
        """Of `--process FILE`. Waits for its end unless it is detached."""
        process = json.loads(Path(self.options.get("--process") or self.options["-p"]).read_bytes())
        saved = self._saved()
        plan = json.loads((Path(saved["bundle"]) / "vm.json").read_bytes())
        detached = "--detach" in self.options or "-d" in self.options
        pump.block_signals()
        if not detached:
            return self._session(saved, plan, process, None)
        if stay := os.environ.pop(STAY, ""):
            self._stand(saved, plan, process, int(stay), end_with_peer)
        self._leave(lambda writing: self._stand(saved, plan, process, writing), "the session's process")
        return 0

    def _stand(self, saved: dict[str, Any], plan: dict[str, Any], process: dict[str, Any], writing: int,
               watch: Callable[[int], object] = lambda _: None) -> NoReturn:  # fmt: skip
        """Be the process that stands for the session."""
        try:
            os.setsid()
            watch(writing)
            os._exit(self._session(saved, plan, process, writing))
        except BaseException as error:
            os.write(writing, _told(error))
            os._exit(1)

    def _session(self, saved: dict[str, Any], plan: dict[str, Any], process: dict[str, Any], ready: int | None) -> int:
        link = connect(Path(saved["bundle"]).parent / "run" / "vm")
        words = translate.process_words(process, plan["capabilities"])
        if plan.get("seccomp"):
            words["seccomp"] = bytes.fromhex(plan["seccomp"])
        name = f"exec-{os.getpid()}-{time.monotonic_ns() % 10**12}"
        terminal = self._terminal(process)
        stream, _ = link.open("EXEC", {"id": name, "in": MAIN, **words}, deadline=30.0)
        if ready is not None:
            os.write(ready, b"ready")
            os.close(ready)
        pump.hand_on(link, name, terminal)
        pump.feed(stream, 0 if terminal is None else terminal)
        event = pump.drain(stream, *((1, 2) if terminal is None else (terminal, terminal)))
        return 137 if event is None else event.code

    def update(self) -> None:
        """Refused, as by runc, when more memory is in use than is to be allowed: the kernel would kill."""
        resources = json.loads(Path(self.options.get("--resources") or self.options["-r"]).read_bytes())
        link = self._link()
        limit = resources.get("memory", {}).get("limit", -1)
        if limit > 0 and (used := translate.memory_in_use(link.call("STATS"))) > limit:
            raise RuntimeFailure(f"memory: {used} bytes are in use, more than the limit of {limit}")
        link.call("LIMITS", {"cgroup": translate.cgroup_words(resources)})
        if host.LINUX and (cpus := resources.get("cpu", {}).get("cpus")):
            pid = (Path(self._saved()["bundle"]).parent / "run" / "vm" / "qemu.pid").read_text()
            for thread in os.listdir(f"/proc/{int(pid)}/task"):
                os.sched_setaffinity(int(thread), translate.cpu_numbers(cpus))

    def kill(self, words: list[str]) -> None:
        number = int(words[0]) if words and words[0].isdigit() else getattr(signal, words[0] if words else "SIGTERM")
        os.kill(self._saved()["pid"], number)

    def delete(self) -> None:
        """What is left of it here; its process is the caller's to end first, or is killed with --force."""
        try:
            saved = self._saved()
        except NotFound:
            saved = {}
        if saved and ("--force" in self.options or "-f" in self.options):
            from engine.runtimes import pids  # no other verb needs it

            if self.id.encode() in pids.words(saved["pid"]):
                os.kill(saved["pid"], signal.SIGKILL)
        host.remove_tree(self.state)


def main(argv: list[str]) -> int:
    options, words = parse(argv)
    if len(words) < 2 or "--root" not in options:
        print("usage: --root DIR create|start|exec|update|kill|delete ID", file=sys.stderr)
        return 2
    verb, id, *more = words
    shim = Shim(options, id)
    try:
        match verb:
            case "create":
                shim.create()
            case "start":
                shim.start()
            case "exec":
                return shim.exec()
            case "update":
                shim.update()
            case "kill":
                shim.kill(more)
            case "delete":
                shim.delete()
            case "template":  # no container: `id` is its key, the request is on standard input
                from engine.runtimes.vm import templatemaker  # few need it

                return templatemaker.main(sys.stdin)
            case "standby":  # no container: `id` is a template's key, the request is on standard input
                from engine.runtimes.vm import standbykeeper  # few need it

                return standbykeeper.main()
            case _:
                print(f"unknown command {verb}", file=sys.stderr)
                return 2
    except GuestError as error:
        print(as_runc(error), file=sys.stderr)
        return 1
    except (EngineError, Unreachable, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _told(error: BaseException) -> bytes:
    """What a child tells the process that waits for it."""
    text = as_runc(error) if isinstance(error, GuestError) else str(error)
    return text.encode()[:4096] or type(error).__name__.encode()


def as_runc(error: GuestError) -> str:
    """An executable that cannot be run is told of in runc's words: exit codes 126 and 127 follow from them."""
    name, searched, _ = error.step.removeprefix("exec ").partition(" (looked for in $PATH)")
    if not error.step.startswith("exec "):
        return error.reason
    if searched and error.errno == errno.ENOENT:
        return f'exec: "{name}": executable file not found in $PATH'
    return f'exec: "{name}": {os.strerror(error.errno or 0).lower()}'
