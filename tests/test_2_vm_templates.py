"""Templates: which machine starts from which, what is not believed, and machines really started from one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guestkernel import guest_kernels
from runtimebench import SLOW, Bench, bench_of

from engine.errors import Busy, Damaged, RuntimeFailure
from engine.runtimes import conmon
from engine.runtimes.pids import start_time
from engine.runtimes.vm import agentbuild, driver, standby, standbys, templatemaker, templates
from engine.runtimes.vm.driver import VmRuntime
from engine.runtimes.vm.standbys import Standbys
from engine.runtimes.vm.templatemaker import Makers
from engine.runtimes.vm.templates import Kept

MACHINE = {
    "arch": "x86_64", "accelerator": "tcg", "kernel": "/a/vmlinux", "initfs": "/a/i.cpio", "memory": 192, "cpus": 1,
    "acpi": True, "image": "/c/image.vmdk", "upper": "/c/upper.ext4", "qemu": "/usr/bin/qemu", "tsc_khz": 2_000_000,
}  # fmt: skip
ABOUT = {"kernel": ["sha256:1", "sha256:2"], "initfs": "initfs-1.cpio", "version": "QEMU 7"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_key_changes_with_all_that_a_snapshot_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(taps: int = 0, about: dict[str, Any] | None = None, **machine: Any) -> str:
        return str(templates.wanted(MACHINE | machine, taps, ABOUT | (about or {}))["key"])

    first = key()
    other = [key(1), key(2), key(memory=256), key(cpus=2), key(acpi=False), key(accelerator="kvm"), key(arch="aarch64")]
    other += [key(qemu=sys.executable), key(append="quiet"), key(about={"initfs": "initfs-2.cpio"})]
    other += [key(about={"kernel": ["sha256:3", "sha256:2"]}), key(about={"version": "QEMU 8"})]
    monkeypatch.setattr(templates, "host_facts", lambda: ["another CPU"])
    other.append(key())
    assert len({first, *other}) == 1 + len(other)
    monkeypatch.undo()
    # what may differ between machines of one template
    same = [key(image="/d/i", upper="/d/u"), key(kernel="/b/vmlinux", initfs="/b/i.cpio"), key(tsc_khz=1_999_999)]
    assert {first} == set(same)


def test_which_are_given_up(tmp_path: Path) -> None:
    def kept(name: str, age: int, size: int = 1, **facts: Any) -> Kept:
        known = {"host": templates.host_facts(), "qemu": templates.program(sys.executable)} | facts
        return Kept(name, tmp_path / name, size, -age, known)

    some = [kept(str(age), age) for age in range(5)]
    assert [item.key for item in templatemaker.given_up(some, most=3)] == ["3", "4"]
    assert [item.key for item in templatemaker.given_up(some, most_bytes=2)] == ["2", "3", "4"]
    large = [kept("large", 0, 100), kept("small", 1)]
    assert [item.key for item in templatemaker.given_up(large, most_bytes=50)] == ["small"]
    stale = [kept("host", 0, host=["another"]), kept("qemu", 1, qemu=[sys.executable, 1, 2]), kept("good", 2)]
    assert [item.key for item in templatemaker.given_up(stale)] == ["host", "qemu"]


# --- what is not believed ---------------------------------------------------------------------------------------------


@dataclass
class Forged:
    """A template of the right form, that no QEMU ever wrote."""

    directory: Path
    wish: dict[str, Any]

    @property
    def place(self) -> Path:
        return self.directory / str(self.wish["key"])

    def make(self) -> Forged:
        self.place.mkdir(parents=True, mode=0o700)
        about: dict[str, Any] = {"facts": self.wish["facts"], "hello": "00", "tsc_khz": 1}
        about |= {"memory": 192, "cpus": 2, "taps": 1}
        for name, data in (("ram", bytes(8192)), ("state", b"QEVM")):
            path = self.place / name
            path.write_bytes(data)
            path.chmod(0o600)
            about[name] = {"size": len(data), "mtime_ns": path.stat().st_mtime_ns}
        about["state"]["crc32"] = zlib.crc32(b"QEVM")
        self.write(about)
        return self

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.place / "template.json").read_bytes())
        return found

    def write(self, about: Any) -> None:
        path = self.place / "template.json"
        path.write_text(json.dumps(about))
        path.chmod(0o600)

    def found(self) -> bool:
        with templates.found(self.directory, self.wish) as template:
            return template is not None


@pytest.fixture
def forged(tmp_path: Path) -> Forged:
    return Forged(tmp_path / "templates", templates.wanted(MACHINE, 0, ABOUT)).make()


def rewrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(0, 0))


DAMAGE: dict[str, tuple[Callable[[Forged], Any], str]] = {
    "memory cut short": (lambda it: os.truncate(it.place / "ram", 4096), "ram was changed"),
    "memory written to": (lambda it: rewrite(it.place / "ram", b"x"), "ram was changed"),
    "no memory": (lambda it: (it.place / "ram").unlink(), "ram is missing"),
    "no state": (lambda it: (it.place / "state").unlink(), "state is missing"),
    "no description": (lambda it: (it.place / "template.json").unlink(), "template.json is missing"),
    "description cut short": (lambda it: os.truncate(it.place / "template.json", 40), "template.json is damaged"),
    "description of nothing": (lambda it: it.write([]), "template.json is damaged"),
    "made from something else": (lambda it: it.write(it.read() | {"facts": {}}), "something else"),
    "others may read it": (lambda it: (it.place / "ram").chmod(0o644), "not this user's alone"),
    "state of another": (
        lambda it: it.write(it.read() | {"state": it.read()["state"] | {"crc32": 0}}),
        "state is damaged",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_template_is_not_used(forged: Forged, how: str) -> None:
    assert forged.found()
    damage, words = DAMAGE[how]
    damage(forged)
    with pytest.raises(Damaged, match=words):
        forged.found()
    templates.discard(forged.directory, str(forged.wish["key"]))
    assert not forged.found() and list(forged.directory.iterdir()) == []


def test_one_in_use_is_not_removed_and_one_that_does_not_work_is_not_made_again(forged: Forged) -> None:
    (one,) = templates.kept(forged.directory)
    with templates.found(forged.directory, forged.wish) as template:
        assert template is not None and not templatemaker.remove(one)
    templates.refuse(forged.directory, one.key, "it hung")
    assert not forged.found() and "it hung" in templates.refused(forged.directory, one.key)
    assert not Makers().want(["/nonexistent"], forged.directory, forged.wish)
    os.utime(forged.directory / f"{one.key}.refused", (0, 0))
    assert templates.refused(forged.directory, one.key) == ""
    forged.make()
    assert templatemaker.remove(one) and not forged.found()


def test_a_link_in_its_place_is_not_followed(forged: Forged, tmp_path: Path) -> None:
    forged.place.rename(tmp_path / "elsewhere")
    forged.place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged):
        forged.found()


def test_what_there_is_of_them_is_listed(forged: Forged) -> None:
    templates.refuse(forged.directory, "f" * 32, "it hung:\nfor long")
    one, other = templates.listing(forged.directory)
    assert one.startswith(f"{forged.wish['key']} memory=192M cpus=2 networks=1 bytes=")
    assert other == f"{'f' * 32} refused: it hung: for long"
    templates.forget(forged.directory)
    assert templates.listing(forged.directory) == [] and not forged.found()


def test_status_tells_of_templates_and_of_what_stands_by(tmp_path: Path) -> None:
    assert standbys.summary(tmp_path) == {"templates": "0", "standbys": "0"}
    directory = tmp_path / "6.1" / "templates"
    made = Forged(directory, templates.wanted(MACHINE, 0, ABOUT)).make()
    (tmp_path / "default").symlink_to("6.1")  # does not count them twice
    for name, machine in ((".standby-k", os.getpid()), (".warming-x", 0)):
        place = directory / name
        place.mkdir(mode=0o700)
        known = {"memory": 192, "cpus": 2, "networks": 4, "pid": 1, "qemu": machine, "since": 0}
        (place / "lock").write_text(json.dumps(known))
    shape = "memory=192M cpus=2 networks="
    told = {"templates": f"1, 0 MiB: {shape}1", "standbys": "0"}
    assert standbys.summary(tmp_path) == told  # nobody keeps those: they were left behind
    with ExitStack() as keepers:
        for place in directory.glob(".*"):
            fcntl.flock(keepers.enter_context(open(place / "lock", "rb")), fcntl.LOCK_EX)
        found = standbys.summary(tmp_path)["standbys"]
        assert re.fullmatch(rf"2: {shape}4 held=\d+M, {shape}4 is being made", found), found
        (line,) = standbys.listing(directory)
        assert line.startswith(f"k standby {shape}4 held=") and line.endswith("M pid=1 since=1970-01-01T00:00:00Z")
    templates.discard(directory, made.wish["key"])
    assert standbys.summary(tmp_path)["templates"] == "0"


def test_the_end_of_one_that_stood_by_is_not_that_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUTCHMAN_STANDBY", "1")
    script = 'exec 3<&0; (echo ready; read -r line <&3; cat <&3; echo over > "$0/$2") &'
    program = ["sh", "-c", script, str(tmp_path)]
    (tmp_path / "agent").write_bytes(b"agent")
    request = {"machine": {"memory": 1}, "agent": str(tmp_path / "agent"), "directory": str(tmp_path), "plan": {}}
    found = Standbys()
    monkeypatch.setattr(standbys, "make_disks", lambda *_: [])
    for key in ("one", "two"):
        found.want(program, tmp_path, request | {"key": key})
        until(lambda: found._ready)
    until(lambda: (tmp_path / "one").exists() and len(followers()) == 1)
    assert found._key == "two" and not (tmp_path / "two").exists()
    found.close()
    until(lambda: (tmp_path / "two").exists() and not followers())


@pytest.mark.parametrize("way", ["it says why", "its keeper is killed", "its disks cannot be made"])
def test_why_none_stands_by_is_told_until_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("DUTCHMAN_STANDBY", "1")
    script = {"it says why": 'read -r line; echo "QEMU: no such\nmachine"'}.get(way, "kill -9 $$")
    directory = tmp_path / "6.1" / "templates"
    directory.mkdir(parents=True)
    request = {"machine": {"memory": 1}, "agent": "/agent", "directory": str(directory), "plan": {}}

    def make(*_: object) -> list[list[int]]:
        if way == "its disks cannot be made":
            raise RuntimeFailure("the disk is full")
        return []

    monkeypatch.setattr(standbys, "make_disks", make)
    found = Standbys()
    program = ["sh", "-c", f"({script}) &"]
    found.want(program, directory, request | {"key": "k"})
    until(lambda: not followers())
    why = {"it says why": "QEMU: no such machine", "its disks cannot be made": "the disk is full"}
    (line,) = standbys.listing(directory)
    assert re.fullmatch(r"k none stands by before 2\d{3}-[0-9T:-]+Z: " + why.get(way, "its process was killed"), line)
    assert standbys.summary(tmp_path)["standbys"] == f"0; {line}"
    found.want(program, directory, request | {"key": "k"})
    assert found._turn == 1 and not Standbys()._key, "it was tried again at once"
    os.utime(directory / "k.alone", (1, 1))
    assert standbys.summary(tmp_path)["standbys"] == "0"
    found.want(program, directory, request | {"key": "k"})
    assert found._turn == 2
    until(lambda: not followers())
    templates.forget(directory)
    assert not [path for path in directory.iterdir() if not path.name.startswith(".")]
    found.close()


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "standby"]


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- real machines ----------------------------------------------------------------------------------------------------


class Templated:
    def __init__(self, bench: Bench, kernels: Path) -> None:
        self.bench, self.kernels = bench, kernels
        self.plan: dict[str, Any] = {}
        self.document: dict[str, Any] = {}
        bench.runtime.close()
        bench.runtime = VmRuntime(bench.place / "containers", state=bench.place / "state", kernels=kernels)

    def how(self, id: str) -> str:
        return (self.bench.place / "containers" / id / "run" / "vm" / "how").read_text()

    def made(self) -> list[Path]:
        return [path.parent for path in self.kernels.glob("*/templates/[0-9a-f]*/template.json")]

    def run(self, script: str, **fields: Any) -> tuple[str, list[str]]:
        """How it was started, and the lines it printed."""
        id = self.bench.run(("sh", "-c", script), memory="64m", **fields)
        how = self.how(id)
        bundle = self.bench.place / "containers" / id / "bundle"
        self.plan, self.document = (json.loads((bundle / name).read_bytes()) for name in ("vm.json", "config.json"))
        assert self.bench.end(30).exit_code == 0
        out = self.bench.output(id).decode().splitlines()
        self.bench.runtime.delete(id)
        return how, out


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templated]:
    place = tmp_path_factory.mktemp("templates")
    bench = bench_of("vm", place)
    kernel = guest_kernels().get(None)
    kernels = place / "kernels"
    ignore = shutil.ignore_patterns("templates")
    shutil.copytree(kernel.directory, kernels / kernel.name, copy_function=os.link, ignore=ignore)
    yield Templated(bench, kernels)
    bench.close()


CHANCE = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | busybox xxd -p"


def test_a_machine_is_booted_once_and_then_started_from_its_template(templated: Templated) -> None:
    if SLOW:
        how, _ = templated.run("true", fast_start=False)
        assert how == "booted" and templated.made() == []
    how, _ = templated.run("true")
    assert how.startswith("booted: there is no template")
    templated.bench.until(lambda: len(templated.made()) == 1, 60)
    (place,) = templated.made()
    assert place.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    before = time.time()
    machines = [
        templated.run(f"{CHANCE}; busybox date +%s; hostname", hostname=f"clone{number}") for number in range(2)
    ]
    assert [how for how, _ in machines] == [f"template {place.name}"] * 2
    one, two = (lines for _, lines in machines)
    assert len(one) == 5 and not set(one[:3]) & set(two[:3])  # not a byte of chance in common
    assert before - 2 <= int(one[3]) <= int(two[3]) <= time.time() + 2
    assert (one[4], two[4]) == ("clone0", "clone1")


@dataclass
class StandingBy:
    templated: Templated
    standbys: Standbys

    @property
    def directory(self) -> Path:
        return next(self.templated.kernels.glob("*/templates"))

    def have(self) -> tuple[int, int]:
        """The pids of a keeper and of its QEMU, whose machine is ready."""
        plan = self.templated.plan
        shim = next(self.templated.bench.place.glob("state/runtime/dutchman-vm-*"))
        request = plan["template"] | {"machine": plan["machine"], "taps": plan["taps"]}
        request |= {"agent": str(agentbuild.build(plan["machine"]["arch"], driver.agents()))}
        request |= {"plan": {name: plan[name] for name in ("overlay", "capabilities", "seccomp")}}
        request |= {"document": standbys.throwaway(self.templated.document)}
        self.standbys.want([str(shim), "--root", "/nonexistent"], self.directory, request)
        self.templated.bench.until(lambda: bool(standbys.listing(self.directory)), 100)
        (line,) = standbys.listing(self.directory)
        keeper = int(line.partition(" pid=")[2].split()[0])
        (qemu,) = map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())
        return keeper, qemu

    def gone(self, *pids: int) -> None:
        for pid in pids:
            self.templated.bench.until(lambda pid=pid: start_time(pid) is None, 30)


@pytest.fixture
def standing_by(templated: Templated, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandingBy]:
    monkeypatch.setenv("DUTCHMAN_STANDBY", "1")
    found = Standbys()
    yield StandingBy(templated, found)
    found.close()


def test_a_machine_that_stands_by_is_taken_over_once(standing_by: StandingBy) -> None:
    templated = standing_by.templated
    keeper, qemu = standing_by.have()
    how, out = templated.run(f"{CHANCE}; hostname; cat /etc/hostname; [ ! -e /warm ]", hostname="first")
    assert how == f"standby {templated.plan['template']['key']}"
    assert len(out) == 5 and out[3:] == ["first", "first"]  # nothing of what had run there before
    assert standbys.listing(standing_by.directory) == []
    standing_by.gone(keeper, qemu)
    assert not list(standing_by.directory.glob(".standby-*"))


def _and_kill(real: Callable[..., None], pid: int) -> Callable[..., None]:
    def call(*args: Any) -> None:
        real(*args)
        os.kill(pid, signal.SIGKILL)

    return call


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeFailure("no conmon today")


def _test_whatever_is_killed_nothing_of_what_stands_by_is_left(standing_by: StandingBy) -> None:
    templated, bench = standing_by.templated, standing_by.templated.bench
    for victim in ("keeper", "qemu", "daemon", "forget"):
        keeper, qemu = standing_by.have()
        if victim == "daemon":
            standing_by.standbys.close()  # as its end closes what it has open
            standing_by.standbys = Standbys()
        elif victim == "forget":
            standbys.forget(standing_by.directory)
        else:
            os.kill(keeper if victim == "keeper" else qemu, signal.SIGKILL)
        standing_by.gone(keeper, qemu)
        how, out = templated.run("echo here")
        assert out == ["here"] and how.startswith("template "), victim
    for victim in ("keeper", "qemu"):  # while they set it up for the container
        keeper, qemu = standing_by.have()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(standby, "set_up", _and_kill(standby.set_up, keeper if victim == "keeper" else qemu))
            how, out = templated.run("echo here")
        standing_by.gone(keeper, qemu)
        assert out == ["here"] and how.startswith("template ") and "what stood by does not work" in how, victim
    keeper, qemu = standing_by.have()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeFailure):  # nobody comes for it
        patch.setattr(conmon, "launch", _refuse)
        bench.run(("true",), memory="64m")
    standing_by.gone(keeper, qemu)
    for victim in ("keeper", "qemu", "owner"):
        keeper, qemu = standing_by.have()
        id = bench.run(("sleep", "1000"), memory="64m")
        assert templated.how(id).startswith("standby")
        os.kill({"keeper": keeper, "qemu": qemu, "owner": bench.runtime.status(id).pid or 0}[victim], signal.SIGKILL)
        assert bench.end(30).exit_code == 137, victim
        standing_by.gone(keeper, qemu)
        bench.runtime.delete(id)


if SLOW:  # ten machines
    test_whatever_is_killed_nothing_of_what_stands_by_is_left = (
        _test_whatever_is_killed_nothing_of_what_stands_by_is_left
    )


def test_what_does_not_stand_by_is_not_taken(tmp_path: Path) -> None:
    assert standby.engage(tmp_path, "k") is None
    place = tmp_path / ".standby-k"
    place.mkdir(mode=0o700)
    assert standby.engage(tmp_path, "k") is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / standby.SOCKET))
    assert standby.engage(tmp_path, "k") is None and standbys.listing(tmp_path) == []
    place.chmod(0o755)
    with pytest.raises(RuntimeFailure, match="not this user's alone"):
        standby.engage(tmp_path, "k")


def test_a_template_that_does_not_work_is_given_up_and_the_machine_booted(templated: Templated) -> None:
    (place,) = templated.made()
    # whole by all that is known of it, and not what QEMU wrote
    state, about = place / "state", json.loads((place / "template.json").read_bytes())
    data = state.read_bytes()
    data = data[: len(data) // 2]
    state.write_bytes(data)
    about["state"] = {"size": len(data), "mtime_ns": state.stat().st_mtime_ns}
    about["state"]["crc32"] = zlib.crc32(data)
    (place / "template.json").write_text(json.dumps(about))
    how, out = templated.run("echo here")
    assert out == ["here"] and how.startswith(f"booted: template {place.name} does not work")
    assert templated.made() == [] and templates.refused(place.parent, place.name)
    assert not (place.parent / place.name).exists()


def test_a_killed_maker_leaves_nothing_that_is_taken_for_a_template(templated: Templated) -> None:
    directory = next(templated.kernels.glob("*/templates"))
    plan = templated.plan  # refused by the last test: the driver makes none beside
    assert templates.refused(directory, plan["template"]["key"])
    request = json.dumps(plan["template"] | {"machine": plan["machine"], "taps": 0}).encode()
    shim = next(templated.bench.place.glob("state/runtime/dutchman-vm-*"))
    reading, writing = os.pipe()
    os.write(writing, request + b"\n")
    maker = subprocess.Popen([shim, "--root", "/nonexistent", "template", "x"], stdin=reading, stderr=subprocess.PIPE)
    os.close(reading)
    templated.bench.until(
        lambda: maker.poll() is not None or any(path.stat().st_size for path in directory.glob(".making-*/ram")), 60
    )
    assert maker.poll() is None, maker.communicate()
    with pytest.raises(Busy):
        templatemaker.make(directory, json.loads(request))
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate()
    os.close(writing)
    assert templates.kept(directory) == [] and not (directory / plan["template"]["key"]).exists()
