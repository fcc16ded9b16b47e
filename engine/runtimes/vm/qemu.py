"""QEMU's command line for one guest. Floor 2, pure.

Only here: machines, processors, devices, the kernel's command line. `command` is for a container's `Machine`; it is
made of what varies between hosts, `Platform`, and between guests, `Guest`. Paths may be relative to the directory QEMU
is started in; sockets should be, for their paths are limited to about 100 bytes.

    x86_64    -M microvm, virtio-mmio; with ACPI for kernels without VIRTIO_MMIO_CMDLINE_DEVICES (Debian's)
    aarch64   -M virt, virtio-pci

Reasons for options that look odd: `tsc_early_khz` keeps a TCG guest from calibrating its clock, which hangs on a loaded
host; `nolapic_timer` is only right with one CPU, and with ACPI timers soon stand still (the first wait for RCU never
ends); without `reboot=t` a stop takes 3 s; -no-reboot makes a panic the end of QEMU (panic=-1 reboots at once).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.errors import InvalidArgument
from engine.runtimes.vm.accel import Accelerator

PORT_NAME = "fd.agent"
OVERHEAD = 64  # MiB of the guest's memory that its kernel and page tables take
LEAST, DEFAULT = 128, 512  # MiB of a guest
KERNEL_ARGUMENTS = "quiet panic=-1 oops=panic mitigations=off random.trust_cpu=on"
PLACEHOLDER = 1 << 46  # bytes of a template's disks: more than any disk that takes their place
SLOTS = {"microvm": 8, "microvm-acpi": 24, "virt": 28}  # virtio devices a machine has room for


@dataclass(frozen=True, slots=True)
class Disk:
    """A virtio disk; the guest finds it by `serial` in /sys/block/*/serial."""

    path: Path
    serial: str  # at most 20 characters
    read_only: bool = False
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class Share:
    """A host directory in the guest, by 9p, or by virtiofs from the vhost-user daemon at `socket`."""

    path: Path
    tag: str  # at most 31 characters
    read_only: bool = False
    owners: bool = True
    socket: str = ""  # the daemon sees all of the guest's memory, which is shared with it (Linux)


@dataclass(frozen=True, slots=True)
class Tap:
    """A network interface whose frames go through a tap device: its inherited descriptor."""

    fd: int
    mac: str = ""


@dataclass(frozen=True, slots=True)
class UserNet:
    """QEMU's own network, without any right of the host: egress, and ports published on the host."""

    ports: Sequence[tuple[str, str, int, int]] = ()  # protocol, host address, host port, guest port
    subnet: str = ""  # CIDR; empty: QEMU's, and what follows
    gateway: str = ""
    resolver: str = ""  # where the guest asks for names
    address: str = ""  # the guest's
    internal: bool = False  # leads nowhere
    mac: str = ""


@dataclass(frozen=True, slots=True)
class VsockDevice:
    """A guest's vsock(7): by the host's kernel, as the context `cid`, or by the vhost-user daemon at `socket`."""

    cid: int = 0
    fd: int = -1  # inherited: the host's device, which has that context already; -1: QEMU opens it
    socket: str = ""  # the daemon sees all of the guest's memory, which is shared with it (Linux)


@dataclass(frozen=True, slots=True)
class Platform:
    """The kind of machine."""

    arch: str  # x86_64 or aarch64
    accelerator: Accelerator
    acpi: bool = True  # of microvm
    tsc_khz: int = 0  # the host's, for TCG on x86-64; 0 is unknown

    @property
    def kind(self) -> str:
        return "microvm" if self.arch == "x86_64" else "virt"

    @property
    def slots(self) -> int:
        return SLOTS["microvm-acpi" if self.kind == "microvm" and self.acpi else self.kind]

    @property
    def device(self) -> str:
        """How names of virtio devices end."""
        return "device" if self.kind == "microvm" else "pci"

    @property
    def machine(self) -> str:
        if self.kind == "virt":
            gic = {Accelerator.KVM: ",gic-version=host", Accelerator.TCG: ",gic-version=3"}  # 2 is for 8 CPUs at most
            return "virt" + gic.get(self.accelerator, "")
        acpi = "on" if self.acpi else "off"
        # a hardware guest has kvmclock or a calibrated TSC; an emulated one needs the old timer to begin with
        timers = "pit=on,pic=on,rtc=on" if not self.accelerator.hardware else "rtc=on"
        return f"microvm,acpi={acpi},{timers},isa-serial=off"

    @property
    def cpu(self) -> str:
        if self.accelerator.hardware:
            return "host"
        # without erms and fsrm: TCG does `rep movsb` byte by byte; a boot takes a fifth less, large copies half
        return "max,-xsave,-la57,-erms,-fsrm" if self.arch == "x86_64" else "max,pauth-impdef=on"

    @property
    def accel(self) -> str:
        return "tcg,thread=multi" if self.accelerator is Accelerator.TCG else str(self.accelerator)

    def kernel_arguments(self, cpus: int) -> str:
        words = [KERNEL_ARGUMENTS]
        if self.arch == "x86_64":
            words.append("reboot=t tsc=reliable no_timer_check")
            if not self.accelerator.hardware:
                if self.tsc_khz:
                    words.append(f"tsc_early_khz={self.tsc_khz}")
                if cpus == 1 and not self.acpi:
                    words.append("nolapic_timer")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Guest:
    kernel: Path
    initfs: Path
    memory: int = DEFAULT  # MiB
    cpus: int = 1
    agent_fd: int = -1  # of the agent's port: one end of a socket pair, inherited; -1: none, it listens on vsock
    console_fd: int = -1  # of the console, likewise; -1: none
    qmp: str = "qmp.sock"
    watch_fd: int = -1  # of a second monitor, for who started it; -1: none
    disks: Sequence[Disk] = ()
    shares: Sequence[Share] = ()
    nets: Sequence[Tap | UserNet] = ()
    vsock: VsockDevice | None = None
    ram: str = ""  # a file that is the guest's memory (templates.py); empty: QEMU's own
    making: bool = False  # that file is written; else the guest has a private copy, and waits for its state
    name: str = ""  # shown by ps
    arguments: str = ""  # more of the kernel's


@dataclass(frozen=True, slots=True)
class Machine:
    """A container's machine, in plain values that a file of JSON can hold."""

    arch: str
    accelerator: str  # kvm, hvf, tcg
    kernel: str
    initfs: str
    memory: int  # MiB
    cpus: int
    acpi: bool
    image: str  # a VMDK descriptor, read-only: /dev/vda in the guest
    upper: str  # raw: /dev/vdb
    agent: int = -1  # inherited descriptors
    console: int = -1
    watch: int = -1
    qmp: str = "qmp.sock"
    taps: tuple[int, ...] = ()
    share: str | None = None  # a directory, by 9p, with the tag SHARES
    exports: Sequence[tuple[str, str, bool]] = ()  # more of them: tag, directory, whether it is read-only
    usernets: Sequence[Mapping[str, Any]] = ()  # values of UserNet, and more
    owners: bool = True  # of shared files, may be changed by the guest: QEMU has the ids for it
    ram: str = ""  # a template's (templates.py)
    making: bool = False  # of a template: its disks are placeholders
    standby: bool = False  # (standbys.py) its disks are plain files, to be replaced by a container's
    virtiofs: bool = False  # what is shared is served by a daemon at VIRTIOFS, not by QEMU's 9p
    vsock: str = ""  # the socket of a vhost-user daemon for it, in QEMU's working directory
    cid: int = 0  # of a vsock the host's kernel carries, by the device `vhost`
    vhost: int = -1
    append: str = ""
    qemu: str = ""  # the program; empty: by its usual name
    tsc_khz: int = 0


SHARES = "shares"
VIRTIOFS = "virtiofs.sock"  # in QEMU's working directory
SHARED = "shared"  # the memory that a vhost-user daemon sees


def command(machine: Machine) -> list[str]:
    """The command line of a container's machine."""
    platform = Platform(machine.arch, Accelerator(machine.accelerator), machine.acpi, machine.tsc_khz)
    kinds = ("null-co", "null-co") if machine.making else ("raw" if machine.standby else "vmdk", "raw")
    socket = VIRTIOFS if machine.virtiofs else ""
    shares = [Share(Path(machine.share), SHARES, owners=machine.owners, socket=socket)] if machine.share else []
    shares += [Share(Path(path), tag, read_only, machine.owners) for tag, path, read_only in machine.exports]
    guest = Guest(
        kernel=Path(machine.kernel),
        initfs=Path(machine.initfs),
        memory=machine.memory,
        cpus=machine.cpus,
        agent_fd=machine.agent,
        console_fd=machine.console,
        qmp=machine.qmp,
        watch_fd=machine.watch,
        disks=[Disk(Path(machine.image), "image", True, kinds[0]), Disk(Path(machine.upper), "upper", False, kinds[1])],
        ram=machine.ram,
        making=machine.making,
        shares=shares,
        nets=[*(Tap(fd) for fd in machine.taps), *map(user_net, machine.usernets)],
        vsock=VsockDevice(machine.cid, machine.vhost, machine.vsock) if machine.cid or machine.vsock else None,
        arguments=machine.append,
    )
    return argv(Path(machine.qemu or f"qemu-system-{machine.arch}"), platform, guest)


def user_net(values: Mapping[str, Any]) -> UserNet:
    known = {field.name: values[field.name] for field in fields(UserNet) if field.name in values}
    return UserNet(**known)


def memory_of(limit: int | None) -> int:
    """MiB of the guest for a container limited to `limit` bytes; a limit above what the host has is no reason for more
    than that, for QEMU would not start."""
    if limit is None:
        return DEFAULT
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20)
    return max(LEAST, min(-(-limit // (1 << 20)) + OVERHEAD, has - OVERHEAD))


def quoted(value: object) -> str:
    """A value inside a list of QEMU's options, where a comma is doubled."""
    text = str(value)
    if "\n" in text or "\0" in text:
        raise InvalidArgument("a path with a newline or NUL cannot be given to QEMU", at=text[:80])
    return text.replace(",", ",,")


def options(kind: str, values: Mapping[str, object]) -> str:
    return ",".join([kind, *(f"{key}={quoted(value)}" for key, value in values.items())])


def argv(qemu: Path, machine: Platform, guest: Guest) -> list[str]:
    """The whole command line. InvalidArgument when the machine has no room for the devices."""
    count = 1 + len(guest.disks) + len(guest.shares) + len(guest.nets) + (guest.vsock is not None)
    # without ACPI the fifth device has the clock's interrupt, which the kernel's 9p asks for too late
    late = machine.kind == "microvm" and not machine.acpi and len(guest.shares) > 1
    count += late and not guest.nets
    if count > machine.slots:
        raise InvalidArgument(
            f"{count} disks, shares and networks, and this machine has room for {machine.slots}",
            hint="mount fewer volumes, or directories instead of many files",
        )
    suffix = machine.device
    shared = (guest.vsock is not None and bool(guest.vsock.socket)) or any(share.socket for share in guest.shares)
    kind = machine.machine + (f",memory-backend={SHARED}" if shared else "")
    out = [str(qemu), "-M", kind, "-accel", machine.accel, "-cpu", machine.cpu]
    out += ["-m", str(guest.memory), "-smp", str(guest.cpus)]
    if shared:
        out += ["-object", f"memory-backend-memfd,id={SHARED},size={guest.memory}M,share=on"]
    if machine.kind == "microvm" and (shared or guest.vsock is not None):
        out += ["-global", "virtio-mmio.force-legacy=false"]  # neither vhost-user daemons nor vsock are of before 1.0
    if guest.ram:
        out[2] += ",memory-backend=ram"
        memory = {"id": "ram", "size": f"{guest.memory}M", "mem-path": guest.ram}
        out += ["-object", options("memory-backend-file", memory | {"share": "on" if guest.making else "off"})]
        out += [] if guest.making else ["-incoming", "defer"]
    out += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
    if guest.name:
        out += ["-name", options(f"guest={quoted(guest.name)}", {})]
    console = "console=hvc0 " if guest.console_fd >= 0 else ""
    append = f"{console}{machine.kernel_arguments(guest.cpus)} {guest.arguments}".strip()
    out += ["-kernel", str(guest.kernel), "-initrd", str(guest.initfs), "-append", append]
    out += ["-device", f"virtio-serial-{suffix},id=vs0"]
    if guest.agent_fd >= 0:
        out += ["-chardev", f"socket,id=agent,fd={guest.agent_fd}"]
        out += ["-device", f"virtserialport,bus=vs0.0,nr=1,chardev=agent,name={PORT_NAME}"]
    if guest.console_fd >= 0:
        out += ["-chardev", f"socket,id=console,fd={guest.console_fd}"]
        out += ["-device", "virtconsole,bus=vs0.0,nr=0,chardev=console"]
    out += ["-chardev", options("socket", {"id": "qmp", "path": guest.qmp, "server": "on", "wait": "off"})]
    out += ["-mon", "chardev=qmp,mode=control"]
    if guest.watch_fd >= 0:
        out += ["-chardev", f"socket,id=watch,fd={guest.watch_fd}", "-mon", "chardev=watch,mode=control"]
    disks = [disk_options(number, disk, suffix) for number, disk in enumerate(guest.disks)]
    devices = [share_options(number, share, suffix) for number, share in enumerate(guest.shares)]
    nets = [net_options(number, net, suffix) for number, net in enumerate(guest.nets)]
    if guest.vsock is not None:  # the clock's interrupt is a disk's or a network's, whose drivers are early
        devices += [vsock_options(guest.vsock, suffix), *disks, *nets]
    elif late:
        nets = nets or [["-device", f"virtio-rng-{suffix}"]]
        devices = [*disks, devices[0], *nets, *devices[1:]]
    else:
        devices = [*disks, *devices, *nets]
    for words in devices:
        out += words
    if machine.kind == "virt":
        out += ["-device", "virtio-rng-pci"]
    return out


def share_options(number: int, share: Share, suffix: str) -> list[str]:
    if share.socket:
        out = ["-chardev", options("socket", {"id": f"share{number}", "path": share.socket})]
        return [*out, "-device", f"vhost-user-fs-{suffix},chardev=share{number},tag={quoted(share.tag)}"]
    model = "passthrough" if share.owners else "none"  # which says that it did what it could not
    values = {"id": f"share{number}", "path": share.path, "security_model": model, "multidevs": "remap"}
    out = ["-fsdev", options("local", values | ({"readonly": "on"} if share.read_only else {}))]
    return [*out, "-device", f"virtio-9p-{suffix},fsdev=share{number},mount_tag={quoted(share.tag)}"]


def disk_options(number: int, disk: Disk, suffix: str) -> list[str]:
    node = f"disk{number}"
    file = {"driver": disk.format, "node-name": node, "read-only": "on" if disk.read_only else "off"}
    if disk.format == "null-co":
        file |= {"size": str(PLACEHOLDER), "read-zeroes": "on"}
    else:
        file |= {"file.driver": "file", "file.filename": str(disk.path)}
    if not disk.read_only:
        file |= {"discard": "unmap", "detect-zeroes": "unmap"}
    device = f"virtio-blk-{suffix},drive={node},serial={quoted(disk.serial)}"
    return ["-blockdev", options_only(file), "-device", device]


def options_only(values: Mapping[str, object]) -> str:
    return ",".join(f"{key}={quoted(value)}" for key, value in values.items())


def net_options(number: int, net: Tap | UserNet, suffix: str) -> list[str]:
    name = f"net{number}"
    mac = f",mac={net.mac}" if net.mac else ""
    device = f"virtio-net-{suffix},netdev={name}{mac}" + (",romfile=" if suffix == "pci" else "")  # none boots from it
    if isinstance(net, Tap):
        return ["-netdev", f"tap,id={name},fd={net.fd}", "-device", device]
    layout = ""
    if net.subnet:
        layout = f",ipv6=off,net={net.subnet},host={net.gateway},dns={net.resolver},dhcpstart={net.address}"
        layout += ",restrict=on" if net.internal else ""
    forwards = "".join(
        f",hostfwd={protocol}:{address}:{port}-{net.address}:{inside}" for protocol, address, port, inside in net.ports
    )
    return ["-netdev", f"user,id={name}{layout}{forwards}", "-device", device]


def vsock_options(device: VsockDevice, suffix: str) -> list[str]:
    if not device.socket:
        fd = f",vhostfd={device.fd}" if device.fd >= 0 else ""
        return ["-device", f"vhost-vsock-{suffix},guest-cid={device.cid}{fd}"]
    out = ["-chardev", options("socket", {"id": "vsock", "path": device.socket})]
    return [*out, "-device", f"vhost-user-vsock-{suffix},chardev=vsock"]


def tsc_khz(cpuinfo: str) -> int:
    """The frequency of an x86 host from /proc/cpuinfo's text; 0 when it does not tell."""
    for line in cpuinfo.splitlines():
        if line.startswith("cpu MHz"):
            try:
                return int(float(line.partition(":")[2]) * 1000)
            except ValueError:
                return 0
    return 0
