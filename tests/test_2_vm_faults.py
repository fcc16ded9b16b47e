"""A machine whose accelerator fails with a real guest, limits it cannot have, and owners nobody waits for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import Bench, bench_of

from engine.errors import Busy, InvalidArgument, RuntimeFailure
from engine.runtimes.resources import Resources
from engine.runtimes.vm import accel
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
    with pytest.raises(Busy, match="paused"):
        bench.runtime.update(id, Resources())
    bench.runtime.resume(id)
    bench.runtime.update(id, Resources())
    assert said(bench, id, limits).split() == ["max", "max", "max", "100000"]
    assert plan["machine"]["accelerator"] == "hvf"  # what it was asked for
