"""What stays with a container's process where there is no conmon, which is for Linux: a program of its own. Floor 2.

It is called as conmon is (conmon.py), and leaves the same files in the same places: the log in the CRI format, the exit
code, the pids, the fifo `ctl`. Nothing but Python's library is needed, and nothing of one system: no subreaper (the
process it waits for is its own child), no SOCK_SEQPACKET, no signalfd; it waits with select(2), for poll(2) of macOS
knows no terminals. One process per container or session, one thread; it outlives the daemon.

What differs from conmon:
    the runtime     `create` and `exec` do not leave the process behind, they become it: $DUTCHMAN_STAY is a socket,
                    where the process says `ready`, or what is wrong. When that ends, the monitor has been killed, and
                    the process must end.
    attach.stream   the attach socket (engine/attachline.py). A client that does not read holds up the process.
    input           a socket of requests, for who may be killed while a process goes on: four bytes of length (big
                    endian) and the input; answered by four bytes that count what the process's pipe has taken, again as
                    that grows. Who ends the sending side takes back the rest, and gets the last count. GONE: the input
                    has ended.
    ctl             `3 0 0` ends the input after what has come.

Errors until the process is ready are reported on $_OCI_SYNCPIPE; later ones go to its own standard error (conmon.log).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time

from engine.runtimes.monitorfiles import Log, listen, note, warn
from engine.runtimes.monitorinput import Asker, Client, Input

STAY, LINE = "DUTCHMAN_STAY", 3  # in the environment: the number of the descriptor
ATTACH, INPUT = "attach.stream", "input"  # below the bundle
VERSION = "dutchman monitor 1"
BUFFER = 8 << 10  # bytes of output in one piece, as conmon's
BEHIND = 1 << 20  # bytes a client may lag behind before the process waits for it
MAX_CLIENTS = 200  # select(2) ends at 1023
LAST_READERS = 2.0  # seconds without a byte read, of clients that are owed output when all is over
MAX_MESSAGE = 32 << 10
NOTHING = frozenset({"--full-attach", "--exec-attach", "-e", "-i", "-t", "--leave-stdin-open", "--no-sync-log"})


def parse(argv: list[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """Options with a value, those without, and the runtime's own arguments."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    more: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in NOTHING:
            flags.add(word)
        elif word == "--runtime-arg":
            more.append(next(rest))
        else:
            values[word] = next(rest)
    return values, flags, more


