"""The guest's agent without a guest: process 1 of namespaces of its own, a socket for its port. Needs root.

What sets machine-wide state (CLOCK, SYSCTL, ENTROPY) must not be called here: the kernel is the host's.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.runtimes.vm import agentbuild, driver, protocol, verbs
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.streams import Stream

MOUNTS = (
    ("proc", "/proc", "proc", "nosuid,noexec,nodev"),
    ("tmpfs", "/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("devpts", "/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("sysfs", "/sys", "sysfs", "nosuid,noexec,nodev,ro"),
)
CACHE = driver.agents()
PATH = "PATH=/bin"


def busybox(root: Path) -> Path:
    """A root filesystem with busybox for every command, also as /bin/COMMAND."""
    (root / "bin").mkdir(parents=True)
    for name in ("proc", "sys", "dev", "tmp", "etc"):
        (root / name).mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "cat", "ls", "id", "ps", "sleep", "grep", "stty", "tty", "mkdir", "head", "wc", "nc", "dd"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return root


class Agent:
    def __init__(self, client: AgentClient, rootfs: Path, process: subprocess.Popen[bytes]) -> None:
        self.client, self.rootfs, self.process = client, rootfs, process

    def run(self, argv: list[str], **words: Any) -> Stream:
        """Set up and wait for START."""
        mounts = []
        for source, target, kind, options in MOUNTS:
            flags, data = verbs.mount_flags(options.split(","))
            mounts.append(protocol.fields(source, target, kind, flags, data))
        mounts += words.pop("mount", [])
        known = {"id": "main", "rootfs": self.rootfs, "argv": argv, "env": [PATH], "mount": mounts, "hostname": "box"}
        return self.client.open("RUN", {**known, **words}, deadline=60)[0]

    def start(self, argv: list[str], **words: Any) -> Stream:
        stream = self.run(argv, **words)
        self.client.call("START", {"id": "main"}, deadline=60)
        return stream

    def exec(self, id: str, argv: list[str], **words: Any) -> Stream:
        return self.client.open("EXEC", {"id": id, "in": "main", "argv": argv, "env": [PATH], **words}, deadline=60)[0]


def spawn(channel: socket.socket) -> subprocess.Popen[bytes]:
    """An agent whose port is `channel`, which is closed here; it ends when the other side does."""
    argv = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--ipc", "--uts", "--net", "--cgroup"]
    argv += [str(agentbuild.build(os.uname().machine, CACHE)), str(channel.fileno())]
    with channel:
        return subprocess.Popen(argv, pass_fds=[channel.fileno()], stdin=subprocess.DEVNULL)


@contextmanager
def agent(place: Path) -> Iterator[Agent]:
    rootfs = busybox(place / "rootfs")
    ours, theirs = socket.socketpair()
    process = spawn(theirs)
    try:
        client = AgentClient(ours, deadline=60)
        try:
            yield Agent(client, rootfs, process)
        finally:
            client.close()  # the agent ends with its channel
        process.wait(60)
    finally:
        process.kill()
        process.wait()
