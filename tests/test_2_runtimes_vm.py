"""What only the vm driver has: what a guest's limits are, and what is left of a machine that was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtimebench import Bench, bench_of

from engine.errors import InvalidArgument
from engine.runtimes import conmon, pids
from engine.runtimes.base import State
from engine.runtimes.resources import Resources


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = bench_of("vm", tmp_path)
    yield bench
    bench.close()


def qemu_of(bench: Bench, id: str) -> int:
    return int((bench.place / "containers" / id / "run" / "vm" / "qemu.pid").read_text())


def gone(bench: Bench, pid: int) -> None:
    bench.until(lambda: pids.start_time(pid) is None)


def said(bench: Bench, id: str, script: str) -> str:
    code, output = bench.runtime.probe_exec(id, ("/bin/sh", "-c", script), deadline=60)
    assert code == 0, output
    return output.decode()


def test_limits_and_what_survives_a_daemon(bench: Bench) -> None:
    id = bench.run("sleep", memory="64m", pids=40)
    limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    assert said(bench, id, limits).split() == [str(64 << 20), "40"]
    bench.runtime.update(id, Resources(memory=48 << 20, pids=50))
    assert said(bench, id, limits).split() == [str(48 << 20), "50"]
    pid = bench.runtime.status(id).pid
    bench.runtime.pause(id)  # as when the host sleeps: the guest's clock stands still
    time.sleep(3)
    bench.runtime.resume(id)
    bench.until(lambda: abs(float(said(bench, id, "busybox date +%s")) - time.time()) < 2)
    bench.runtime.close()
    bench.runtime = bench.connect()
    bench.watch(id)
    status = bench.runtime.status(id)
    assert (status.state, status.pid) == (State.RUNNING, pid)
    qemu = qemu_of(bench, id)
    os.kill(qemu, signal.SIGKILL)
    end = bench.end()
    assert end.exit_code == 137 and "virtual machine ended" in end.reason
    assert bench.runtime.status(id).state is State.STOPPED
    gone(bench, qemu)


def test_its_disk_keeps_what_it_wrote_and_nothing_outlives_its_owner(bench: Bench) -> None:
    id = bench.run(("sh", "-c", "echo kept > /etc/kept; echo done; while :; do sleep 0.02; done"))
    bench.until(lambda: bench.output(id) == b"done\n")
    bench.runtime.pause(id)
    bench.runtime.signal(id, signal.SIGKILL)  # not before the guest has written out what it holds
    end = bench.end()
    assert (end.exit_code, end.reason) == (137, "")
    bench.run(("sh", "-c", "cat /etc/kept; trap 'exit 9' TERM; while :; do sleep 0.02; done"), id=id)
    bench.until(lambda: bench.output(id) == b"done\nkept\n")
    owner, qemu = bench.runtime.status(id).pid, qemu_of(bench, id)
    assert owner
    os.kill(owner, signal.SIGKILL)
    end = bench.end()
    assert end.exit_code == 137 and f"process {owner} of this host" in end.reason and "not the container" in end.reason
    gone(bench, qemu)


def test_a_killed_conmon_takes_the_machine_along(bench: Bench) -> None:
    id = bench.run("sleep")
    qemu = qemu_of(bench, id)
    facts = conmon.Facts.load(bench.place / "containers" / id / "run" / "facts.json")
    assert facts is not None
    os.kill(facts.conmon, signal.SIGKILL)
    end = bench.end()
    assert end.exit_code == 137 and "conmon was killed" in end.reason
    gone(bench, qemu)


def test_a_flood_on_the_console_is_bounded_and_a_panic_is_told(bench: Bench) -> None:
    flood = "busybox mknod /tmp/console c 229 0; dd if=/dev/zero of=/tmp/console bs=64k count=1000 2>/dev/null"
    wait = "echo done; while [ ! -e /go ]; do sleep 0.05; done"
    panic = "echo 2 > /proc/sys/vm/panic_on_oom; x=aaaaaaaa; while :; do x=$x$x; done"
    id = bench.run(("sh", "-c", f"{flood}; {wait}; {panic}"), privileged=True, memory="32m")
    bench.until(lambda: bench.output(id) == b"done\n")
    owner = Path(f"/proc/{bench.runtime.status(id).pid}/status").read_text()
    assert int(owner.split("VmRSS:")[1].split()[0]) < 80 << 10  # KiB; 64 MB went by
    said(bench, id, "echo > /go")
    end = bench.end(30)
    assert end.exit_code == 137 and "panic" in end.reason


@pytest.mark.parametrize(("field", "value"), [("networks", {"host": {}}), ("pid", "host"), ("ipc", "host")])
def test_what_is_the_hosts_cannot_be_a_guests(bench: Bench, field: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=field):
        bench.runtime.create(bench.spec("true", **{field: value}))
