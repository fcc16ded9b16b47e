"""Guest kernels: what a file is, a Debian package, import, default, removal; the initial file system."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from guestkernel import guest_kernel

from engine import host, kernelimage, kernelmodules
from engine.errors import AlreadyExists, Busy, Damaged, EngineError, InvalidArgument, NotFound
from engine.kernels import Kernel, Kernels
from engine.runtimes.vm import initfs

CONFIG = "".join(f"CONFIG_{option}=y\n" for _, _, option in (*kernelmodules.ESSENTIAL, *kernelmodules.OPTIONAL))


def vmlinux(version: str = "6.9.1-test", machine: int = 62, config: str = CONFIG, extra: bytes = b"") -> bytes:
    """The least ELF that is a kernel to us: one segment, the banner, a configuration."""
    packed = b"IKCFG_ST" + gzip.compress(config.encode(), mtime=0) + b"IKCFG_ED" if config else b""
    body = f"Linux version {version} (a@b) #1\n".encode() + packed + extra
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0, len(body), len(body), 0) + body


def bzimage(payload: bytes, version: str = "6.9.1-test") -> bytes:
    """A bzImage of protocol 2.15 around a compressed vmlinux."""
    head = bytearray(1024)
    head[0x1F1], head[0x1FE:0x200], head[0x202:0x206] = 1, b"\x55\xaa", b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x020F)
    struct.pack_into("<H", head, 0x20E, 0x300 - 0x200)
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<II", head, 0x248, 0, len(payload) + 4)
    head[0x300 : 0x300 + len(version) + 3] = f"{version} (".encode() + b"\0"
    return bytes(head) + payload + struct.pack("<I", 0)


def arm64(version: str = "6.9.1-arm") -> bytes:
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x10, 1 << 20)
    head[0x38:0x3C] = b"ARM\x64"
    return bytes(head) + f"Linux version {version} (a@b) #1\n".encode()


def lz4(data: bytes) -> bytes:
    return subprocess.run(["lz4", "-l", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(tmp_path / "kernels")


# --- what a file is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack", [gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "xz", "zstd"]
)
def test_a_kernel_is_read_from_every_wrapping(pack: Callable[[bytes], bytes]) -> None:
    plain = vmlinux(extra=bytes(range(256)) * 2000)
    for wrapped, kind in ((pack(plain), "vmlinux"), (bzimage(pack(plain)), "bzImage")):
        found = kernelimage.read(wrapped)
        assert (found.data, found.arch, found.version) == (plain, "x86_64", "6.9.1-test")
        assert found.format.partition("+")[0] == kind and found.config == CONFIG


def test_an_lz4_kernel_is_read(tmp_path: Path) -> None:
    plain = vmlinux(extra=b"".join(struct.pack("<I", n * n) + b"abcabcabcabc" * (n % 7) for n in range(40_000)))
    packed = lz4(plain)
    assert kernelimage.decompress(packed, "lz4") == plain
    assert kernelimage.read(bzimage(packed)).data == plain
    for cut in (5, 9, len(packed) // 2, len(packed) - 5):
        with pytest.raises(EngineError):
            kernelimage.read(packed[:cut])


def test_an_arm64_image_is_known_by_its_header() -> None:
    found = kernelimage.read(gzip.compress(arm64()))
    assert (found.arch, found.version, found.format) == ("aarch64", "6.9.1-arm", "Image+gzip")


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", Damaged, "begins with nothing"),
        (b"#!/bin/sh\n", Damaged, "no kernel"),
        (b"MZ" + bytes(100), Damaged, "PE program"),
        (vmlinux()[:-1], Damaged, "cut short"),
        (vmlinux(machine=3), InvalidArgument, "machine 3"),
        (vmlinux().replace(b"Linux version", b"Other version"), Damaged, "no version"),
        (bzimage(gzip.compress(vmlinux()), "6.9.2-other"), Damaged, "header says version 6.9.2-other"),
        (bzimage(gzip.compress(vmlinux()))[:-20], Damaged, "cut short"),
        (bzimage(b"?????????????????"), Damaged, "unknown compression"),
        (bzimage(gzip.compress(b"no kernel at all")), Damaged, "no ELF"),
    ],
)
def test_what_is_no_kernel_is_refused_with_its_reason(data: bytes, error: type[EngineError], says: str) -> None:
    with pytest.raises(error, match=says):
        kernelimage.read(data)


def test_headers_that_point_far_beyond_the_end_are_damage() -> None:
    module = bytearray(b"\x7fELF\x02\x01".ljust(64, b"\0"))
    struct.pack_into("<H", module, 18, 62)
    struct.pack_into("<Q", module, 40, 0xFFFFFFFFFFFFFF00)
    struct.pack_into("<HHH", module, 58, 64, 3, 1)
    with pytest.raises(Damaged, match="module m is cut short"):
        kernelmodules.modinfo(bytes(module), "m", "x86_64")
    image = bytearray(arm64().ljust(512, b"\0"))
    image[:2] = b"MZ"
    struct.pack_into("<I", image, 0x3C, len(image) - 4)
    image[-4:] = b"PE\0\0"
    with pytest.raises(Damaged, match="cut short"):
        kernelimage.read(bytes(image))


def test_a_kernel_of_another_machine_is_refused(kernels: Kernels) -> None:
    with pytest.raises(InvalidArgument, match="for aarch64, not for x86_64"):
        kernels.add(arm64(), "test", arch="x86_64")
    assert kernels.names() == []


# --- several kernels --------------------------------------------------------------------------------------------


def test_kernels_live_side_by_side_and_one_is_the_default(kernels: Kernels) -> None:
    with pytest.raises(NotFound, match="no guest kernel"):
        kernels.get(None)
    kernels.add(vmlinux("6.9.1"), "test", arch="x86_64")
    kernels.add(vmlinux("6.10.0"), "test", arch="x86_64")
    assert kernels.names() == ["6.10.0", "6.9.1"] and kernels.get(None).name == "6.10.0"
    kernels.choose("6.9.1")
    again = Kernels(kernels.directory)
    assert again.get(None).name == "6.9.1"
    with pytest.raises(AlreadyExists):
        kernels.add(vmlinux("6.9.1"), "test", arch="x86_64")
    kernels.remove("6.9.1")
    assert kernels.get(None).name == "6.10.0" and not (kernels.directory / "default").is_symlink()


def test_each_architecture_has_its_default(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(NotFound, match="no guest kernel for aarch64") as caught:
        kernels.get(None, "aarch64")
    assert str(caught.value.hint).endswith("; add arch=aarch64")
    for version in ("6.8.0-arm", "6.9.1-arm"):
        kernels.add(arm64(version), "test", arch="aarch64")
    assert kernels.default() == kernels.default("aarch64") == "6.9.1-arm"  # there is no other
    assert kernels.default("x86_64") is None
    kernels.add(vmlinux("6.1.0"), "test", arch="x86_64")
    assert (kernels.default(), kernels.get(None, "x86_64").name) == ("6.1.0", "6.1.0")
    assert [kernel.name for kernel in kernels.unused()] == ["6.8.0-arm"]
    kernels.choose("6.8.0-arm")
    assert (kernels.default(), kernels.default("aarch64"), kernels.default("x86_64")) == ("6.8.0-arm",) * 2 + ("6.1.0",)
    with pytest.raises(InvalidArgument, match=r"kernel 6.1.0 is for x86_64, the guest is aarch64"):
        kernels.get("6.1.0", "aarch64")


def test_a_kernel_in_use_stays(tmp_path: Path) -> None:
    wanted: dict[str | None, list[str]] = {"6.9.1": ["web"], None: ["db"]}
    kernels = Kernels(tmp_path, lambda name: wanted.get(name, []))
    kernels.add(vmlinux("6.9.1"), "test", arch="x86_64")
    kernels.add(vmlinux("6.10.0"), "test", arch="x86_64")
    with pytest.raises(Busy, match="used by web"):
        kernels.remove("6.9.1")
    with pytest.raises(Busy, match="used by db"):
        kernels.remove("6.10.0")
    wanted.clear()
    assert [kernel.name for kernel in kernels.unused()] == ["6.9.1"]


@pytest.mark.parametrize("name", ["", "default", "../x", "a/b", ".x", "x" * 200])
def test_a_name_cannot_leave_the_directory(kernels: Kernels, name: str) -> None:
    kernels.add(vmlinux(), "test", arch="x86_64", name="fine")
    if name:
        with pytest.raises(InvalidArgument):
            kernels.add(vmlinux(), "test", name=name, arch="x86_64")
        with pytest.raises(NotFound):
            kernels.get(name)
    assert kernels.names() == ["fine"]


def test_what_an_import_left_in_the_middle_is_no_kernel_and_goes(kernels: Kernels) -> None:
    kernels.add(vmlinux(), "test", arch="x86_64")
    half = kernels.directory / ".import-x"
    half.mkdir()
    (half / "kernel.json").write_text("{}")
    assert kernels.names() == ["6.9.1-test"]
    kernels.clean()
    assert not half.exists() and kernels.names() == ["6.9.1-test"]


def test_what_nobody_goes_on_with_goes_and_what_can_be_resumed_stays(kernels: Kernels) -> None:
    kernel = kernels.add(vmlinux(), "here", arch="x86_64")
    parts = [kernels.directory / f".fetch-{name}" for name in ("old", "new")]
    for path in parts:
        path.write_bytes(b"half")
    os.utime(parts[0], (0, 0))
    making = kernel.directory / "templates" / ".making-x"
    making.mkdir(parents=True)
    (making / "ram").write_bytes(b"half")
    (kernel.directory / f"{host.ASIDE}x").write_bytes(b"half")
    (making.parent / "0a").mkdir()
    kernels.clean()
    assert [path.exists() for path in parts] == [False, True]
    assert os.listdir(making.parent) == ["0a"] and not list(kernel.directory.glob(f"{host.ASIDE}*"))


def test_a_kernel_without_what_guests_need_is_refused(kernels: Kernels) -> None:
    with pytest.raises(InvalidArgument, match=r"lacks: erofs \(CONFIG_EROFS_FS\)"):
        kernels.add(vmlinux(config=CONFIG.replace("CONFIG_EROFS_FS=y\n", "")), "test", arch="x86_64")
    assert kernels.add(vmlinux(config=CONFIG), "test", arch="x86_64").acpi
    tuned = CONFIG + "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n"
    assert not kernels.add(vmlinux("6.9.3", config=tuned), "test", arch="x86_64").acpi


# --- a Debian package -------------------------------------------------------------------------------------------


def deb(kernel: Kernel, out: Path, leave: str = "") -> Path:
    """A package as Debian's from the real modules of `kernel`, but for those whose name is `leave`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as tar:

        def put(name: str, body: bytes) -> None:
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))

        put("boot/vmlinuz-6.9.1-test", bzimage(gzip.compress(vmlinux(config=""))))
        put("boot/config-6.9.1-test", b"CONFIG_VIRTIO=m\n")
        for name in reversed(kernel.modules):
            if name != leave:
                body = (kernel.directory / "modules" / f"{name}.ko").read_bytes()
                put(f"lib/modules/6.9.1-test/kernel/any/{name.replace('_', '-')}.ko.xz", lzma.compress(body, preset=0))
        put("lib/modules/6.9.1-test/modules.builtin", b"kernel/mm/zswap.ko\n")
    with open(out, "wb") as file:
        file.write(b"!<arch>\n")
        for member, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
            file.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode())
            file.write(body + b"\n" * (len(body) % 2))
    return out