class Monitor:
    def __init__(self, argv: list[str]) -> None:
        self.values, self.flags, self.runtime_arguments = parse(argv)
        self.bundle = self.values["-b"]
        self.log = Log(
            self.values["-l"].partition(":")[2],
            int(self.values.get("--log-global-size-max", -1)),
            "--no-sync-log" not in self.flags,
        )
        self.terminal = "-t" in self.flags
        self.outputs: dict[int, bytes] = {}  # descriptor -> the stream it is
        self.input = Input("-t" not in self.flags and "--leave-stdin-open" not in self.flags)
        self.pid = 0
        self.status: int | None = None
        self.stay: socket.socket | None = None
        self.said = b""  # by the process until it is ready
        self.words = bytearray()  # its standard error until then
        self.clients: list[Client] = []
        self.askers: list[Asker] = []

    # --- before the process is there ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Sockets, fifo, the process's descriptors."""
        ctl = os.path.join(self.bundle, "ctl")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(ctl)
        os.mkfifo(ctl, 0o600)
        self.ctl = os.open(ctl, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._kept = os.open(ctl, os.O_WRONLY | os.O_CLOEXEC)  # without a writer it would be at its end
        self.attach, self.asking = listen(self.bundle, ATTACH), listen(self.bundle, INPUT)
        self.woken, waking = os.pipe()
        for fd in (self.woken, waking):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)

    def _pipes(self) -> tuple[int, int, int]:
        """The process's three descriptors; the other ends are ours. With a terminal they only tell what is wrong."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stdin, out = null, null
        if not self.terminal:
            if "-i" in self.flags:
                stdin, self.input.fd = os.pipe()
                os.set_blocking(self.input.fd, False)
            reading, out = os.pipe()
            self.outputs[reading] = b"stdout"
        reading, err = os.pipe()
        self.outputs[reading] = b"stderr"
        for fd in self.outputs:
            os.set_blocking(fd, False)
        return stdin, out, err

    def launch(self) -> None:
        """The runtime becomes the process."""
        self.stay, theirs = socket.socketpair()
        self.stay.setblocking(False)
        descriptors = self._pipes()
        console = self._console() if self.terminal else ""
        argv = [self.values["-r"], *self.runtime_arguments]
        if "-e" in self.flags:
            argv += ["exec", "--process", self.values["--exec-process-spec"], "--detach"]
        else:
            argv += ["create", "--bundle", self.bundle]
        argv += ["--console-socket", console] if console else []
        argv += ["--pid-file", self.values["-p"], self.values["-c"]]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number, fd in enumerate(descriptors):
                    os.dup2(fd, number)
                os.dup2(theirs.fileno(), LINE)
                os.set_inheritable(LINE, True)  # it may have been that
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGPIPE, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                for name in os.listdir("/dev/fd"):  # pipes we were given for keeping
                    if int(name) > LINE:
                        with contextlib.suppress(OSError):
                            os.set_inheritable(int(name), False)
                os.execvpe(argv[0], argv, {**os.environ, STAY: str(LINE)})
            except BaseException as error:
                os.write(LINE, f"{argv[0]}: {error}".encode())
            finally:
                os._exit(127)
        theirs.close()
        for fd in set(descriptors):
            os.close(fd)

    def _console(self) -> str:
        """Where the process leaves its terminal: a short path."""
        place = f"/tmp/dutchman-{os.getpid()}-{os.urandom(6).hex()}"
        os.mkdir(place, 0o700)
        self._taking = socket.socket(socket.AF_UNIX)
        self._taking.bind(f"{place}/c")
        self._taking.listen(1)
        self._taking.setblocking(False)
        return f"{place}/c"

    def _take_terminal(self) -> None:
        """It comes before the process is ready."""
        name = self._taking.getsockname()
        try:
            giver, _ = self._taking.accept()
            giver.setblocking(True)
            with giver:
                _, fds, _, _ = socket.recv_fds(giver, 64, 1)
            if fds:
                os.set_inheritable(fds[0], False)
                os.set_blocking(fds[0], False)
                self.outputs[fds[0]] = b"stdout"
                self.input.fd, self.input.shared = fds[0], True
        except BlockingIOError:
            pass  # it had none to give
        self._taking.close()
        os.unlink(name)
        os.rmdir(os.path.dirname(name))

    # --- the process is there -------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until the process has ended and all is written; its exit code. Reports on the way."""
        while self.status is None:
            self._turn(None)
        self._hear()
        self._drain()
        code = self._code()
        if self.stay is not None:  # it ended before it was ready
            self._report(False)
            return code
        for directory, name in ((self.values["--persist-dir"], "exit"), (self.values["--exit-dir"], self.values["-c"])):
            note(os.path.join(directory, name), str(code))
        self.log.close()
        self.input.close()
        last = time.monotonic()
        while any(client.owed for client in self.clients) and time.monotonic() - last < LAST_READERS:
            if self._turn(LAST_READERS):
                last = time.monotonic()
        return code

    def _code(self) -> int:
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code

    def _turn(self, seconds: float | None) -> bool:
        """One wait, and what it brought; whether a client has read."""
        full = any(len(client.owed) > BEHIND for client in self.clients)
        reading: list[int | socket.socket] = [self.ctl, self.woken, self.attach, self.asking]
        if self.stay is not None:
            reading.append(self.stay)
        reading += [] if full else list(self.outputs)
        reading += [c.line for c in self.clients if c.reads and not c.fed]
        reading += [a.line for a in self.askers if not a.over]
        writing: list[int | socket.socket] = [c.line for c in self.clients if c.owed]
        if self.input.wants:
            writing.append(self.input.fd)
        if self.status is not None:
            reading = []
        can_read, can_write, _ = select.select(reading, writing, [], seconds)
        ready = set(can_read)
        if self.woken in ready:
            self._woken()
        for listener, kind in ((self.attach, Client), (self.asking, Asker)):
            if listener in ready:
                self._accept(listener, kind)
        self._hear()  # before its output: that it is ready it has said before
        for fd in [fd for fd in self.outputs if fd in ready]:
            self._read(fd)
        if self.ctl in ready:
            self._command()
        for client in [client for client in self.clients if client.line in ready]:
            self.input.receive(client)
        for asker in [asker for asker in self.askers if asker.line in ready]:
            self.input.ask(asker)
        if self.input.fd in can_write:
            self.input.feed()
        moved = False
        for client in [client for client in self.clients if client.line in can_write]:
            moved |= client.send()
        for client in [client for client in self.clients if client.gone]:
            self.input.forget(client)
            self.clients.remove(client)
            client.line.close()
        self.askers = [asker for asker in self.askers if not asker.answer(self.input.ended)]
        return moved

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.woken, 4096)
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None

    def _hear(self) -> None:
        while self.stay is not None:
            try:
                data = self.stay.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self.said += data[: MAX_MESSAGE - len(self.said)]
            if self.said == b"ready":
                self._report(True)
            elif not data:
                if self.status is None:
                    self.status = os.waitpid(self.pid, 0)[1]  # it said what is wrong, and ends
                return

    def _report(self, ready: bool) -> None:
        """The process waits (or runs, in a session), or what is wrong."""
        if self.terminal:
            self._take_terminal()
        number = int(os.environ["_OCI_SYNCPIPE"])
        if ready:
            note(self.values["-p"], str(self.pid))
            report: dict[str, object] = {"data": self.pid}
            self._held, self.stay = self.stay, None  # open as long as we live
            if self.words:
                self.log.write(b"stderr", bytes(self.words))
            self.input.open = True
            self.input.feed()
        else:
            words = self.said or bytes(self.words) or b"the runtime ended with status %d" % self._code()
            report = {"data": -1, "message": words.decode(errors="replace")}
        with contextlib.suppress(OSError):  # who waited for it was killed
            os.write(number, json.dumps(report).encode() + b"\n")
        for name in ("_OCI_SYNCPIPE", "_OCI_STARTPIPE", "_OCI_ATTACHPIPE"):
            if name in os.environ:
                with contextlib.suppress(OSError):
                    os.close(int(os.environ[name]))

    # --- output ---------------------------------------------------------------------------------------------------

    def _read(self, fd: int) -> bool:
        """A piece of output; False when there is none, at present or for good."""
        try:
            data = os.read(fd, BUFFER)
        except BlockingIOError:
            return False
        except OSError as error:  # of a terminal whose other end is gone
            if error.errno != errno.EIO:
                warn(f"output: {error}")
            data = b""
        if not data:
            del self.outputs[fd]
            if fd == self.input.fd:
                self.input.close()
            os.close(fd)
            return False
        stream = self.outputs[fd]
        if self.stay is not None:  # nothing but the runtime can have written
            self.words += data[: MAX_MESSAGE - len(self.words)]
            return True
        self.log.write(stream, data)
        piece = struct.pack(">BI", 2 if stream == b"stdout" else 3, len(data)) + data
        for client in self.clients:
            client.owed += piece
        return True

    def _drain(self) -> None:
        """What the process left in its pipes. Who else has them open (a child of it) is not waited for."""
        for fd in list(self.outputs):
            while fd in self.outputs and self._read(fd):
                pass

    def _accept(self, listener: socket.socket, kind: type[Client] | type[Asker]) -> None:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        line.setblocking(False)
        if len(self.clients) + len(self.askers) >= MAX_CLIENTS:
            line.close()
        elif kind is Client:
            self.clients.append(Client(line))
        else:
            self.askers.append(Asker(line))

    # --- commands --------------------------------------------------------------------------------------------

    def _command(self) -> None:
        """Lines of ctl: window size, reopen, end of input."""
        try:
            text = os.read(self.ctl, 4096)
        except BlockingIOError:
            return
        for line in text.splitlines():
            try:
                kind, rows, columns = (int(word) for word in line.split())
                if kind == 1 and self.input.shared and self.input.fd >= 0:
                    fcntl.ioctl(self.input.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                elif kind == 2:
                    self.log.reopen()
                elif kind == 3:
                    self.input.end()
            except (ValueError, OSError, struct.error) as error:
                warn(f"ctl: {line[:80]!r}: {error}")


def main(argv: list[str]) -> int:
    if "--version" in argv:
        print(VERSION)
        return 0
    if "--help" in argv:
        print(__doc__, *sorted(NOTHING), sep="\n")
        return 0
    starting = int(os.environ.get("_OCI_STARTPIPE", -1))
    if starting >= 0:
        os.read(starting, 1)  # may go on
    if os.fork():
        os._exit(0)
    os.setsid()
    monitor = Monitor(argv)
    note(monitor.values["-P"], str(os.getpid()))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    monitor.prepare()
    if "_OCI_ATTACHPIPE" in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ["_OCI_ATTACHPIPE"]), b'{"data": 0}\n')
    if starting >= 0:
        os.read(starting, 1)  # and now execute it
    monitor.launch()
    return monitor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
