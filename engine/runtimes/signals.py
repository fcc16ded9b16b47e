"""Numbers of signals: Linux's, which what runs in a container has wherever the engine is, and this host's. Floor 2.

Sources: signal(7), x86 and ARM; macOS's numbers are those of Python's `signal`.
"""

from __future__ import annotations

import signal

from engine import host
from engine.errors import InvalidArgument

RTMIN, RTMAX = 34, 64
_NAMES = """HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU
    URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"""
SIGNALS = {name: number for number, name in enumerate(_NAMES.split(), 1)} | {"IOT": 6, "CLD": 17, "POLL": 29}


def of_host(number: int) -> int:
    """This host's number of Linux's signal `number`. InvalidArgument where there is none."""
    if host.LINUX:
        return number
    for name, known in SIGNALS.items():
        if known == number and (found := getattr(signal, f"SIG{name}", None)) is not None:
            return int(found)
    raise InvalidArgument(f"signal: {number} of Linux is none of this host's, which cannot pass it on", at=str(number))


def of_linux(number: int) -> int:
    """Linux's number of this host's signal; 0 where there is none."""
    if host.LINUX:
        return number
    return next((known for name, known in SIGNALS.items() if getattr(signal, f"SIG{name}", None) == number), 0)
