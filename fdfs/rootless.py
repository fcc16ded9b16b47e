"""Without root: puts the daemon into its user's namespace, and stays outside for what must be done there. Floor 7.

`python -m fdfs.rootless ARGUMENTS OF fdfs.daemon`. It makes the mount when the daemon asks for it (fdfs/outside.py),
hands signals on, and when the daemon has ended, in whatever way, takes its mount away and ends the namespaces unless
containers still run in them. When this process is killed the daemon goes on; `dutchman down` unmounts then.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import Any

from engine import host, userids
from engine.errors import EngineError
from engine.runtimes import delegation, rootless
from fdfs import outside

log = logging.getLogger(__name__)


def environment(**more: str) -> dict[str, str]:
    """The environment of a program that is to run as root of this user's namespace."""
    return os.environ | {userids.VARIABLE: f"{os.getuid()}:{os.getgid()}"} | more


def main(arguments: list[str]) -> int:
    directory = host.runtime_dir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keep = [theirs.fileno()]
    ready = arguments.index("--ready-fd") + 1 if "--ready-fd" in arguments else None
    if ready is not None:
        keep.append(int(arguments[ready]))
    command = [sys.executable, "-m", "fdfs.daemon", *arguments]
    delegation.enter(rootless.holder(directory))
    try:
        daemon = rootless.spawn(directory, command, environment(**{outside.VARIABLE: str(theirs.fileno())}), keep)
    except (EngineError, OSError) as error:
        hint = getattr(error, "hint", None)
        text = f"{error}\n" + (f"hint: {hint}\n" if hint else "")
        if ready is None:
            print(text, end="", file=sys.stderr)
        else:
            os.write(keep[1], text.encode())
        return 1
    for fd in keep[1:]:
        os.close(fd)  # whoever waits for the daemon's word must see it end
    theirs.close()

    def hand_on(number: int, _: Any) -> None:
        try:
            os.kill(daemon, number)
        except ProcessLookupError:
            pass  # it has ended, which is what was wanted

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hand_on)
    orders = outside.Orders(ours)
    orders.serve()
    code = rootless.wait(daemon)
    try:
        orders.leave()
    except EngineError as error:
        log.warning("%s", error)
    rootless.release(directory)
    return code


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s outside %(message)s")
    sys.exit(main(sys.argv[1:]))
