"""Tests on another host: a Debian system of its own in QEMU, with what the machine at hand may not have.

The guest has cgroup v2 and nothing else, AppArmor, btrfs and xfs (files that share blocks), an NFS server, runc and
crun, and Debian's own kernel. Another boot of it has SELinux in place of AppArmor (enforcing, with the types for
containers that Debian's policy lacks: containers.cil). It is emulated where there is no /dev/kvm,
so a run takes a quarter of an hour or more. What it writes is thrown away with it; the project is copied into it as it
lies here.

The first run makes the system with debootstrap, in .cache/systemtest (about 2 GB; some minutes), later ones reuse it
until the list of packages, pyproject.toml or the kernel changes. Needs root, and the packages debootstrap,
qemu-system-x86, e2fsprogs and busybox-static; Debian's kernel package comes from `tools/setup test`.

Usage: python tools/systemtest/systemtest.py [--minutes 60] [--memory 3072] [--kind KIND] [PYTEST'S ARGUMENTS]
Without arguments it runs tests/system/guest_*.py, each file in the kind of guest it is for (KINDS).
Exit status: that of pytest in the guest; 70 when the guest did not get there.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine import kernelpackage  # noqa: E402
from engine.runtimes.vm import initfs, qemu  # noqa: E402
from engine.runtimes.vm.accel import Accelerators, find_qemu  # noqa: E402

SUITE = "bookworm"
PYTHON = (3, 11)  # of that suite: the packages of this interpreter are put into the guest
PACKAGES = [
    "python3",
    "ca-certificates",
    "busybox-static",
    "runc",
    "crun",
    "conmon",
    "fuse3",
    "libfuse2",
    "uidmap",
    "slirp4netns",
    "netavark",
    "aardvark-dns",
    "iptables",
    "iproute2",
    "kmod",
    "apparmor",
    "btrfs-progs",
    "xfsprogs",
    "nfs-kernel-server",
    "nfs-common",
    "procps",
    "attr",
    "acl",
    "e2fsprogs",
    "tini",
    "golang-github-containers-common",
    "erofs-utils",
    "file",
    "jq",
    "libcap2-bin",
    "less",
    "netbase",
    "iputils-ping",
]
# put in by apt, which finds what they need by itself
MORE_PACKAGES = [
    "selinux-policy-default",
    "policycoreutils",
    "selinux-utils",
    "systemd",
    "systemd-sysv",
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
]
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "jsonschema")
SITE = "usr/local/lib/python3.11/dist-packages"
ROOT_SIZE, PROJECT_SIZE = 8 << 30, 512 << 20  # bytes, of sparse files
ARGUMENTS = "console=ttyS0 panic=-1 quiet cgroup_no_v1=all mitigations=off random.trust_cpu=on"
APPARMOR = "apparmor=1 security=apparmor"
# the kind of guest -> (words for its kernel, the files of tests/system that are for it)
KINDS = {
    "plain": (APPARMOR, ("guest_root.py", "guest_rootless.py", "guest_volumes.py")),
    "selinux": ("selinux=1 security=selinux", ("guest_selinux.py",)),
}
SELINUX = Path(__file__).parent / "containers.cil"
ENDED = re.compile(rb"SYSTEMTEST ENDED WITH (\d+)")
NO_GUEST = 70  # EX_SOFTWARE

# the first program of the guest: from the initial file system to the disks
START = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod $module; done < /modules.list
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /new || exec /bin/busybox poweroff -f
/bin/busybox mount -t ext4 -o ro /dev/vdb /new/project || exec /bin/busybox poweroff -f
for name in proc sys dev; do /bin/busybox mount --move /$name /new/$name; done
exec /bin/busybox switch_root /new /usr/bin/tini -s -- /bin/bash /project/tools/systemtest/init
"""


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def run(*words: str | Path, **more: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdin=subprocess.DEVNULL, **more)  # type: ignore[call-overload]


