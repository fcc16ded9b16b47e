"""netavark and aardvark-dns: bridges, addresses, firewall rules and names, set up by Podman's programs. Floor 2.

Only here: where the programs are, the JSON they are given, and what they leave behind after the last container. Source
of the format: netavark's src/network/types.rs (1.4). netavark finds nothing out by itself and remembers nothing: what
it is given to set up, it must be given again to take down. aardvark-dns runs while a network has containers, with the
files of `state`, and outlives the daemon. Calls are made one at a time: netavark does not expect company, so what a
killed daemon had asked of it is awaited before the first.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import host
from engine.errors import DeadlineExceeded, RuntimeFailure, Unsupported
from engine.programs import run_helper
from engine.runtimes.netbase import Wiring
from engine.runtimes.netns import inside, pin_address
from engine.runtimes.slirp import Uplink
from engine.userids import rootless

log = logging.getLogger(__name__)

PLACES = "/usr/libexec/podman:/usr/lib/podman:/usr/local/libexec/podman:/usr/local/lib/podman"  # where Podman looks
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
DEADLINE = 15.0  # seconds for one call
MAX_ANSWER = 1 << 20
RESOLVER_PATIENCE = 1.0  # seconds for the resolver to listen at a new gateway; normally some ms
BASE_CHAINS = {  # what netavark makes once and never removes (src/firewall/varktables)
    "nat": {
        "NETAVARK-HOSTPORT-DNAT": ("PREROUTING", "OUTPUT"),
        "NETAVARK-HOSTPORT-MASQ": ("POSTROUTING",),
        "NETAVARK-HOSTPORT-SETMARK": (),
    },
    "filter": {"NETAVARK_FORWARD": ("FORWARD",), "NETAVARK_ISOLATION_1": (), "NETAVARK_ISOLATION_2": ()},
}


def find(name: str, places: str = f"{PLACES}:{SBIN}") -> str | None:
    return shutil.which(name, path=f"{places}:{os.environ.get('PATH', '')}")


class Netavark:
    """Networks of the containers of one store; `state` is a directory of its own that does not survive a boot."""

    def __init__(self, state: Path, uplink: Uplink | None = None) -> None:
        """`uplink`: without root, the network everything is made in; otherwise it is the host's."""
        self._state = state
        self._uplink = uplink
        self._lock = threading.Lock()  # one call at a time
        self._alone = False  # no call of an earlier daemon is under way any more
        self._program, self._resolver = find("netavark"), find("aardvark-dns")
        self._iptables = find("iptables", SBIN)

    def missing(self) -> str:
        """Why networks cannot be made here; empty when they can. Runs nothing."""
        if not host.LINUX:
            return "networks need a Linux host"
        if self._uplink is None and (not host.is_root() or rootless() is not None):
            return "networks need root"
        if self._uplink is not None and (why := self._uplink.missing()):
            return why
        if self._program is None:
            return "netavark is not installed"
        if self._iptables is None:
            return "iptables is not installed"
        return ""

    inside = False

    @property
    def summary(self) -> str:
        return "netavark" if self.resolves else "netavark, without names: aardvark-dns is not installed"

    @property
    def resolves(self) -> bool:
        """Whether containers find each other by name."""
        return self._resolver is not None

    # --- setting up and taking down -----------------------------------------------------------------------------

    def setup(self, wiring: Wiring) -> None:
        """Connect the namespace. RuntimeFailure with netavark's words; what it had begun must be torn down."""
        with self._lock:
            self._forget_dead_resolver()
            answer = self._call("setup", wiring.netns, self._options(wiring))
            self._pin([link.bridge for link in wiring.links])
            if self._resolver is not None:
                gateways = [gateway for link in wiring.links for _, gateway in link.subnets]
                self._await_resolver([gateway for gateway in gateways if ":" not in gateway])
        log.debug("network of %s: %s", wiring.id, answer)

    def _pin(self, bridges: Sequence[str]) -> None:
        """Releases before 1.9 leave a bridge the changing address of its ports."""

        def work() -> None:
            for bridge in bridges:
                pin_address(bridge)

        try:
            work() if self._uplink is None else inside(Path(self._uplink.namespace()), work)
        except OSError as error:
            raise RuntimeFailure(f"the bridge's address cannot be kept: {error}") from error

    def teardown(self, wiring: Wiring, *, stays: bool = False) -> None:
        """Take down what `setup` was given. RuntimeFailure lists what was not there; everything else is gone then."""
        with self._lock:
            self._forget_dead_resolver()
            self._call("teardown", wiring.netns, self._options(wiring))

    def _options(self, wiring: Wiring) -> dict[str, Any]:
        mappings = [
            {
                "container_port": port.container,
                "host_ip": port.host_ip,
                "host_port": port.host,
                "protocol": port.protocol,
                "range": port.count,
            }
            for port in wiring.ports
        ]
        networks, info = {}, {}
        for link in wiring.links:
            networks[link.network] = {
                "interface_name": link.interface,
                "static_ips": list(link.addresses),
                "aliases": list(link.aliases),
                "static_mac": link.mac or _mac_of(link.addresses[0]),
            }
            info[link.network] = {
                "name": link.network,
                "id": link.network,
                "driver": "bridge",
                "network_interface": link.bridge,
                "subnets": [{"subnet": subnet, "gateway": gateway} for subnet, gateway in link.subnets],
                "ipv6_enabled": len(link.subnets) > 1,
                "internal": link.internal,
                "dns_enabled": self.resolves,
                "ipam_options": {"driver": "host-local"},
                # of several default routes that of the first interface counts
                "options": {} if link.internal else {"metric": str(100 + int(link.interface.removeprefix("eth")))},
            }
        out: dict[str, Any] = {"container_id": wiring.id, "container_name": wiring.name}
        out |= {"networks": networks, "network_info": info}
        return {**out, "port_mappings": mappings, "dns_servers": list(wiring.dns)}

    def _call(self, verb: str, netns: Path, options: Mapping[str, Any]) -> str:
        if why := self.missing():
            raise Unsupported(why, hint="apt-get install netavark aardvark-dns iptables")
        assert self._program is not None
        self._await_orphans()
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        argv = [*self._prefix(), self._program, "--config", str(self._state)]
        argv += ["--aardvark-binary", self._resolver or "/nonexistent/aardvark-dns", verb, str(netns)]
        environ = {
            "PATH": f"{SBIN}:{os.environ.get('PATH', '')}",
            "NETAVARK_FW": "iptables",  # what releases since 1.9 would otherwise choose by themselves
            "RUST_LOG": "error",
        }
        try:
            code, out, said = run_helper(argv, json.dumps(options).encode(), DEADLINE, MAX_ANSWER, environ)
        except TimeoutError as error:
            raise DeadlineExceeded(f"netavark {verb}: {error}") from error
        except (OSError, OverflowError) as error:
            raise RuntimeFailure(f"netavark {verb}: {error}") from error
        if code:
            words = _words(out, said) or f"exit status {code}"
            raise RuntimeFailure(f"netavark {verb}: {words}", hint="without networks: echo none > config/networks")
        return out.decode(errors="replace")

    def _await_orphans(self) -> None:
        """Once: until no netavark of this store runs that a daemon had started which was killed."""
        deadline = time.monotonic() + DEADLINE
        while not self._alone:
            self._alone = not any(os.fsencode(self._state) in words for words in _command_lines())
            if not self._alone:
                if time.monotonic() >= deadline:
                    log.warning("a netavark that an earlier daemon had started does not end")
                    return
                time.sleep(0.01)

    def _prefix(self) -> list[str]:
        return [] if self._uplink is None else self._uplink.prefix()

    # --- the resolver -------------------------------------------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self._state / "aardvark-dns" / "aardvark.pid"

    def resolver_pid(self) -> int | None:
        """Of the running aardvark-dns of this store."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a process that only waits to be reaped
        except (OSError, ValueError):
            return None
        return pid if str(self._state).encode() in command else None

    def _forget_dead_resolver(self) -> None:
        """netavark believes its pid file, and would send a signal to whoever has that pid now."""
        if self._pid_file.exists() and self.resolver_pid() is None:
            self._pid_file.unlink(missing_ok=True)

    def _await_resolver(self, gateways: Sequence[str]) -> None:
        """Until it listens at each gateway: the container's first query would be refused otherwise."""
        wanted = {f"{int.from_bytes(bytes(map(int, item.split('.'))), 'little'):08X}:0035" for item in gateways}
        deadline = time.monotonic() + RESOLVER_PATIENCE
        table = "/proc/self/net/udp" if self._uplink is None else self._uplink.proc("udp")
        while wanted:
            wanted -= {line.split()[1] for line in Path(table).read_text().splitlines()[1:]}
            if wanted and time.monotonic() >= deadline:
                log.warning("aardvark-dns does not listen at %s", ", ".join(gateways))
                return
            if wanted:
                time.sleep(0.002)

    # --- after the last container -------------------------------------------------------------------------------

    def clear(self, idle: Callable[[], bool]) -> None:
        """If nobody of this store is connected (`idle`; no setup can come between): end its resolver, and remove
        netavark's own chains unless somebody else (Podman) has rules in them. They come back with the next `setup`."""
        with self._lock:
            if not idle():
                return
            pid = self.resolver_pid()
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
            host.remove_tree(self._state)
            for program in ("iptables", "ip6tables"):
                found = find(f"{program}-save", SBIN)
                if found is not None:
                    self._clear_chains(program, found)

    def _clear_chains(self, program: str, save: str) -> None:
        code, out, said = run_helper([*self._prefix(), save], b"", DEADLINE, 16 << 20)
        if code:
            raise RuntimeFailure(f"{program}-save: {_words(b'', said)}")
        lines = out.decode(errors="replace").splitlines()
        if any(line.startswith(("-A NETAVARK-DN-", ":NETAVARK-DN-")) or _foreign(line) for line in lines):
            return
        table, commands = "", []
        for line in lines:
            if line.startswith("*"):
                table = line[1:]
                own = BASE_CHAINS.get(table, {})
                there = [name for name in own if any(item.startswith(f":{name} ") for item in lines)]
                if there:
                    commands += [f"*{table}", *(f"-F {name}" for name in there)]
            elif there_rule := _jump(line, BASE_CHAINS.get(table, {})):
                commands.append(there_rule)
            elif line == "COMMIT" and commands and commands[-1] != "COMMIT":
                commands += [f"-X {name}" for name in BASE_CHAINS.get(table, {}) if f":{name} " in out.decode()]
                commands.append("COMMIT")
        if not commands:
            return
        restore = save.removesuffix("-save") + "-restore"
        code, _, said = run_helper(
            [*self._prefix(), restore, "--noflush", "--wait", "5"],
            ("\n".join(commands) + "\n").encode(),
            DEADLINE,
            MAX_ANSWER,
        )
        if code:
            raise RuntimeFailure(f"{program}-restore: {_words(b'', said)}")


