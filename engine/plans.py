"""A plan that is carried out only by the hash under which it was read. Floor 1, pure.

Only here: the hash, and what is said of one that is missing or no longer the plan's.
"""

from __future__ import annotations

import hashlib
import re

from engine.errors import Busy, InvalidArgument


def hash_of(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def check(given: str, now: str, where: str, verb: str = "prune") -> None:
    """Whether `given`, what was written behind `verb`, is the hash `now` of the plan at `where`."""
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        raise InvalidArgument(
            f"{verb} takes the hash of the plan: read {where}", at=given[:80] or verb,
            hint=f"cat {where}; its last line is what to write",
        )  # fmt: skip
    if given != now:
        raise Busy("the plan is not what it was: nothing was deleted", at=given[:12], hint=f"read {where} again")
