"""Images for other processors: which machine runs them, and that a process which cannot is refused, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ContainerConfig
from engine.errors import InvalidArgument, Unsupported
from engine.model import ImageConfig
from engine.runtimes import foreign, seccomp, spec
from engine.runtimes.base import make_spec
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.vm import accel, bpf, report
from engine.runtimes.vm.accel import Accelerator, Accelerators

RULE = """{state}
interpreter /usr/bin/qemu-static
flags: {flags}
offset 0
magic 7f454c460201010000000000000000000200{machine}
mask ffffffffffffff00fffffffffffffffffeffffff
"""


@pytest.fixture(autouse=True)
def _amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def image(architecture: str, **more: str) -> ImageConfig:
    return ImageConfig.model_validate({"os": "linux", "architecture": architecture, **more})


@pytest.mark.parametrize(
    ("architecture", "machine", "native"),
    [
        ("amd64", "x86_64", True),
        ("x86_64", "x86_64", True),
        ("386", "x86_64", True),
        ("", "x86_64", True),
        ("unknown", "x86_64", True),
        ("arm64", "aarch64", False),
        ("aarch64", "aarch64", False),
        ("arm", "aarch64", False),
        ("riscv64", "riscv64", False),
    ],
)
def test_the_machine_of_an_image(architecture: str, machine: str, native: bool) -> None:
    assert foreign.machine_of(image(architecture)) == machine
    assert foreign.is_native(image(architecture)) is native


def test_an_apple_computer_is_of_the_same_kind_as_its_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert foreign.machine_of(image("")) == foreign.machine_of(image("arm64", variant="v8")) == "aarch64"
    assert foreign.is_native(image("arm64")) and not foreign.is_native(image("amd64"))


def test_a_process_is_refused_unless_the_kernel_has_an_interpreter(tmp_path: Path) -> None:
    foreign.check(image("386"), tmp_path)
    for architecture, hint in (("arm64", "run --runtime vm"), ("riscv64", "qemu-user-static")):
        with pytest.raises(Unsupported, match=f"for linux/{architecture}, and this host is linux/amd64") as caught:
            foreign.check(image(architecture), tmp_path / "not mounted")
        assert hint in str(caught.value.hint)
    (tmp_path / "register").touch()
    (tmp_path / "status").write_text("enabled\n")
    (tmp_path / "jar").write_text("enabled\ninterpreter /usr/bin/jexec\nflags: F\nextension .jar\n")
    for state, flags, machine in (("disabled", "F", "b700"), ("enabled", "OC", "b700"), ("enabled", "F", "f300")):
        (tmp_path / "arm").write_text(RULE.format(state=state, flags=flags, machine=machine))
        with pytest.raises(Unsupported):
            foreign.check(image("arm64"), tmp_path)
    foreign.check(image("riscv64"), tmp_path)
    (tmp_path / "arm").write_text(RULE.format(state="enabled", flags="POCF", machine="b700"))
    foreign.check(image("arm64"), tmp_path)


def test_what_runs_in_a_guest_is_made_for_the_guests_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if seccomp.profile_path() is None:
        pytest.skip("no seccomp profile is installed")
    monkeypatch.setattr(foreign, "interpreted", lambda *_: False)
    config = ContainerConfig(command=("sh",))  # type: ignore[call-arg]
    run = make_spec(id="a" * 64, name="n", directory=tmp_path, rootfs=tmp_path, config=config, image=image("arm64"))
    with pytest.raises(Unsupported, match="for linux/arm64"):
        spec.build(run, Cgroups(2, True))
    profile = spec.build(run, Cgroups(2, True), guest=True)["linux"]["seccomp"]
    assert "SCMP_ARCH_AARCH64" in profile["architectures"] and "SCMP_ARCH_X86_64" not in profile["architectures"]
    program = bpf.compile_profile(profile, "aarch64")
    assert bpf.ARCHITECTURES["SCMP_ARCH_AARCH64"].to_bytes(4, "little") in program
    assert bpf.ARCHITECTURES["SCMP_ARCH_X86_64"].to_bytes(4, "little") not in program
    foreign.check_init("x86_64")
    with pytest.raises(InvalidArgument, match=r"init program is for x86_64, the image for aarch64"):
        foreign.check_init("aarch64")


def test_guests_of_another_architecture_are_emulated_and_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(accel, "find_qemu", lambda arch: tmp_path / arch)
    monkeypatch.setattr("engine.host.runtime_dir", lambda: tmp_path)
    here = Accelerators(tmp_path, tried, "linux").of("aarch64")
    assert (here.arch, here.qemu, here.choice.accelerator) == ("aarch64", tmp_path / "aarch64", Accelerator.TCG)
    assert "guests are aarch64, this host is x86_64" in here.choice.reason
    known = Accelerators(tmp_path, lambda *_: "", "linux")
    assert known.of("x86_64").choice.accelerator is Accelerator.KVM
    assert report.summaries() == {
        "accelerator": "kvm runs guest code",
        "accelerator_aarch64": here.choice.reason,
    }
    monkeypatch.undo()
    with pytest.raises(Unsupported, match="no virtual machines for riscv64"):
        Accelerators(tmp_path, tried).of("riscv64")