def _mac_of(address: str) -> str:
    """A hardware address for an IPv4 address, as Docker has it: whoever gets the address next has that one, too, so
    what others know of the one before is still true."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *map(int, address.split("."))))


def _foreign(line: str) -> bool:
    """A network's own chain, or a rule for one in netavark's chain: somebody is connected."""
    chain = line.split(" ")[0][1:] if line.startswith(":") else ""
    if chain.startswith("NETAVARK") and not any(chain in names for names in BASE_CHAINS.values()):
        return True
    return line.startswith(("-A NETAVARK_FORWARD -d", "-A NETAVARK_FORWARD -s", "-A NETAVARK-HOSTPORT-DNAT"))


def _jump(line: str, chains: Mapping[str, Sequence[str]]) -> str:
    """The command that deletes this rule when it leads into one of `chains`, else ''."""
    words = line.split(" ")
    if words[0] != "-A" or words[-2:-1] != ["-j"] or words[1] in chains:
        return ""
    return f"-D {line[3:]}" if words[-1] in chains else ""


def _command_lines() -> Iterator[list[bytes]]:
    """Of every process there is."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                yield Path(entry.path, "cmdline").read_bytes().split(b"\0")


def _words(out: bytes, said: bytes) -> str:
    """netavark's error: JSON on stdout, else what it wrote to stderr."""
    try:
        text = str(json.loads(out)["error"])
    except (ValueError, KeyError, TypeError):
        text = said.decode(errors="replace")
    return " ".join(text.split())[:500]
