"""Accelerators and QEMU's command line: what is pure is checked for every platform, the probe runs where QEMU is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from guestkernel import guest_kernels
from runtimebench import skip_or_fail

from engine.config import ContainerConfig
from engine.errors import InvalidArgument, Unsupported
from engine.runtimes.base import make_spec
from engine.runtimes.vm import accel, agentbuild, driver, qemu, report
from engine.runtimes.vm.accel import Accelerator, Accelerators
from engine.runtimes.vm.qemu import Disk, Guest, Machine, Platform, Share, Tap, UserNet, VsockDevice

GUEST = Guest(kernel=Path("/k/vmlinux"), initfs=Path("/k/initfs"), agent_fd=5, console_fd=6)


def after(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def test_x86_guest_emulated() -> None:
    machine = Platform("x86_64", Accelerator.TCG, acpi=False, tsc_khz=2_000_000)
    argv = qemu.argv(Path("/usr/bin/qemu-system-x86_64"), machine, GUEST)
    assert after(argv, "-M") == ["microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=off"]
    assert after(argv, "-accel") == ["tcg,thread=multi"] and after(argv, "-cpu") == ["max,-xsave,-la57,-erms,-fsrm"]
    (append,) = after(argv, "-append")
    assert {"reboot=t", "tsc_early_khz=2000000", "nolapic_timer", "console=hvc0"} <= set(append.split())
    assert "virtio-serial-device,id=vs0" in argv and "socket,id=agent,fd=5" in argv
    two = qemu.argv(Path("q"), machine, dataclasses.replace(GUEST, cpus=2))
    assert "nolapic_timer" not in after(two, "-append")[0]


@pytest.mark.parametrize(
    ("arch", "accelerator", "kind", "cpu", "device"),
    [
        ("x86_64", Accelerator.KVM, "microvm,acpi=on,rtc=on,isa-serial=off", "host", "virtio-blk-device"),
        ("x86_64", Accelerator.HVF, "microvm,acpi=on,rtc=on,isa-serial=off", "host", "virtio-blk-device"),
        ("aarch64", Accelerator.KVM, "virt,gic-version=host", "host", "virtio-blk-pci"),
        ("aarch64", Accelerator.HVF, "virt", "host", "virtio-blk-pci"),
        ("aarch64", Accelerator.TCG, "virt,gic-version=3", "max,pauth-impdef=on", "virtio-blk-pci"),
    ],
)
def test_machines(arch: str, accelerator: Accelerator, kind: str, cpu: str, device: str) -> None:
    guest = dataclasses.replace(GUEST, disks=[Disk(Path("/d/a,b"), "image", True), Disk(Path("/d/u"), "upper")])
    argv = qemu.argv(Path("q"), Platform(arch, accelerator), guest)
    assert after(argv, "-M") == [kind] and after(argv, "-cpu") == [cpu]
    assert after(argv, "-accel") == ["tcg,thread=multi" if accelerator is Accelerator.TCG else str(accelerator)]
    assert f"{device},drive=disk0,serial=image" in argv
    image, upper = after(argv, "-blockdev")
    assert "file.filename=/d/a,,b" in image and "read-only=on" in image and "discard" not in image
    assert "read-only=off" in upper and "detect-zeroes=unmap" in upper
    (append,) = after(argv, "-append")
    assert "tsc_early" not in append and ("reboot=t" in append) == (arch == "x86_64")


def test_vsock_by_the_host_or_by_a_daemon() -> None:
    kernel = dataclasses.replace(GUEST, agent_fd=-1, vsock=VsockDevice(cid=7))
    argv = qemu.argv(Path("q"), Platform("x86_64", Accelerator.KVM), kernel)
    assert "vhost-vsock-device,guest-cid=7" in argv and not [word for word in argv if "virtserialport" in word]
    daemon = dataclasses.replace(GUEST, memory=300, vsock=VsockDevice(socket="v.sock"))
    argv = qemu.argv(Path("q"), Platform("aarch64", Accelerator.TCG), daemon)
    assert after(argv, "-M") == ["virt,gic-version=3,memory-backend=shared"]
    assert "vhost-user-vsock-pci,chardev=vsock" in argv
    assert after(argv, "-object") == ["memory-backend-memfd,id=shared,size=300M,share=on"]
    assert "socket,id=vsock,path=v.sock" in argv


def test_shares_by_a_daemon_have_modern_devices_and_shared_memory() -> None:
    guest = dataclasses.replace(GUEST, memory=300, shares=[Share(Path("/x"), "shares", socket="fs.sock")])
    argv = qemu.argv(Path("q"), Platform("x86_64", Accelerator.TCG), guest)
    assert after(argv, "-M")[0].endswith(",memory-backend=shared")
    assert after(argv, "-object") == ["memory-backend-memfd,id=shared,size=300M,share=on"]
    assert after(argv, "-global") == ["virtio-mmio.force-legacy=false"]
    assert "socket,id=share0,path=fs.sock" in argv and "vhost-user-fs-device,chardev=share0,tag=shares" in argv
    assert "/x" not in " ".join(argv)
    argv = qemu.argv(Path("q"), Platform("aarch64", Accelerator.TCG), guest)
    assert "vhost-user-fs-pci,chardev=share0,tag=shares" in argv and not after(argv, "-global")


def test_shares_and_networks() -> None:
    guest = dataclasses.replace(
        GUEST,
        shares=[Share(Path("/v"), "sh0", True)],
        nets=[Tap(9, "02:00:00:00:00:01"), UserNet((("tcp", "127.0.0.1", 8080, 80),))],
    )
    argv = qemu.argv(Path("q"), Platform("x86_64", Accelerator.TCG), guest)
    assert after(argv, "-fsdev") == ["local,id=share0,path=/v,security_model=passthrough,multidevs=remap,readonly=on"]
    assert "virtio-9p-device,fsdev=share0,mount_tag=sh0" in argv
    assert after(argv, "-netdev") == ["tap,id=net0,fd=9", "user,id=net1,hostfwd=tcp:127.0.0.1:8080-:80"]
    assert "virtio-net-device,netdev=net0,mac=02:00:00:00:00:01" in argv
    argv = qemu.argv(Path("q"), Platform("aarch64", Accelerator.TCG), guest)
    assert "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=" in argv  # nor is a file of ROMs needed
    many = dataclasses.replace(GUEST, shares=[Share(Path("/v"), f"sh{number}") for number in range(30)])
    with pytest.raises(InvalidArgument, match="31 disks, shares"):
        qemu.argv(Path("q"), Platform("x86_64", Accelerator.TCG), many)
    with pytest.raises(InvalidArgument, match="newline"):
        qemu.quoted("a\nb")


def test_a_containers_machine() -> None:
    machine = Machine("x86_64", "tcg", "/k", "/i", 320, 2, True, "/c/image.vmdk", "/c/upper.ext4", 7, 8, taps=(9, 10))
    argv = qemu.command(dataclasses.replace(machine, share="/c/shares", append="extra=1"))
    assert argv[0] == "qemu-system-x86_64" and after(argv, "-m") == ["320"] and after(argv, "-smp") == ["2"]
    assert after(argv, "-append")[0].endswith(" extra=1")
    image, upper = after(argv, "-blockdev")
    assert "driver=vmdk" in image and "driver=raw" in upper and "file.filename=/c/upper.ext4" in upper
    assert after(argv, "-netdev") == ["tap,id=net0,fd=9", "tap,id=net1,fd=10"]
    assert "virtio-9p-device,fsdev=share0,mount_tag=shares" in argv
    assert "-fsdev" not in qemu.command(machine)


def test_memory() -> None:
    assert qemu.memory_of(None) == qemu.DEFAULT and qemu.memory_of(1 << 20) == qemu.LEAST
    assert qemu.memory_of((256 << 20) + 1) == 257 + qemu.OVERHEAD
    assert qemu.memory_of(1 << 60) == qemu.memory_of(1 << 50) < 1 << 28  # the host's own, in MiB


def test_clock() -> None:
    assert qemu.tsc_khz("processor\t: 0\ncpu MHz\t\t: 2899.998\n") == 2_899_998
    assert qemu.tsc_khz("") == 0 and qemu.tsc_khz("cpu MHz : fast") == 0


def test_the_choice_is_made_once_a_boot(tmp_path: Path) -> None:
    asked: list[Accelerator] = []

    def probe(qemu: Path, arch: str, accelerator: Accelerator) -> str:
        asked.append(accelerator)
        return ""

    there = tmp_path / "qemu"
    there.write_text("")
    first = Accelerators(tmp_path, probe, "darwin")
    assert first.known(there, "aarch64") is None
    assert first.choose(there, "aarch64").accelerator is Accelerator.HVF
    second = Accelerators(tmp_path, probe, "darwin")
    assert second.choose(there, "aarch64") == first.choose(there, "aarch64") and asked == [Accelerator.HVF]
    second.refuse(there, "aarch64", "no hello within 10 s")
    after = first.choose(there, "aarch64")
    assert after.accelerator is Accelerator.TCG and "no hello" in after.reason and len(asked) == 1
    there.unlink()  # another QEMU: what was found no longer counts
    there.write_text("x")
    assert first.choose(there, "aarch64").accelerator is Accelerator.HVF and len(asked) == 2


def test_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (accel.candidate("linux"), accel.candidate("darwin")) == (Accelerator.KVM, Accelerator.HVF)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert accel.architecture() == "aarch64"
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(Unsupported, match="s390x"):
        accel.architecture()
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    monkeypatch.setattr("engine.host.MACOS", True)
    with pytest.raises(Unsupported) as caught:
        accel.find_qemu("aarch64")
    assert caught.value.hint == "brew install qemu"


def test_the_probing_guest_runs() -> None:
    """Emulation always works, so it shows that the guest does what the probe expects of it."""
    try:
        program = accel.find_qemu("x86_64")
    except Unsupported as error:
        skip_or_fail(error.reason)
    assert accel.runs_guests(program, "x86_64", Accelerator.TCG, 60) == ""
    assert "no end within" in accel.runs_guests(program, "x86_64", Accelerator.TCG, 0.001)
    refused = accel.runs_guests(Path("/nonexistent/qemu"), "x86_64", Accelerator.TCG)
    assert refused.startswith("QEMU cannot be started")


def test_report_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    assert all(said.startswith("none: qemu-system-") for said in report.summaries().values())
    ((name, ok, found, advice),) = report.rows()
    assert (name, ok) == ("qemu", False) and "not installed" in found and "qemu" in advice
    assert not report.possible(tmp_path / "containers")


def test_report_tells_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/usr/bin/qemu-system-x86_64").exists():
        skip_or_fail("needs qemu-system-x86_64")
    monkeypatch.setattr("engine.host.runtime_dir", lambda: tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert report.summary("x86_64") == "not tried yet"
    qemu_ = accel.find_qemu("x86_64")
    Accelerators().refuse(qemu_, "x86_64", "it stood still")
    assert "it stood still" in report.summary("x86_64")
    rows = {row[0]: row for row in report.rows()}
    assert rows["qemu"][1] and not rows["accelerator"][1] and "virtualisation" in rows["accelerator"][3]
    assert not report.possible(tmp_path / "containers")  # no kernel
    (tmp_path / "kernels" / "one").mkdir(parents=True)
    assert report.possible(tmp_path / "containers")


def test_without_a_compiler_the_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    if not Path("/usr/bin/qemu-system-x86_64").exists():
        skip_or_fail("needs qemu-system-x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.version", none)
    runtime = driver.VmRuntime(tmp_path / "containers", state=tmp_path / "s", kernels=guest_kernels().directory)
    found = runtime.probe()
    assert not found.ok and "Python's ziglang, is not installed" in found.reason
    config = ContainerConfig(command=("true",))  # type: ignore[call-arg]
    spec = make_spec(id="a" * 64, name="n", directory=tmp_path, rootfs=tmp_path, config=config)
    with pytest.raises(Unsupported, match="runtime vm: the guest's agent is not built") as caught:
        runtime.create(spec)
    assert f"{sys.executable} -m pip install ziglang" in str(caught.value.hint)
    runtime.close()
    agent = driver.agents() / f"agent-{os.uname().machine}-{agentbuild.build_id()}-0"
    agent.parent.mkdir(parents=True)
    agent.touch()  # one that was built while there was a compiler
    agentbuild.check(os.uname().machine, driver.agents())
    assert agentbuild.build(os.uname().machine, driver.agents()) == agent
