"""Ends QEMU when its owner has ended, in whatever way, where the kernel does not do so by itself (macOS). Floor 2.

Only here: a shell that reads from its owner: the pid of QEMU, then a line when QEMU has ended in good order. That its
input ends before that line means that the owner was killed. It knows the pid before QEMU is executed.
"""

from __future__ import annotations

import os
import subprocess

SCRIPT = 'read -r pid || exit; read -r _ && exit; kill -9 "$pid"'


class Guard:
    """One, which waits. To be ended by `done`, or by the end of this process."""

    def __init__(self) -> None:
        reading, self._line = os.pipe()
        try:
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", SCRIPT, "dutchman-guard"],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(reading)

    def watch(self) -> None:
        """Called by the process that is to be ended."""
        os.write(self._line, b"%d\n" % os.getpid())

    def done(self) -> None:
        """That process has been waited for."""
        os.write(self._line, b"done\n")
        os.close(self._line)
        self._shell.wait()
