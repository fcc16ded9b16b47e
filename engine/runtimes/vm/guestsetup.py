"""What a guest is asked before it runs a container: its clock, its file systems, the container's process. Floor 2.

Only here: the order of these requests, and where things are in a guest. Pure; whoever has the agent's connection asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from engine.runtimes.vm import translate
from engine.runtimes.vm.protocol import Words, fields

ROOTFS = "/run/rootfs"  # in the guest
MAIN = "main"  # the agent's name of the container's first process


def preparation(plan: Mapping[str, Any], document: Mapping[str, Any]) -> list[tuple[str, Words]]:
    """What a guest is asked before it runs a container: clock, chance, file systems."""
    parts = [fields(number, part[0], part[1]) for number, part in enumerate(plan["parts"], 1)]
    devices = ",".join(f"device=/dev/vda{number}" for number in range(2, len(parts) + 1))
    overlay = f"lowerdir=/run/image,upperdir=/run/disk/upper,workdir=/run/disk/work{plan.get('overlay', '')}"
    mounts = [
        ("/dev/vda1", "/run/image", "erofs", 1, devices),
        # what is never written need not be zeroed: that takes a thread of the guest's kernel, and room on the host
        ("/dev/vdb", "/run/disk", "ext4", 0, "noinit_itable"),
        ("overlay", ROOTFS, "overlay", 0, overlay),
    ]
    if translate.bind_sources(document):
        # directio: what others write to a volume is seen at once (Linux 6.4; before, cache=mmap meant that)
        # access=user: what a user makes is that user's
        options = "trans=virtio,version=9p2000.L,msize=512000,access=user,directio,cache="
        options += "none" if plan.get("consistent") else "mmap"
        kind, options = ("virtiofs", "") if plan.get("virtiofsd") else ("9p", options)
        mounts.append(("shares", translate.SHARES, kind, 0, options))
        for number in plan.get("exports") or ():  # each by itself (sharing.py)
            mounts.append((f"shares{number}", f"{translate.SHARES}/{number}", kind, 0, options))
    requests: list[tuple[str, Words]] = [
        ("CLOCK", {"ns": time.time_ns()}),
        ("ENTROPY", {"seed": os.urandom(256)}),
        ("PARTS", {"disk": "/dev/vda", "part": parts}),
    ]
    for source, target, kind, flags, data in mounts:
        if kind == "overlay":
            requests += [("MKDIR", {"path": f"/run/disk/{name}"}) for name in ("upper", "work")]
        words: Words = {"source": source, "target": target, "type": kind, "flags": flags, "data": data}
        requests.append(("MOUNT", words))
    return requests


def run_words(plan: Mapping[str, Any], document: Mapping[str, Any]) -> Words:
    """Of RUN."""
    sources = translate.bind_sources(document)
    shared = {source: f"{translate.SHARES}/{number}" for number, source in enumerate(sources)}
    words = translate.container_words(document, shared, plan["capabilities"])
    if plan.get("seccomp"):
        words["seccomp"] = bytes.fromhex(plan["seccomp"])
    return {"id": MAIN, "rootfs": ROOTFS, **words}
