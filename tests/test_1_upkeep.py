"""Restart policies and health checks as pure rules, and how they are written in a config."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import parse_config
from engine.errors import InvalidArgument
from engine.fields import field_text, with_field
from engine.model import ImageRuntime
from engine.upkeep import Check, Health, Policy, When, after_probe, check_of, next_delay, next_probe, parse_policy

S, H, U = Health.STARTING, Health.HEALTHY, Health.UNHEALTHY


def test_back_off_doubles_from_100_ms_to_a_minute_and_begins_anew_after_a_good_run() -> None:
    delays, delay = [], 0.0
    for _ in range(12):
        delay = next_delay(delay, 0.5)
        delays.append(round(delay, 3))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0, 60.0]
    assert next_delay(60.0, 9.9) == 60.0 and next_delay(60.0, 10.0) == 0.1


@pytest.mark.parametrize(
    ("text", "exit_code", "attempts", "again"),
    [
        ("no", 1, 0, False),
        ("", 1, 0, False),
        ("always", 0, 1000, True),
        ("unless-stopped", 0, 3, True),
        ("on-failure", 0, 0, False),
        ("on-failure", 1, 1000, True),
        ("on-failure:2", 255, 1, True),
        ("on-failure:2", 255, 2, False),
        ("on-failure:0", 1, 50, True),
    ],
)
def test_which_end_is_followed_by_another_run(text: str, exit_code: int, attempts: int, again: bool) -> None:
    assert parse_policy(text).wanted(exit_code, attempts) is again


@pytest.mark.parametrize(
    ("when", "person", "up"),
    [
        (When.ALWAYS, True, True),
        (When.ALWAYS, False, True),
        (When.UNLESS_STOPPED, True, False),
        (When.UNLESS_STOPPED, False, True),
        (When.ON_FAILURE, False, False),
        (When.NO, False, False),
    ],
)
def test_what_starts_with_the_engine(when: When, person: bool, up: bool) -> None:
    assert Policy(when).at_start(person) is up


@pytest.mark.parametrize("text", ["sometimes", "on-failure:", "on-failure:-1", "always:3", "no:1", "on-failure:x"])
def test_a_bad_policy_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"restart: .*expected"):
        parse_config(f"restart: {text!r}")


def test_yaml_takes_no_for_a_truth_value_and_a_policy_not() -> None:
    assert parse_config("restart: no").restart == "no"


@pytest.mark.parametrize(
    ("health", "streak", "code", "since", "then"),
    [
        (S, 0, 0, 0, (H, 0)),
        (S, 0, 1, 5, (S, 0)),  # in the start period it does not count
        (S, 0, 1, 10, (S, 1)),  # at its end it does
        (S, 2, 1, 10, (U, 3)),
        (S, 2, -1, 10, (U, 3)),  # killed for its deadline
        (H, 0, 1, 5, (H, 1)),  # one success has ended the start period
        (H, 2, 1, 5, (U, 3)),
        (H, 2, 0, 50, (H, 0)),
        (U, 3, 1, 50, (U, 4)),
        (U, 9, 0, 50, (H, 0)),
    ],
)
def test_health_after_a_probe(health: Health, streak: int, code: int, since: float, then: tuple[Health, int]) -> None:
    check = Check(("true",), start_period=10, retries=3)
    assert after_probe(health, streak, check, code, since) == then


def test_probes_are_more_frequent_while_it_starts() -> None:
    check = Check(("true",), interval=30, start_period=10, start_interval=2)
    assert next_probe(S, check, 3) == 2
    assert next_probe(S, check, 10) == 30
    assert next_probe(H, check, 3) == 30


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(1, 5))
def test_unhealthy_is_exactly_as_many_failures_in_a_row(codes: list[int], retries: int) -> None:
    check = Check(("true",), retries=retries)
    health, streak = S, 0
    for number, code in enumerate(codes):
        health, streak = after_probe(health, streak, check, code, 0)
        row = next((n for n, before in enumerate(reversed(codes[: number + 1])) if before == 0), number + 1)
        assert streak == row and (health is U) == (row >= retries)


IMAGE = ImageRuntime.model_validate(
    {"Healthcheck": {"Test": ["CMD", "ping"], "Interval": 5_000_000_000, "Timeout": 1_000_000_000, "Retries": 7}}
)
NOTHING = ImageRuntime.model_validate({})


def check(text: str, image: ImageRuntime = IMAGE) -> Check | None:
    return check_of(parse_config(f"healthcheck: {text}").healthcheck, image)


def test_the_config_wins_over_the_image_field_by_field() -> None:
    assert check("null") == Check(("ping",), 5.0, 1.0, 0.0, 5.0, 7)
    assert check("{interval: 2m, retries: 1}") == Check(("ping",), 120.0, 1.0, 0.0, 5.0, 1)
    assert check("{test: curl -f http://localhost, interval: 0}") == Check(
        ("/bin/sh", "-c", "curl -f http://localhost"), 5.0, 1.0, 0.0, 5.0, 7
    )
    assert check("{test: [CMD, a, b]}", NOTHING) == Check(("a", "b"), 30.0, 30.0, 0.0, 5.0, 3)


@pytest.mark.parametrize("text", ["{disable: true}", "{test: [NONE]}", "{test: NONE, disable: true}"])
def test_no_check_at_all(text: str) -> None:
    assert check(text) is None
    assert check("null", NOTHING) is None


def test_a_shell_of_the_image_and_an_image_that_makes_no_sense() -> None:
    shell = ImageRuntime.model_validate({"Shell": ["/bin/ash", "-ec"], "Healthcheck": {"Test": ["CMD-SHELL", "x y"]}})
    assert check("null", shell) == Check(("/bin/ash", "-ec", "x y"))
    odd = ImageRuntime.model_validate({"Healthcheck": {"Test": ["WHAT"], "Interval": "soon", "Retries": -2}})
    assert check("null", odd) is None
    assert check("{test: x}", odd) == Check(("/bin/sh", "-c", "x"))


@pytest.mark.parametrize(
    "text",
    [
        "{test: [curl, x]}",
        "{test: [CMD]}",
        "{test: [CMD-SHELL, a, b]}",
        "{test: [NONE, x]}",
        "{interval: soon}",
        "7",
        "[a]",
        "{interval: 0.0001}",
        "{retries: -1}",
        "{tset: x}",
        "{test: [CMD, ['a']]}",
    ],
)
def test_a_bad_check_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="healthcheck"):
        parse_config(f"healthcheck: {text}")


def test_the_field_reads_back_as_written() -> None:
    config = parse_config("healthcheck: {test: [CMD, wget, '-q', 'http://x'], interval: 1m30s, retries: 2}")
    text = field_text("healthcheck", config)
    assert "interval: 90.0" in text and "timeout" not in text
    assert with_field(config, "healthcheck", text) == config
    assert with_field(config, "healthcheck", "").healthcheck is None