def kernel() -> Path:
    found = sorted((ROOT / ".cache/kernels").glob("linux-image-*.deb"))
    if not found:
        sys.exit("systemtest: no kernel package in .cache/kernels: run tools/setup test")
    return found[-1]


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [item for item in project["optional-dependencies"]["test"] if re.split(r"[>=<]", item)[0] in TEST_PACKAGES]
    return [*project["dependencies"], *tests]


def system(cache: Path) -> Path:
    """The disk of the guest's system, made if need be."""
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"systemtest: run it with Python {PYTHON[0]}.{PYTHON[1]}, which is what {SUITE} has")
    package = kernel()
    about = repr([SUITE, PACKAGES, MORE_PACKAGES, SELINUX.read_text(), requirements(), package.name, ROOT_SIZE])
    disk = cache / f"system-{hashlib.sha256(about.encode()).hexdigest()[:16]}.ext4"
    if disk.exists():
        return disk
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("system-*.ext4"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as place:
        tree = Path(place) / "root"
        say(f"debootstrap {SUITE}: some minutes")
        with open(cache / "debootstrap.log", "wb") as log:
            words = [
                "--variant=minbase",
                "--cache-dir=/var/cache/apt/archives",
                f"--include={','.join(PACKAGES)}",
                SUITE,
            ]
            run("debootstrap", *words, tree, stdout=log, stderr=log)
        shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-qq"]
        with open(cache / "apt.log", "wb") as log:
            run("chroot", tree, *apt, "update", stdout=log, stderr=log)
            run("chroot", tree, *apt, "install", "--no-install-recommends", *MORE_PACKAGES, stdout=log, stderr=log)
        say("the kernel's modules, Python's packages, SELinux labels, the disk")
        run("dpkg-deb", "-x", package, Path(place) / "kernel")  # aside: it has a /lib, which is a symlink here
        modules = next((Path(place) / "kernel/lib/modules").iterdir())
        version = modules.name
        (tree / "usr/lib/modules").mkdir(exist_ok=True)
        modules.rename(tree / "usr/lib/modules" / version)
        run("chroot", tree, "depmod", version)
        target = tree / SITE
        run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--root-user-action=ignore",
            "--target",
            target,
            *requirements(),
        )
        for name in ("project", "root"):
            (tree / name).mkdir(exist_ok=True)
        for name in (
            "boot",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
            "var/cache/apt",
            "var/lib/apt/lists",
        ):
            shutil.rmtree(tree / name, ignore_errors=True)
        label(tree)
        made = Path(place) / "disk"
        make_disk(made, tree, ROOT_SIZE)
        made.rename(disk)
    return disk


def label(tree: Path) -> None:
    """Let the policy know containers, and every file have its SELinux context. The others' kernels do not look."""
    shutil.copy(SELINUX, tree / "tmp")
    run("chroot", tree, "semodule", "-n", "-s", "default", "-i", f"/tmp/{SELINUX.name}")
    run("mount", "--bind", "/proc", tree / "proc")  # setfiles writes by /proc/self/fd
    try:
        contexts = "/etc/selinux/default/contexts/files/file_contexts"
        run("chroot", tree, "setfiles", "-F", "-e", "/proc", "-e", "/sys", "-e", "/dev", contexts, "/")
    finally:
        run("umount", tree / "proc")


def make_disk(image: Path, tree: Path, size: int) -> None:
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-d", tree, image)


