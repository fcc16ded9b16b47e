"""A guest's wall clock follows the host's. Floor 2.

Only here: when it is told the time. A machine that was paused, or whose host slept, has the time of before; an emulated
one drifts. What was sent to a machine that then stood still arrives late and wrong; the next look puts it right.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from engine.errors import EngineError
from engine.runtimes.vm.client import AgentClient

PERIOD, LOOK = 30.0, 1.0  # seconds between two tellings, and between two looks whether one is needed at once
SLACK = 100_000_000  # ns that a guest may be off: less is left as it is, for clocks should not jump for nothing

log = logging.getLogger(__name__)


def keep(link: AgentClient, place: Path) -> None:
    """From now on, until the link is lost. `place` has a file `paused` while the machine is."""
    threading.Thread(target=_keep, args=(link, place), name="clock", daemon=True).start()


def _keep(link: AgentClient, place: Path) -> None:
    paused, offset, due = False, _offset(), time.monotonic() + PERIOD
    while not link.lost:
        time.sleep(LOOK)
        before, paused = paused, (place / "paused").exists()
        jumped = abs(_offset() - offset) > SLACK / 1e9  # the host slept, or its clock was set
        if paused or not (before or jumped or time.monotonic() > due):
            continue
        offset, due = _offset(), time.monotonic() + PERIOD
        try:
            link.call("CLOCK", {"ns": time.time_ns(), "slack": SLACK})
        except (EngineError, OSError) as error:  # of a mute guest more is told elsewhere
            log.info("the guest's clock: %s", error)


def _offset() -> float:
    return time.time() - time.monotonic()
