"""Whether a container is well and when it starts again: the words of the config, and what follows from them. Floor 0.

Only here: the `healthcheck` and `restart` fields, and both as pure tables of what comes next. The semantics are
Docker's (moby daemon/health.go and restartmanager/restartmanager.go). What probes and starts is in health.py and
restarts.py. Immutable; no I/O, no clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from engine.model import Frozen, ImageRuntime, Seconds

# --- restart ----------------------------------------------------------------------------------------------------

FIRST_DELAY, LAST_DELAY, FACTOR = 0.1, 60.0, 2.0  # seconds of back-off
GOOD_RUN = 10.0  # seconds of running after which the back-off begins anew


class When(StrEnum):
    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"
    UNLESS_STOPPED = "unless-stopped"


@dataclass(frozen=True, slots=True)
class Policy:
    when: When
    most: int = 0  # restarts of `on-failure`; 0 is no limit

    def wanted(self, exit_code: int | None, attempts: int) -> bool:
        """Whether a run that nobody stopped is followed by another; `attempts` were made since a person started it."""
        if self.when is When.ON_FAILURE:
            return exit_code != 0 and (self.most == 0 or attempts < self.most)
        return self.when is not When.NO

    def at_start(self, stopped_by_person: bool) -> bool:
        """Whether one that is stopped runs again when the engine comes up."""
        return self.when is When.ALWAYS or (self.when is When.UNLESS_STOPPED and not stopped_by_person)


def parse_policy(text: str) -> Policy:
    """`no`, `on-failure[:n]`, `always` or `unless-stopped`; empty is `no`. ValueError says what is expected."""
    match = re.fullmatch(r"(no|always|unless-stopped)|on-failure(?::(\d{1,9}))?", text or "no")
    if not match:
        raise ValueError(f"no, on-failure[:n], always or unless-stopped expected, not {text[:80]!r}")
    return Policy(When(match[1])) if match[1] else Policy(When.ON_FAILURE, int(match[2] or 0))


def restart_text(value: Any) -> Any:
    """YAML reads `no` as false."""
    value = "no" if value is False or value is None or value == "" else value
    if not isinstance(value, str):
        raise ValueError("no, on-failure[:n], always or unless-stopped expected")
    parse_policy(value)
    return value


Restart = Annotated[str, BeforeValidator(restart_text)]


def next_delay(before: float, ran: float) -> float:
    """Seconds to wait after a run of `ran` seconds; `before` is the wait that preceded it, 0 for none."""
    if before <= 0 or ran >= GOOD_RUN:
        return FIRST_DELAY
    return min(before * FACTOR, LAST_DELAY)


# --- health -----------------------------------------------------------------------------------------------------

INTERVAL, TIMEOUT, START_INTERVAL, RETRIES = 30.0, 30.0, 5.0, 3  # where neither config nor image says
MAX_OUTPUT = 4096  # bytes kept of what a probe prints
KEPT_PROBES = 10
TIMED_OUT = -1  # exit code of a probe that was killed for its deadline, as Docker shows it


def _test(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return ("CMD-SHELL", value) if value else ()
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ValueError("a command, or a list that begins with NONE, CMD or CMD-SHELL, is expected")
    kind, rest = (value[0], value[1:]) if value else ("", [])
    fits = {
        "": not rest,
        "NONE": not rest,
        "CMD": bool(rest and rest[0]),
        "CMD-SHELL": len(rest) == 1 and bool(rest[0]),
    }
    if not fits.get(kind, False):
        raise ValueError("a list is [NONE], [CMD, program, …] or [CMD-SHELL, command]")
    return tuple(value)


class HealthSpec(Frozen):
    """The `healthcheck` field. What is not set here (None, or 0 as in Docker) is the image's, else the default."""

    test: Annotated[tuple[str, ...], BeforeValidator(_test)] = ()
    interval: Seconds = Field(None, description="between two probes; default 30s")
    timeout: Seconds = Field(None, description="after which a probe is killed and has failed; default 30s")
    start_period: Seconds = Field(None, description="in which failures do not count; default none")
    start_interval: Seconds = Field(None, description="between two probes in the start period; default 5s")
    retries: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(None, description="failures in a row; default 3")
    disable: bool = False

    @field_validator("interval", "timeout", "start_period", "start_interval")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value and value < 0.001:
            raise ValueError("at least 1ms")
        return value


@dataclass(frozen=True, slots=True)
class Check:
    """What is really done; seconds."""

    argv: tuple[str, ...]
    interval: float = INTERVAL
    timeout: float = TIMEOUT
    start_period: float = 0.0
    start_interval: float = START_INTERVAL
    retries: int = RETRIES


def check_of(config: HealthSpec | None, image: ImageRuntime) -> Check | None:
    """The config's wishes over the image's Healthcheck (nanoseconds; Docker image spec v1.2); None for no check."""
    own = config or HealthSpec()  # type: ignore[call-arg]
    theirs = image.healthcheck or {}
    test: Any = own.test or theirs.get("Test") or ()
    try:
        test = _test(test)
    except ValueError:
        test = ()
    if own.disable or not test or test[0] == "NONE":
        return None

    def seconds(mine: float | None, key: str, default: float) -> float:
        value = theirs.get(key)
        given = value / 1e9 if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0.0
        return mine or given or default

    retries = theirs.get("Retries")
    shell = tuple(image.shell or ("/bin/sh", "-c"))
    return Check(
        argv=tuple(test[1:]) if test[0] == "CMD" else (*shell, test[1]),
        interval=seconds(own.interval, "Interval", INTERVAL),
        timeout=seconds(own.timeout, "Timeout", TIMEOUT),
        start_period=seconds(own.start_period, "StartPeriod", 0.0),
        start_interval=seconds(own.start_interval, "StartInterval", START_INTERVAL),
        retries=own.retries or (retries if isinstance(retries, int) and retries > 0 else RETRIES),
    )


class Health(StrEnum):
    NONE = "none"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


def after_probe(health: Health, streak: int, check: Check, exit_code: int, since_start: float) -> tuple[Health, int]:
    """State and failures in a row after a probe that began `since_start` seconds after the container did."""
    if exit_code == 0:
        return Health.HEALTHY, 0
    if health is Health.STARTING and since_start < check.start_period:
        return health, streak
    streak += 1
    return (Health.UNHEALTHY if streak >= check.retries else health), streak


def next_probe(health: Health, check: Check, since_start: float) -> float:
    """Seconds until the next probe."""
    early = health is Health.STARTING and since_start < check.start_period
    return check.start_interval if early else check.interval
