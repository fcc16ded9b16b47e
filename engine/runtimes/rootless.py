"""An engine without root: the user namespace it lives in, and what must be done outside of it. Floor 2.

Only here: newuidmap and newgidmap, setns(2). One process per user, the *holder*, keeps a user namespace
and a mount namespace alive (`<runtime dir>/holder` has its pid and start time), so that the root filesystems of
containers stay mounted when a daemon is killed, and the next one enters the same namespaces. It is a `sleep` that
ignores SIGTERM; it is ended when nothing else is left in its namespace.

Inside, the user is root over what is theirs: overlays can be mounted, files of every subordinate id be read. The mount
of the engine itself is made outside, where the user's shells are: by fusermount.py.

Nothing here is thread-safe: it is called by short-lived programs with one thread. A lock file keeps them apart.
Source: user_namespaces(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine import host, hostmounts, userids
from engine.errors import AccessDenied, EngineError, RuntimeFailure, Unsupported
from engine.runtimes.pids import ended, open_process, start_time

USER_NAMESPACES = "user namespaces"
ENOUGH = 65536  # subordinate ids: images use ids up to 65534
HELPERS = ("slirp4netns", "aardvark-dns", "fuse2fs")  # serve containers, and end when there are none
SECONDS = 10.0  # for one small program
PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Lack:
    """Why there can be no engine with containers for this user, and what to do about it."""

    name: str
    reason: str
    advice: str


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=PATH)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def subordinate(table: Path, uid: int, name: str) -> list[tuple[int, int]]:
    """(first, count) of the ids `table` (/etc/subuid, /etc/subgid) gives a user, named by login or number."""
    try:
        lines = table.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = [line.split(":") for line in lines if not line.startswith("#")]
    return [
        (int(row[1]), int(row[2]))
        for row in rows
        if len(row) == 3 and row[0] in (name, str(uid)) and row[1].isdigit() and row[2].isdigit() and int(row[2])
    ]


def _login() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def lacks() -> list[Lack]:
    """What is missing for this ordinary user; nothing when a namespace with subordinate ids can be made."""
    out: list[Lack] = []
    login = _login()
    if not login:
        out.append(Lack("login", f"uid {os.getuid()} has no name", "newuidmap needs an entry in /etc/passwd"))
    for program in ("newuidmap", "newgidmap"):
        if tool(program) is None:
            out.append(Lack(program, f"{program} is not installed", "apt-get install uidmap"))
    for table in ("/etc/subuid", "/etc/subgid"):
        found = sum(count for _, count in subordinate(Path(table), os.getuid(), login))
        if found < ENOUGH:
            option = "uids" if table.endswith("uid") else "gids"
            what = f"only {found} ids" if found else "no ids"
            advice = f"as root: usermod --add-sub{option} 100000-165535 {login or 'NAME'} (a range nobody else has)"
            out.append(Lack(table, f"{table} has {what} for {login or os.getuid()}", advice))
    if (reason := forbidden()) is not None:
        out.append(reason)
    return out


def alone(missing: Sequence[Lack]) -> bool:
    """Whether, of what `lacks` said, nothing but subordinate ids is in the way: a namespace with the user's own id can
    be made, in which virtual machines run, whose ids are no business of the host."""
    return bool(missing) and all(lack.name != USER_NAMESPACES for lack in missing)


def count() -> int:
    """How many subordinate user ids this user has."""
    return sum(number for _, number in subordinate(Path("/etc/subuid"), os.getuid(), _login()))


def first_port() -> int:
    """The first port an ordinary user may listen on."""
    text = _read("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(text) if text.isdigit() else 1024


def forbidden() -> Lack | None:
    """Whether the kernel or its security modules keep ordinary users from making user namespaces. Tries it."""
    child = os.fork()
    if child == 0:
        try:
            hostmounts.unshare(hostmounts.CLONE_NEWUSER)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and _read(_APPARMOR) != "1":
        return None
    for knob, off, wanted in (
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=16384"),
        (_APPARMOR, "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    ):
        if _read(knob) == off:
            return Lack(
                USER_NAMESPACES,
                f"ordinary users may not make user namespaces ({knob} is {off})",
                f"as root: sysctl {wanted}",
            )
    return Lack(
        USER_NAMESPACES, "they cannot be made here", "a container or a security module forbids it: ask who runs it"
    )


_APPARMOR = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"


def possible() -> bool:
    """Whether this process is an ordinary user's that can have an engine with containers."""
    return host.LINUX and not host.is_root() and not lacks()


