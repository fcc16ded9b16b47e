"""The mount of an engine without root is made outside its namespace: the daemon's side of asking for it. Floor 6.

Only here: the orders between the daemon and the process that put it into its namespace (fdfs/rootless.py), on a
socket the daemon inherits: {"mount": DIR, "options": …} is answered with the descriptor of /dev/fuse, {"unmount": DIR}
with an empty object; an answer with `reason` (and `hint`) is a refusal. One order at a time.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from engine.errors import RuntimeFailure
from engine.runtimes.fusermount import mount_fuse, receive_fd, unmount_fuse

VARIABLE = "DUTCHMAN_OUTSIDE"  # number of the inherited socket
SECONDS = 30.0


class Outside:
    """Asks. RuntimeFailure carries the reason of a refusal."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self._socket.settimeout(SECONDS)

    @staticmethod
    def find() -> Outside | None:
        """The one this process was started with, once; None where the mount is made by this process itself."""
        number = os.environ.pop(VARIABLE, "")
        return Outside(int(number)) if number.isdigit() else None

    def mount(self, place: Path, options: str) -> int:
        return self._ask({"mount": str(place), "options": options})

    def unmount(self, place: Path) -> None:
        self._ask({"unmount": str(place)})

    def _ask(self, order: dict[str, str]) -> int:
        try:
            self._socket.sendall(json.dumps(order).encode())
            data, fd = receive_fd(self._socket)
        except OSError as error:
            raise RuntimeFailure(f"the process outside the namespace does not answer: {error}") from error
        if not data:
            raise RuntimeFailure("the process outside the namespace is gone")
        answer = json.loads(data)
        if "reason" in answer:
            raise RuntimeFailure(answer["reason"], hint=answer.get("hint"))
        return fd


class Orders:
    """Answers, until the daemon's end of the socket closes."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self.mounted: Path | None = None

    def serve(self) -> None:
        while True:
            try:
                data = self._socket.recv(8192)
            except ConnectionResetError:
                return
            if not data:
                return
            answer: dict[str, Any] = {}
            fd = -1
            try:
                fd = self._obey(json.loads(data))
            except RuntimeFailure as error:
                answer = {"reason": error.reason} | ({"hint": error.hint} if error.hint else {})
            except (OSError, ValueError, KeyError) as error:
                answer = {"reason": f"outside the namespace: {error}"}
            sent = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended: the next recv says so
                self._socket.sendmsg([json.dumps(answer).encode()], sent)
            if fd >= 0:
                os.close(fd)

    def _obey(self, order: dict[str, str]) -> int:
        if "mount" in order:
            place = Path(order["mount"])
            fd = mount_fuse(place, order["options"])
            self.mounted = place
            return fd
        unmount_fuse(Path(order["unmount"]))
        self.mounted = None
        return -1

    def leave(self) -> None:
        """Take away the mount of a daemon that has ended without doing so."""
        if self.mounted is not None:
            unmount_fuse(self.mounted)
            self.mounted = None
