"""A machine whose accelerator fails with a real guest, limits it cannot have, and owners nobody waits for."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import Bench, bench_of

from engine.errors import InvalidArgument, RuntimeFailure
from engine.runtimes import pids
from engine.runtimes.base import State
from engine.runtimes.resources import Resources
from engine.runtimes.vm import accel, faults
from engine.runtimes.vm.accel import Accelerator, Accelerators
from engine.runtimes.vm.driver import VmRuntime


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of("vm", tmp_path)
    yield bench
    bench.close()


def said(bench: Bench, id: str, script: str) -> str:
    code, output = bench.runtime.probe_exec(id, ("/bin/sh", "-c", script), deadline=60)
    assert code == 0, output
    return output.decode()


def test_an_accelerator_that_fails_with_a_guest_is_not_tried_again(bench: Bench) -> None:
    """This host's QEMU has no HVF: it ends at once. Limits are changed in the same machine."""
    assert isinstance(bench.runtime, VmRuntime)
    known = Accelerators(bench.place / "known", lambda *_: "", system="darwin")
    bench.runtime._accelerators = known
    qemu, arch = accel.find_qemu(accel.architecture()), accel.architecture()
    assert known.choose(qemu, arch).accelerator is Accelerator.HVF
    id = bench.run("sleep", memory="64m", cpus=1, pids=40)
    choice = known.choose(qemu, arch)
    assert choice.accelerator is Accelerator.TCG and "with a real guest: QEMU ended with status" in choice.reason

    plan = json.loads((bench.place / "containers" / id / "bundle" / "vm.json").read_bytes())
    for wrong, field in ((Resources(memory=1 << 30), "memory"), (Resources(cpus=2), "cpus")):
        with pytest.raises(InvalidArgument, match=rf"^{field}: its virtual machine has") as caught:
            bench.runtime.update(id, wrong)
        assert caught.value.hint is not None and "stop it" in caught.value.hint
    limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max"
    assert said(bench, id, limits).split() == [str(64 << 20), "40", "100000", "100000"]
    filled = said(bench, id, "dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>/dev/null; echo full").strip()
    assert filled == "full"
    with pytest.raises(RuntimeFailure, match=r"memory: \d+ bytes are in use"):
        bench.runtime.update(id, Resources(memory=16 << 20, pids=5))
    bench.runtime.update(id, Resources(memory=48 << 20, cpus=0.5, cpuset="0"))
    assert said(bench, id, limits).split() == [str(48 << 20), "max", "50000", "100000"]
    pid = int((bench.place / "containers" / id / "run" / "vm" / "qemu.pid").read_text())
    assert os.sched_getaffinity(pid) == {0}
    bench.runtime.pause(id)
    bench.runtime.update(id, Resources(memory=48 << 20, cpus=0.5, cpuset="0"))  # what it has
    with pytest.raises(RuntimeFailure, match=r"memory: \d+ bytes are in use"):  # it is asked, and sleeps on
        bench.runtime.update(id, Resources(memory=16 << 20))
    bench.runtime.update(id, Resources(memory=40 << 20, pids=50))
    assert bench.runtime.status(id).state is State.PAUSED
    bench.runtime.resume(id)
    assert said(bench, id, limits).split() == [str(40 << 20), "50", "max", "100000"]
    bench.runtime.update(id, Resources())
    assert said(bench, id, limits).split() == ["max", "max", "max", "100000"]
    assert plan["machine"]["accelerator"] == "hvf"  # what it was asked for


@pytest.mark.parametrize("who", ["creator", "conmon"])
def test_a_machine_whose_creator_was_killed_does_not_go_on_booting(bench: Bench, who: str) -> None:
    run = bench.spec("sleep")
    place = bench.place / "containers" / run.id / "run"
    failures: list[Exception] = []

    def create() -> None:
        try:
            bench.runtime.create(run)
        except RuntimeFailure as error:
            failures.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    bench.until((place / "vm" / "qemu.pid").exists)
    bench.until(lambda: (place / "vm" / "qemu.pid").read_text() != "")
    qemu = int((place / "vm" / "qemu.pid").read_text())
    os.kill(qemu, signal.SIGSTOP)  # it never answers
    owner = parent_of(qemu)
    os.kill(parent_of(owner) if who == "creator" else int((place / "conmon.pid").read_text()), signal.SIGKILL)
    bench.until(lambda: pids.start_time(qemu) is None and pids.start_time(owner) is None)
    thread.join(60)
    assert len(failures) == 1 and bench.runtime.status(run.id).state is State.ABSENT


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_whose_fault_it_is() -> None:
    assert faults.of_accelerator("kvm", None, "", "internal-error") == "QEMU stopped it: internal-error"
    assert "did not answer within 10 s" in faults.of_accelerator("kvm", None, "", "")
    assert faults.of_accelerator("kvm", -6, "error: kvm run failed", "").startswith("QEMU aborted: error: kvm")
    assert faults.of_accelerator("kvm", 134, "", "") == "QEMU aborted"
    assert "status 1: Could not access KVM" in faults.of_accelerator("kvm", 1, "Could not access KVM kernel module", "")
    assert faults.of_accelerator("kvm", 1, "image.vmdk: No such file", "") == ""  # TCG would fail as well
    assert faults.of_accelerator("hvf", 0, "", "") == ""  # the guest's kernel has ended


def test_a_monitor_tells_of_a_machine_that_stopped_for_good_alone() -> None:
    ours, qemu = socket.socketpair()
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    faults.follow(ours, told.put)
    with qemu, qemu.makefile("rwb", buffering=0) as lines:
        lines.write(b'{"QMP": {}}\n')
        assert json.loads(lines.readline()) == {"execute": "qmp_capabilities"}
        lines.write(b'{"return": {}}\n{"event": "RESUME"}\nrubbish\n[]\n')
        for status in ("paused", "internal-error"):
            lines.write(b'{"event": "STOP"}\n')
            assert json.loads(lines.readline())["execute"] == "query-status"
            lines.write(json.dumps({"id": "status", "return": {"status": status}}).encode() + b"\n")
        assert told.get(timeout=30) == "internal-error"
        assert lines.readline() == b""
    assert told.empty()
