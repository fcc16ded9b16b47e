"""What `auto` takes: a virtual machine only where one runs at the speed of the CPU, and nothing is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import host
from engine.errors import Unsupported
from engine.runtimes import select
from engine.runtimes.base import Probe
from engine.runtimes.select import open_runtime, preferred
from engine.runtimes.vm import accel, report
from engine.runtimes.vm.accel import Accelerator, Accelerators
from engine.runtimes.vm.driver import VmRuntime

pytestmark = pytest.mark.skipif(not host.LINUX, reason="vm and oci are Linux's")


@pytest.fixture
def containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose host has QEMU, hardware that runs guests, and a kernel."""
    containers = tmp_path / "containers"
    containers.mkdir()
    (tmp_path / "kernels" / "6.1").mkdir(parents=True)
    qemu = tmp_path / "qemu"
    qemu.touch()
    monkeypatch.setattr(accel, "architecture", lambda: "x86_64")
    monkeypatch.setattr(accel, "find_qemu", lambda arch: qemu)
    known = Accelerators(tmp_path / "known", lambda *_: "")
    monkeypatch.setattr(accel, "Accelerators", lambda *_: known)
    monkeypatch.setattr(VmRuntime, "probe", lambda self: Probe(True, "kvm"))
    return containers


def test_where_hardware_runs_guests_it_is_vm(containers: Path) -> None:
    assert preferred(containers) == "vm"
    assert isinstance(open_runtime("auto", containers), VmRuntime)
    assert report.summary("x86_64") == "kvm runs guest code"


def test_what_failed_with_a_real_guest_is_not_taken(containers: Path) -> None:
    accel.Accelerators().refuse(accel.find_qemu(""), "x86_64", "with a real guest: QEMU aborted")
    assert preferred(containers) == "oci"
    assert open_runtime("auto", containers).name == "oci"
    assert report.summary("x86_64").endswith("kvm cannot be used: with a real guest: QEMU aborted")


def test_without_kernel_qemu_or_a_working_probe_it_is_oci(containers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VmRuntime, "probe", lambda self: Probe(False, "conmon is not installed"))
    assert preferred(containers) == "oci"

    def probed(*_: Any) -> str:
        raise AssertionError("nothing is tried where something is missing")

    untried = Accelerators(containers.parent / "untried", probed)
    monkeypatch.setattr(accel, "Accelerators", lambda *_: untried)
    (containers.parent / "kernels" / "6.1").rmdir()
    assert preferred(containers) == "oci"
    (containers.parent / "kernels").rmdir()
    assert preferred(containers) == "oci"

    def no_qemu(arch: str) -> Path:
        raise Unsupported("runtime vm: qemu-system-x86_64 is not installed", hint="apt-get install qemu-system-x86")

    (containers.parent / "kernels" / "6.1").mkdir(parents=True)
    monkeypatch.setattr(accel, "find_qemu", no_qemu)
    assert preferred(containers) == "oci"
    assert report.summary("x86_64") == "none: qemu-system-x86_64 is not installed"


def test_only_the_choice_of_a_person_takes_an_emulated_one(containers: Path) -> None:
    known = accel.Accelerators()
    known.refuse(accel.find_qemu(""), "x86_64", "there is no /dev/kvm")
    assert known.choose(accel.find_qemu(""), "x86_64").accelerator is Accelerator.TCG
    assert preferred(containers) == "oci" and select.open_runtime("vm", containers).name == "vm"