def project(image: Path, place: Path) -> None:
    """A disk with the files that git knows or would know, as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    tree = place / "project"
    for name in filter(None, os.fsdecode(names).split("\0")):
        source, target = ROOT / name, tree / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    # its own Python would compile all of it at every start of a daemon; the version is the same
    run(sys.executable, "-m", "compileall", "-q", tree / "engine", tree / "fdfs", tree / "tests")
    make_disk(image, tree, PROJECT_SIZE)


def initial(place: Path) -> tuple[Path, Path]:
    """(the kernel's image, an initial file system that finds the disks)."""
    packaged = kernelpackage.read(kernel(), place, "x86_64")
    (place / "vmlinuz").write_bytes(packaged.image)
    more = place / "initial"
    (more / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", more / "bin/busybox")
    listing = b"bin\nbin/busybox\n"
    archive = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], cwd=more, input=listing, check=True, capture_output=True
    ).stdout
    (place / "initfs").write_bytes(initfs.build(START, packaged.chosen.modules) + archive)
    return place / "vmlinuz", place / "initfs"


def command(place: Path, disk: Path, memory: int, kind: str, arguments: Sequence[str]) -> list[str]:
    machine, first = initial(place)
    project(place / "project.ext4", place)
    accelerator = Accelerators().choose(find_qemu("x86_64"), "x86_64").accelerator  # it tries them: some do not work
    hertz = 0 if accelerator.hardware else qemu.tsc_khz(Path("/proc/cpuinfo").read_text())
    platform = qemu.Platform("x86_64", accelerator, tsc_khz=hertz)
    # in base64: the kernel takes quotes and spaces of its command line for its own
    tests = base64.b64encode(shlex.join(arguments).encode()).decode()
    clock = f"tsc=reliable no_timer_check{f' tsc_early_khz={hertz}' if hertz else ''}"
    # without xsave the kernel must not believe in AVX either: btrfs wants to make use of it
    cpu = platform.cpu if accelerator.hardware else f"{platform.cpu},-avx,-avx2"
    words = ["qemu-system-x86_64", "-M", "q35", "-accel", platform.accel, "-cpu", cpu]
    words += ["-m", str(memory), "-smp", "2", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
    words += ["-kernel", str(machine), "-initrd", str(first)]
    words += ["-append", f"{ARGUMENTS} {KINDS[kind][0]} {clock} systemtest={tests}", "-serial", "stdio"]
    for path, snapshot in ((disk, "on"), (place / "project.ext4", "off")):
        words += ["-drive", f"file={path},format=raw,if=virtio,cache=unsafe,snapshot={snapshot}"]
    return words


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="after which the guest is ended")
    parser.add_argument("--memory", type=int, default=3072, help="MiB of the guest")
    parser.add_argument("--kind", choices=list(KINDS), help="of guest; by default what the first test is for, or all")
    known, arguments = parser.parse_known_args()
    if os.geteuid() != 0:
        sys.exit("systemtest: debootstrap needs root")
    disk = system(ROOT / ".cache/systemtest")
    fitting = [kind for kind, (_, files) in KINDS.items() if any(file in " ".join(arguments) for file in files)]
    kinds = [known.kind] if known.kind else fitting[:1] if arguments else list(KINDS)
    codes = []
    for kind in kinds or ["plain"]:
        tests = arguments or [f"tests/system/{name}" for name in KINDS[kind][1]]
        codes.append(boot(disk, kind, tests, known.minutes, known.memory))
    return max(codes)


def boot(disk: Path, kind: str, tests: Sequence[str], minutes: float, memory: int) -> int:
    """Run these tests in a guest of this kind: their exit status, or NO_GUEST."""
    with tempfile.TemporaryDirectory(prefix="running-", dir=ROOT / ".cache/systemtest") as place:
        words = command(Path(place), disk, memory, kind, tests)
        say(f"booting: {kind}")
        started, code = time.monotonic(), NO_GUEST
        guest = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": place}
        )
        over = threading.Timer(minutes * 60, guest.kill)
        over.start()
        try:
            assert guest.stdout is not None
            for line in guest.stdout:
                if found := ENDED.search(line):
                    code = int(found[1])
                sys.stdout.buffer.write(line.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
        finally:
            over.cancel()
            guest.kill()
            guest.wait()
    say(f"{time.monotonic() - started:.0f} s in the guest, exit status {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
