"""What speaks against an accelerator once a real guest runs on it. Floor 2.

Only here: QEMU's own word on a machine that has stopped, and which ends of QEMU are its accelerator's fault. A
para-virtual /dev/kvm may pass the probe (accel.py) and then have QEMU abort, stop the machine with `internal-error`, or
run the guest so slowly that its agent never answers. Source: QEMU's docs/interop/qmp-spec.rst, qapi/run-state.json.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0  # for the agent of a guest that runs at the speed of its CPU
ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)
BROKEN = "internal-error"  # a status of QEMU: what the accelerator did cannot be gone on from
MAX_LINE = 1 << 16  # bytes of one answer of QEMU


def follow(connection: socket.socket, broken: Callable[[str], None], first: bytes = b"") -> None:
    """On a thread: `broken` is called, once, with QEMU's word for it when the machine has stopped for good.

    `connection` is a monitor of QEMU's own, which is told `first` to begin with; the thread ends with QEMU.
    """

    def work() -> None:
        with suppress(OSError), connection, connection.makefile("rb") as lines:
            connection.sendall(b'{"execute": "qmp_capabilities"}\n' + first)
            while line := lines.readline(MAX_LINE):
                try:
                    said = json.loads(line)
                    status = said["return"]["status"] if said.get("id") == "status" else ""
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("QEMU said %r: %s", line[:200], error)
                    continue
                if said.get("event") == "STOP":  # by pause, too: it is asked what for
                    connection.sendall(b'{"execute": "query-status", "id": "status"}\n')
                if status == BROKEN:
                    broken(status)
                    return

    threading.Thread(target=work, name="qmp", daemon=True).start()


def of_accelerator(accelerator: str, status: int | None, said: str, broken: str) -> str:
    """Why the accelerator is to blame for a machine whose agent has not answered; empty when it is not.

    `status` is QEMU's exit status (None: it still ran), `said` what it printed, `broken` its own word for it.
    """
    if broken:
        return f"QEMU stopped it: {broken}"
    if status is None:
        return f"the guest's agent did not answer within {HELLO_SECONDS:g} s"
    words = " ".join(said.split())[-200:]
    if status in ABORTED:
        return f"QEMU aborted: {words}" if words else "QEMU aborted"
    if status and accelerator in said.lower():
        return f"QEMU ended with status {status}: {words}"
    return ""
