"""Starts QEMU for a machine, whoever it is for: a container, one that stands by, a template. Floor 2.

Only here: which sockets lead to the machine (to its console, and to QEMU's monitor), what the process inherits, and
where its words go: `qemu.log` in the machine's directory, which is its working directory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import RuntimeFailure
from engine.runtimes.vm import qemu

if TYPE_CHECKING:
    from engine.runtimes.vm.transport import Way


class Launched(NamedTuple):
    process: subprocess.Popen[bytes]
    console: socket.socket  # what the guest's kernel says
    watch: socket.socket  # QEMU's monitor


def launch(
    place: Path, values: Mapping[str, Any], way: Way, child: Callable[[], None], *, taps: Sequence[int] = (),
    state: Sequence[int] = (),
) -> Launched:  # fmt: skip
    """`values` of qemu.Machine, but for the sockets and `taps`, which are closed here. `way` is how its agent will be
    reached, `state` what else it inherits; `child` runs in the process before it is QEMU. RuntimeFailure."""
    console, guest_console = socket.socketpair()
    watch, guest_watch = socket.socketpair()
    ends = {"console": guest_console.fileno(), "watch": guest_watch.fileno(), "taps": tuple(taps)}
    machine = qemu.Machine(**{**values, **way.values, **ends})
    (place / machine.qmp).unlink(missing_ok=True)
    try:
        with open(place / "qemu.log", "wb") as words:
            process = subprocess.Popen(
                qemu.command(machine),
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd=place,
                pass_fds=[*way.fds, guest_console.fileno(), guest_watch.fileno(), *taps, *state],
                preexec_fn=child,
            )
    except OSError as error:
        from engine.runtimes.vm.accel import package

        raise RuntimeFailure(f"QEMU cannot be started: {error}", hint=package(machine.arch)) from error
    finally:
        for fd in taps:
            os.close(fd)
        for end in (guest_console, guest_watch):
            end.close()
        way.launched()
    return Launched(process, console, watch)


def pass_over(console: socket.socket) -> None:
    """Nobody wants to know what the guest's kernel says, but it must not have to wait."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while console.recv(4096):
                continue

    threading.Thread(target=read, name="console", daemon=True).start()
