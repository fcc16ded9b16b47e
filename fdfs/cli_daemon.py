"""`dutchman up down status doctor`: the daemon behind the mount.

Floor 7. Only here: starting the daemon and waiting until it serves, finding who holds a store, taking down what a
killed daemon left. One thread; nothing here touches a mount before knowing that it is alive.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from fdfs.cli_mount import Failure, Mount, absolute, default_mount, default_store
from fdfs.cli_options import mount_option, store_option

START_SECONDS = 60.0  # opening a large store after a crash includes its checks
STOP_SECONDS = 30.0
HALT_SECONDS = 15.0  # for containers to stop: their usual grace period and a little more


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a store: the daemon's pid and its mount, as its lock file says."""

    pid: int
    mount: Path | None


def holder(store: Path) -> Holder | None:
    """Who holds the store now; None when nobody does. The lock goes with its process, whatever the file still says."""
    try:
        with open(store / "lock", encoding="utf-8", errors="replace") as lock:
            text = lock.read(4096).strip()
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = re.search(r"\d+", text)
                mount = re.search(r"/.*", text)
                return Holder(int(pid[0]) if pid else 0, Path(mount[0]) if mount else None)
    except FileNotFoundError:
        pass
    return None


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _alive(mount: Path) -> bool:
    """Whether something answers at a mount point. A separate process asks: a hung server would hang the asker."""
    probe = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import os, sys; os.stat(sys.argv[1])", str(mount)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return probe.wait(timeout=5) == 0
    except subprocess.TimeoutExpired:
        probe.kill()
        return False


def recover(mount: Path) -> bool:
    """Take down what a killed daemon left at `mount`; whether there was something. Failure if it is alive."""
    from engine import hostmounts

    if not hostmounts.is_mounted(mount):
        return False
    if _alive(mount):
        kind = next(kind for point, kind, _ in reversed(hostmounts.mounts()) if point == str(mount))
        raise Failure(
            f"something else is mounted at {mount} ({kind})",
            "hint: choose another place with --mount, or unmount it",
        )
    for _ in range(100):  # several may lie on one another; what is bound below goes with each
        _detach(mount)
        if not hostmounts.is_mounted(mount):
            break
    return True


def _detach(mount: Path) -> None:
    from engine import host, hostmounts

    if host.is_root():
        return hostmounts.unmount(mount)
    from engine.errors import EngineError
    from engine.runtimes.fusermount import unmount_fuse

    try:
        unmount_fuse(mount)
    except EngineError as error:
        raise Failure(error.reason, *([f"hint: {error.hint}"] if error.hint else [])) from None


def _log_tail(log: Path, offset: int) -> list[str]:
    try:
        with open(log, "rb") as handle:
            handle.seek(offset)
            return handle.read(64 << 10).decode(errors="replace").splitlines()[-5:]
    except FileNotFoundError:
        return []


@click.command("up")
@mount_option
@store_option
@click.option("--runtime", type=click.Choice(["auto", "oci", "vm", "fake"]), default="auto", show_default=True)
@click.option("--foreground", is_flag=True, help="Stay, and serve until Ctrl-C.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as modes and owners of the files allow.")
def up_command(mount: str | None, store: str | None, runtime: str, foreground: bool, allow_other: bool) -> None:
    """Start the engine and mount it. Containers that run already are taken up again."""
    where = absolute(mount) if mount else absolute(default_mount())
    place = absolute(store) if store else absolute(default_store())
    if allow_other:
        _others_allowed()
    held = holder(place)
    if held is not None:
        if held.mount == where or held.mount is None:
            _wait(lambda: (where / "version").exists() or holder(place) is None, 10)
            click.echo(f"already up at {held.mount or where} (pid {held.pid})")
            return
        raise Failure(
            f"the store {place} is held by pid {held.pid}, mounted at {held.mount}",
            "hint: use it there, or end it: dutchman down" + (f" --store {store}" if store else ""),
        )
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if recover(where):
            click.echo(f"took down what a killed daemon left at {where}", err=True)
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}") from None
    command = [sys.executable, "-m", _program(runtime)]
    command += ["--store", str(place), "--mount", str(where), "--runtime", runtime]
    if allow_other:
        command.append("--allow-other")
    if foreground:
        os.execv(command[0], command)
    _spawn(command, place / "engine.log", where)
    click.echo(f"up at {where}")


