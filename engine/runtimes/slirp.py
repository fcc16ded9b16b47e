"""The way out of an engine without root, and the way in to its published ports: slirp4netns. Floor 2.

Only here: one slirp4netns per user. It connects the holder's network namespace (rootless.py), in which netavark makes
its bridges, with the host's network by ordinary sockets of the user: outwards it is 10.0.2.100 behind 10.0.2.2, a host
port is handed to 10.0.2.100, where netavark's rules lead it to a container. Names are resolved at 10.0.2.3. The host's
own loopback is not to be reached from inside. IPv4 only: slirp4netns 1.2 forwards no IPv6 ports.

It outlives the daemon, as containers do: its pid file says who it is, its API socket what it forwards. Thread-safe.
Source: slirp4netns(1), "API SOCKET".
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import host
from engine.errors import Busy, RuntimeFailure, Unsupported
from engine.hostfiles import socket_address
from engine.programs import find, run_helper
from engine.runtimes import rootless
from engine.runtimes.pids import ended, open_process, start_time

log = logging.getLogger(__name__)

NETWORK, ADDRESS, RESOLVER = "10.0.2.0/24", "10.0.2.100", "10.0.2.3"
MTU = 65520  # the most it takes: fewer, larger packets through user space
READY = 10.0  # seconds to come up
SECONDS = 5.0  # for one answer
MAX_ANSWER = 4 << 20
PACKAGE = "slirp4netns"


@dataclass(frozen=True, slots=True)
class Forward:
    """One port of the host led inside."""

    protocol: str
    address: str  # of the host; 0.0.0.0 for all
    port: int


class Uplink:
    """The one of this user; `directory` is their runtime directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket, self._pid = directory / "slirp.sock", directory / "slirp"
        self._lock = threading.Lock()

    def missing(self) -> str:
        """Why there can be none; '' when there can. Runs nothing."""
        if rootless.tool("slirp4netns") is None:
            return f"{PACKAGE} is not installed"
        if rootless.tool("nsenter") is None:
            return "nsenter is not installed"
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            return "/dev/net/tun may not be opened (as root: modprobe tun, chmod 666 /dev/net/tun)"
        if rootless.holder(self._directory) is None:
            return "the process that holds the namespaces is gone"
        return ""

    def namespace(self) -> str:
        """The network namespace bridges are made in, by path."""
        pid = rootless.holder(self._directory)
        if pid is None:
            raise RuntimeFailure("the process that holds the namespaces is gone", hint="dutchman down, dutchman up")
        return f"/proc/{pid}/ns/net"

    def proc(self, name: str) -> str:
        """A file of /proc/net there."""
        return f"{self.namespace().removesuffix('ns/net')}net/{name}"

    def used(self) -> bool:
        """Whether anybody, of any store of this user, has an interface there besides loopback and the way out."""
        try:
            lines = Path(self.proc("dev")).read_text().splitlines()[2:]
        except (OSError, RuntimeFailure):
            return False
        return any(line.split(":")[0].strip() not in ("lo", "tap0") for line in lines)

    def prefix(self) -> list[str]:
        """What to put before a command that is to run in that network, with names resolved there."""
        # /etc/resolv.conf of the host may name a resolver on the host's loopback; a mount namespace of its own hides it
        resolv = self._directory / "resolv.conf"
        if not resolv.exists():
            host.write_atomic(resolv, f"nameserver {RESOLVER}\n".encode())
        # copies of containers' mounts would keep their disks in use for as long as the resolver lives: those of this
        # store are taken down, those of others, which this user may not touch, go when they are unmounted there
        script = 'umount -a -l -t overlay,fuse.ext4 2> /dev/null; mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return [
            rootless.tool("nsenter") or "nsenter",
            f"--net={self.namespace()}",
            "unshare",
            "--mount",
            "--propagation=slave",
            "sh",
            "-c",
            script,
            str(resolv),
        ]

    # --- the process --------------------------------------------------------------------------------------------

    def _running(self) -> tuple[int, int] | None:
        """(pid, start time) of the live one."""
        try:
            known = json.loads(self._pid.read_bytes())
            pid, started = int(known["pid"]), int(known["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (pid, started) if start_time(pid) == started else None

    def ensure(self) -> None:
        """Have it run. Unsupported when it cannot, RuntimeFailure with its words when it does not come up."""
        with self._lock:
            if self._running() is not None:
                return
            if why := self.missing():
                raise Unsupported(f"networks: {why}", hint=f"apt-get install {PACKAGE}; see `dutchman doctor`")
            self._socket.unlink(missing_ok=True)
            self._shield()
            said, say = os.pipe()
            argv = [rootless.tool("slirp4netns") or "slirp4netns", "--configure", f"--mtu={MTU}"]
            argv += ["--ready-fd", str(say), "--api-socket", self._socket.name]
            argv += ["--netns-type=path", self.namespace(), "tap0"]
            with open(self._directory / "slirp.log", "wb") as words:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    cwd=self._directory,  # the address of a socket is short
                    pass_fds=[say],
                    start_new_session=True,
                )
            os.close(say)
            with os.fdopen(said, "rb", buffering=0) as pipe:
                ready = bool(select.select([pipe], [], [], READY)[0]) and pipe.read(1) == b"1"
            if not ready:
                process.kill()
                process.wait()
                text = (self._directory / "slirp.log").read_text(errors="replace").strip()
                raise RuntimeFailure(f"slirp4netns: {' '.join(text.split())[-500:] or 'it does not come up'}")
            threading.Thread(target=process.wait, name="slirp", daemon=True).start()  # no zombie when it ends
            known = {"pid": process.pid, "started": start_time(process.pid) or 0}
            host.write_atomic(self._pid, json.dumps(known).encode(), 0o600)

    def _shield(self) -> None:
        """Keep the host's loopback from whoever begins to talk to it from inside; answers may go there.

        To slirp4netns every address of its network but two is the host's loopback. It has an option against that, which
        takes the answers, too: a datagram sent from the host itself to a published port would never get one. These
        rules are in place before there is a way out.
        """
        inside = ["-d", ADDRESS, "-j", "ACCEPT"]
        names = ["-d", RESOLVER, "-j", "ACCEPT"]
        others = ["-d", NETWORK, "-m", "conntrack", "!", "--ctstate", "ESTABLISHED", "-j", "DROP"]
        for chain in ("PREROUTING", "OUTPUT"):
            for rule in (inside, names, others):
                command = [*self.prefix(), find("iptables") or "iptables", "-w", "-t", "mangle"]
                try:
                    if run_helper([*command, "-C", chain, *rule], b"", READY, MAX_ANSWER)[0] == 0:
                        continue
                    code, _, said = run_helper([*command, "-A", chain, *rule], b"", READY, MAX_ANSWER)
                except (OSError, OverflowError) as error:  # of the first TimeoutError is one
                    raise RuntimeFailure(f"the host's loopback cannot be kept from containers: {error}") from error
                if code:
                    words = " ".join(said.decode(errors="replace").split())[:300]
                    raise RuntimeFailure(f"the host's loopback cannot be kept from containers: iptables: {words}")

    def stop(self) -> None:
        """End it. Idempotent."""
        with self._lock:
            stop(self._directory)

    # --- ports --------------------------------------------------------------------------------------------------

    def forward(self, wanted: Iterable[Forward]) -> None:
        """Lead ports of the host inside, all or none. Busy names the one that is taken or not allowed."""
        done: list[Forward] = []
        try:
            for item in wanted:
                arguments = {
                    "proto": item.protocol,
                    "host_addr": item.address or "0.0.0.0",
                    "host_port": item.port,
                    "guest_addr": ADDRESS,
                    "guest_port": item.port,
                }
                answer = self._ask("add_hostfwd", arguments)
                if "error" in answer:
                    first = rootless.first_port()
                    hint = f"ports below {first} need root or a sysctl" if item.port < first else "another one?"
                    raise Busy(f"ports: port {item.port}/{item.protocol} of the host cannot be had", hint=hint)
                done.append(item)
        except BaseException:
            self.unforward(done)
            raise

    def unforward(self, gone: Iterable[Forward]) -> None:
        """Take back what `forward` did; what is gone already is no error."""
        doomed = {(item.protocol, item.address or "0.0.0.0", item.port) for item in gone}
        if not doomed or self._running() is None:
            return
        answer = self._ask("list_hostfwd")
        if "entries" not in answer:
            raise RuntimeFailure(f"slirp4netns: {json.dumps(answer)[:200]}")
        for entry in answer["entries"]:
            if (entry["proto"], entry["host_addr"], entry["host_port"]) in doomed:
                self._ask("remove_hostfwd", {"id": entry["id"]})

    def _ask(self, verb: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        order = {"execute": verb} | ({"arguments": arguments} if arguments else {})
        try:
            with socket.socket(socket.AF_UNIX) as asking, socket_address(self._socket) as address:
                asking.settimeout(SECONDS)
                asking.connect(address)
                asking.sendall(json.dumps(order).encode())
                asking.shutdown(socket.SHUT_WR)
                data = b""
                while len(data) < MAX_ANSWER and (piece := asking.recv(65536)):
                    data += piece
            answer: dict[str, Any] = json.loads(data)
        except (OSError, ValueError) as error:
            raise RuntimeFailure(f"slirp4netns does not answer: {error}") from error
        return answer


def stop(directory: Path) -> None:
    """End the slirp4netns of a runtime directory. Idempotent."""
    try:
        known = json.loads((directory / "slirp").read_bytes())
        pid, started = int(known["pid"]), int(known["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    process = open_process(pid, started)
    if process is not None:
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            if not ended(process, SECONDS):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)
    for name in ("slirp", "slirp.sock"):
        (directory / name).unlink(missing_ok=True)