# --- the runtime directory ------------------------------------------------------------------------------------------


def private_directory(path: Path) -> Path:
    """`path`, made if need be: a directory of this user's that nobody else may enter. AccessDenied when it is not."""
    path.mkdir(mode=0o700, exist_ok=True, parents=True)
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise AccessDenied(
            f"{path} is not a directory of yours alone",
            hint="somebody made it first: remove it, or set XDG_RUNTIME_DIR to a directory of your own",
        )
    return path


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(private_directory(directory) / "holder.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- the holder -----------------------------------------------------------------------------------------------------


def holder(directory: Path) -> int | None:
    """The pid of the live holder, None when there is none."""
    try:
        known = json.loads((directory / "holder").read_bytes())
        pid, started = int(known["pid"]), int(known["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if start_time(pid) == started else None


def _make(directory: Path) -> int:
    """Start a holder. Unsupported when the kernel or newuidmap refuse."""
    said, say = os.pipe()
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(said)
            os.close(tell)
            _hold(say, hear)
        except OSError as error:
            os.write(say, f"{error.strerror}".encode())
        finally:
            os._exit(127)
    os.close(say)
    os.close(hear)
    try:
        answer = os.read(said, 4096)
        if answer != b"unshared":
            raise Unsupported(f"no user namespace: {answer.decode(errors='replace')}", hint="see `dutchman doctor`")
        if alone(lacks()):
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"0 {os.getuid()} 1"),
                ("gid_map", f"0 {os.getgid()} 1"),
            ):
                Path(f"/proc/{child}/{name}").write_text(text)
        else:
            for program, table, own in (
                ("newuidmap", "/etc/subuid", os.getuid()),
                ("newgidmap", "/etc/subgid", os.getgid()),
            ):
                _map(program, child, own, subordinate(Path(table), os.getuid(), _login()))
        os.write(tell, b"mapped")
        answer = os.read(said, 4096)
        if answer:  # the pipe closes with exec
            raise Unsupported(f"no mount namespace: {answer.decode(errors='replace')}")
        started = start_time(child)
        if started is None:
            raise RuntimeFailure("the process that holds the namespaces ended at once")
        host.write_atomic(directory / "holder", json.dumps({"pid": child, "started": started}).encode(), 0o600)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(said)
        os.close(tell)
    return child


def _map(program: str, pid: int, own: int, ranges: list[tuple[int, int]]) -> None:
    """newuidmap or newgidmap: 0 is the user, what follows are the subordinate ids in the order of their table."""
    words = [tool(program) or program, str(pid), "0", str(own), "1"]
    inside = 1
    for first, count in ranges:
        words += [str(inside), str(first), str(count)]
        inside += count
    done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise Unsupported(f"{program}: {text}", hint="see `dutchman doctor`")


def _hold(say: int, hear: int) -> None:
    """In the child: make the namespaces, become their root, and sleep for good."""
    kinds = hostmounts.CLONE_NEWUSER | hostmounts.CLONE_NEWNS | hostmounts.CLONE_NEWNET
    hostmounts.unshare(kinds)  # bridges are made in the last; only it is in it
    os.write(say, b"unshared")
    if os.read(hear, 16) != b"mapped":
        os._exit(1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    hostmounts.keep_to_itself()
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.set_inheritable(say, False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(3, say)
    os.closerange(say + 1, 1 << 16)
    os.execv(tool("sleep") or "/bin/sleep", ["dutchman-holder", "infinity"])


def _enter(pid: int) -> None:
    """Become root in the namespaces of `pid`. Supplementary groups stay: they may give access to what is bound."""
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("user", "mnt")]
    for fd, kind in zip(spaces, (hostmounts.CLONE_NEWUSER, hostmounts.CLONE_NEWNS), strict=True):
        hostmounts.enter(fd, kind)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def spawn(
    directory: Path, argv: Sequence[str], environ: Mapping[str, str], keep: Sequence[int] = (), cwd: str = "/"
) -> int:
    """Start a program as root of this user's namespaces, which are made if need be: its pid, as a child.

    Descriptors `keep` (and 0, 1, 2) stay open in it. Unsupported, AccessDenied, RuntimeFailure say why it cannot be.
    """
    with _locked(directory):
        pid = holder(directory) or _make(directory)
        said, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _enter(pid)
                os.chdir(cwd)
                for fd in keep:
                    os.set_inheritable(fd, True)
                os.execvpe(argv[0], list(argv), dict(environ))
            except OSError as error:
                os.write(say, f"{error.strerror}: {error.filename or argv[0]}".encode())
            finally:
                os._exit(127)
        os.close(say)
        with os.fdopen(said, "rb") as pipe:
            fault = pipe.read(4096).decode(errors="replace")
    if fault:
        os.waitpid(child, 0)
        raise RuntimeFailure(f"cannot enter the namespace of pid {pid}: {fault}")
    return child


def release(directory: Path) -> bool:
    """End the holder when nothing else lives in its namespace; whether it is gone."""
    with _locked(directory):
        pid = holder(directory)
        if pid is None:
            return True
        for _ in range(20):  # what has been told to end may take a moment
            if all(name in HELPERS for _, name in _others(pid)):
                break
            time.sleep(0.025)
        else:
            return False
        for one in [*(helper for helper, _ in _others(pid)), pid]:
            _end(one)
        for name in ("holder", "slirp", "slirp.sock"):
            (directory / name).unlink(missing_ok=True)
    return True


def _end(pid: int) -> None:
    process = open_process(pid, start_time(pid) or 0)
    if process is None:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        ended(process, SECONDS)
        os.waitpid(pid, os.WNOHANG)
    except (ProcessLookupError, ChildProcessError):
        pass  # it ended by itself; another program's child
    finally:
        os.close(process)


def _others(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, name) of every other process that lives in the user namespace of `pid`."""
    ours = os.stat(f"/proc/{pid}/ns/user").st_ino
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == pid:
            continue
        try:
            if os.stat(f"/proc/{name}/ns/user").st_ino == ours and start_time(int(name)) is not None:
                yield int(name), Path(f"/proc/{name}/comm").read_text().strip()
        except OSError:
            continue  # gone meanwhile, or of another user


_PROBE = """
import json, os, sys
from pathlib import Path
from engine.runtimes.oci import OciRuntime
found = OciRuntime(Path(sys.argv[1]) / "none").probe()
os.write(int(sys.argv[2]), json.dumps([found.ok, found.reason]).encode())
"""


def probe_inside(directory: Path) -> tuple[bool, str]:
    """Whether containers can be run in this user's namespace, asked there; and why (not)."""
    said, say = os.pipe()
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environ = os.environ | {userids.VARIABLE: f"{os.getuid()}:{os.getgid()}", "PYTHONPATH": path}
    try:
        argv = [sys.executable, "-c", _PROBE, str(directory), str(say)]
        child = spawn(directory, argv, environ, [say])
    except (EngineError, OSError) as error:
        os.close(said)
        return False, str(error)
    finally:
        os.close(say)
    with os.fdopen(said, "rb") as pipe:
        answer = pipe.read(64 << 10)
    code = wait(child)
    release(directory)
    if not answer:
        return False, f"the probe ended with code {code}"
    ok, reason = json.loads(answer)
    return bool(ok), str(reason)


def wait(pid: int) -> int:
    """The exit code of a child; 128 + signal when it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code