def test_debians_kernel_has_all_a_guest_needs_and_loads_it_in_order() -> None:
    kernel = guest_kernel()
    assert set(kernel.features) >= {"9p", "erofs", "ext4", "overlay", "virtiofs", "vsock", "virtio_net"}
    seen: set[str] = set()
    for name in kernel.modules:
        data = (kernel.directory / "modules" / f"{name}.ko").read_bytes()
        needs = filter(None, kernelmodules.modinfo(data, name, kernel.arch)["depends"][0].split(","))
        assert {need.replace("-", "_") for need in needs} <= seen, name
        seen.add(name)
    assert kernel.image.read_bytes()[:4] == b"\x7fELF"


def test_a_package_is_imported_with_its_modules_in_order(tmp_path: Path, kernels: Kernels) -> None:
    real = guest_kernel()
    if not real.modules:
        pytest.skip("the kernel of the tests has everything built in")
    kernel = kernels.import_(deb(real, tmp_path / "k.deb"), arch="x86_64")
    assert (kernel.version, kernel.format, kernel.acpi) == ("6.9.1-test", "bzImage", True)
    assert kernel.modules == real.modules
    for name in kernel.modules:
        same = [(one.directory / "modules" / f"{name}.ko").read_bytes() for one in (kernel, real)]
        assert same[0] == same[1]

    with pytest.raises(Damaged, match=r"depends on jbd2, which is not in the package"):
        kernels.import_(deb(real, tmp_path / "l.deb", leave="jbd2"), "other", arch="x86_64")
    with pytest.raises(InvalidArgument, match=r"lacks: overlay"):
        kernels.import_(deb(real, tmp_path / "m.deb", leave="overlay"), "other", arch="x86_64")
    whole = (tmp_path / "k.deb").read_bytes()
    for cut in (70, 300, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.deb").write_bytes(whole[:cut])
        with pytest.raises(Damaged):
            kernels.import_(tmp_path / "cut.deb", "other", arch="x86_64")
    assert kernels.names() == ["6.9.1-test"] and not list(kernels.directory.glob(".import-*"))


# --- the initial file system ------------------------------------------------------------------------------------


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """newc, read back."""
    out, place = {}, 0
    while True:
        assert archive[place : place + 6] == b"070701"
        numbers = [int(archive[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        name = archive[place + 110 : place + 109 + numbers[11]].decode()
        place += -(-(110 + numbers[11]) // 4) * 4
        if name == "TRAILER!!!":
            return out
        out[name] = numbers[1], archive[place : place + numbers[6]]
        place += -(-numbers[6] // 4) * 4


def test_the_initial_file_system_has_the_agent_and_the_modules() -> None:
    found = members(initfs.build(b"agent", [("one", b"abc"), ("two", b"")]))
    assert found["init"] == (0o100755, b"agent") and found["dev/console"][0] == 0o20600
    assert found["modules.list"][1] == b"/modules/one.ko\n/modules/two.ko\n"
    assert found["modules/one.ko"][1] == b"abc" and found["modules"][0] == 0o40755


def test_an_initial_file_system_is_made_once_per_agent_and_old_ones_go(tmp_path: Path, kernels: Kernels) -> None:
    kernel = kernels.add(vmlinux(), "test", arch="x86_64")
    agent = tmp_path / "agent"
    paths = []
    for version in range(8):
        agent.write_bytes(b"agent %d" % version)
        paths.append(kernel.initfs(agent))
        first = paths[-1].stat().st_ino
        assert kernel.initfs(agent) == paths[-1] and paths[-1].stat().st_ino == first
    assert len(kernel.made()) == 4 and paths[-1] in kernel.made()
    assert members(paths[-1].read_bytes())["init"][1] == b"agent 7"