def _program(runtime: str) -> str:
    """What serves: the daemon, or for an ordinary user who can have containers, what puts it into a namespace."""
    from engine import host

    if runtime == "fake" or host.is_root() or not host.LINUX:
        return "fdfs.daemon"
    from engine.runtimes import rootless

    missing = rootless.lacks()
    alone = rootless.alone(missing)
    what = "only containers of runtime vm" if alone else "no containers"
    for lack in missing:
        click.echo(f"dutchman: {what}: {lack.reason}", err=True)
        click.echo(f"hint: {lack.advice}", err=True)
    return "fdfs.daemon" if missing and not alone else "fdfs.rootless"


def _others_allowed() -> None:
    """Failure where an ordinary user may not let others in: fusermount reads /etc/fuse.conf."""
    from engine import host

    if host.is_root() or not host.LINUX:
        return
    try:
        lines = Path("/etc/fuse.conf").read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    if "user_allow_other" not in (line.strip() for line in lines):
        raise Failure(
            "--allow-other: /etc/fuse.conf does not have the line user_allow_other",
            "hint: as root: echo user_allow_other >> /etc/fuse.conf",
        )


def _spawn(command: list[str], log: Path, where: Path) -> None:
    """Start the daemon and wait for its word on the ready pipe; Failure with what it said when it does not come up."""
    reading, writing = os.pipe()
    with open(log, "ab") as output:
        offset = output.tell()
        daemon = subprocess.Popen(
            [*command, "--ready-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(writing,),
            start_new_session=True,
            cwd="/",
        )
    os.close(writing)
    said = b""
    deadline = time.monotonic() + START_SECONDS
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                continue
            chunk = pipe.read(4096)
            said += chunk
            if not chunk or said.startswith(b"ready"):
                break
        else:
            daemon.terminate()
            raise Failure(f"the daemon did not come up within {START_SECONDS:.0f} s", f"see {log}")
    if said.startswith(b"ready"):
        return
    try:
        code = daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.terminate()
        code = -signal.SIGTERM
    lines = said.decode(errors="replace").strip().splitlines() or _log_tail(log, offset)
    if lines:
        raise Failure(lines[0] if said else lines[-1], *lines[1:] if said else (f"see {log}",))
    raise Failure(f"the daemon ended with code {code} at {where}", f"see {log}", "hint: dutchman doctor")


@click.command("down")
@mount_option
@store_option
@click.option("--stop-containers/--keep-containers", default=False, help="Stop what runs first (default: keep it).")
def down_command(mount: str | None, store: str | None, stop_containers: bool) -> None:
    """Unmount and end the engine. Containers go on running, and the next `up` takes them up again."""
    from engine import hostmounts

    place, held = _daemon(mount, store)
    if held is None:
        where = absolute(mount) if mount else absolute(default_mount())
        if hostmounts.is_mounted(where) and not _alive(where):
            recover(where)
            click.echo(f"took down what a killed daemon left at {where}")
            return
        click.echo("not up")
        other = holder(place)
        if other is not None and other.mount is not None:
            click.echo(f"hint: the store {place} is mounted at {other.mount}", err=True)
        return
    where = held.mount or absolute(mount or default_mount())
    running: list[str] = []
    if hostmounts.is_mounted(where) and _alive(where):
        running = _running(Mount(where))
        if stop_containers and running:
            # `halt`, not `stop` to each: what a restart policy keeps up is up again after the next `up`
            Mount(where).command((), "halt", what="down")
            _wait(lambda: not _running(Mount(where)), HALT_SECONDS)
            running = _running(Mount(where))
    if not held.pid:
        raise Failure(f"{place / 'lock'} does not say which process holds the store")
    os.kill(held.pid, signal.SIGTERM)
    if not _wait(lambda: holder(place) is None, STOP_SECONDS):
        hint = f"hint: see {place / 'engine.log'}; as a last resort: kill -9 {held.pid}"
        raise Failure(f"pid {held.pid} does not end", hint)
    _wait(lambda: not hostmounts.is_mounted(where), 5)
    recover(where)
    click.echo(f"down: {where} is unmounted")
    if running:
        shown = ", ".join(running[:5]) + (", …" if len(running) > 5 else "")
        click.echo(f"{len(running)} still running: {shown}")
        click.echo("stop them with: dutchman up && dutchman down --stop-containers")


def _daemon(mount: str | None, store: str | None) -> tuple[Path, Holder | None]:
    """The store meant and who has it. A named store (--store) is asked for first, then a named mount (--mount,
    $DUTCHMAN_MOUNT), then the default store, then the default mount: `up` may have been given either one only."""
    place = absolute(store or default_store())
    held = holder(place)
    if store:
        return place, held
    named = mount or os.environ.get("DUTCHMAN_MOUNT")
    where = absolute(mount or default_mount())
    if held is not None and (not named or held.mount in (where, None)):
        return place, held
    behind = _store_behind(where)
    return (behind, holder(behind)) if behind is not None else (place, None)


def _store_behind(mount: Path) -> Path | None:
    """The store of the daemon that serves `mount`, as its status file says; None when there is none or it is gone."""
    if not _alive(mount):
        return None
    for line in Mount(mount).field("status").splitlines():
        key, _, value = line.partition(" ")
        if key == "store":
            return Path(value.strip())
    return None


def _running(mount: Mount) -> list[str]:
    return [
        container["name"]
        for container in mount.containers()
        if container["state"] in ("running", "starting", "paused", "stopping")
    ]


@click.command("status")
@mount_option
@store_option
@click.option("--runtime", hidden=True)
@click.option("--mount-point", is_flag=True, help="Only where it is mounted.")
def status_command(mount: str | None, store: str | None, runtime: str | None, mount_point: bool) -> int:
    """What the engine says of itself. Exit code 3 when it is not up."""
    place, held = _daemon(mount, store)
    if held is None and store:
        raise Failure(
            f"no daemon has the store {place}", f"hint: start the engine: dutchman up --store {store}", code=3
        )
    try:
        where = Mount.find(str(held.mount) if held and held.mount else mount)
    except Failure as failure:
        raise Failure(failure.reason, *failure.more, code=3) from None
    click.echo(str(where.root) if mount_point else where.read("status"))
    return 0


@click.command("unshare", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def unshare_command(command: tuple[str, ...]) -> int:
    """Run COMMAND as root of the namespace an engine without root lives in; files of its containers are yours there."""
    from engine import host
    from engine.errors import EngineError
    from engine.runtimes import rootless
    from fdfs.rootless import environment

    if host.is_root() or not host.LINUX:
        raise Failure("there is no such namespace: only an engine without root, on Linux, has one")
    try:
        child = rootless.spawn(host.runtime_dir(), command, environment(), cwd=os.getcwd())
    except (EngineError, OSError) as error:
        raise Failure(str(error), *([f"hint: {hint}"] if (hint := getattr(error, "hint", None)) else [])) from None
    code = rootless.wait(child)
    rootless.release(host.runtime_dir())
    return code


@click.command("doctor")
def doctor_command() -> int:
    """What this host can and cannot do, and what to install. Exit code 1 when something needed is missing."""
    from engine.doctor import examine

    missing = 0
    for check in examine():
        mark = "ok  " if check.ok else "MISS" if check.needed else "no  "
        click.echo(f"{mark}  {check.name:<16} {check.found}")
        if not check.ok and check.advice:
            click.echo(f"      {'':<16} -> {check.advice}")
        missing += check.needed and not check.ok
    click.echo("\neverything needed is here" if not missing else f"\n{missing} needed thing(s) missing")
    return 1 if missing else 0
