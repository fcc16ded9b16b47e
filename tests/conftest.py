"""For every test: the CI rule about skips, and nothing mounted left behind.

In CI (CI=true) a skipped test is a failed session, with its reason: a check that did not run has not passed.
Helpers: mounting.py (a live mount), registry.py (a real registry); fixtures come from `fixtures/` beside the project.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from engine import host

# containers of tests have loopback alone unless a test asks for networks: the host's stay as they are
os.environ.setdefault("DUTCHMAN_DEFAULT_NETWORK", "none")

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else all we start ignores it too

CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
SKIPPED: list[str] = []

# how long an example takes is the machine's affair; in CI hypothesis' own profile says so already
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")


def skipped(node: str, why: object) -> None:
    SKIPPED.append(f"{node}: {why[2] if isinstance(why, tuple) else why}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped(report.nodeid, report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped(report.nodeid, report.longrepr)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if CI and SKIPPED and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CI and SKIPPED:
        terminalreporter.section("skipped, which fails here (CI is set)", red=True)
        for line in SKIPPED:
            terminalreporter.line(line)


@pytest.fixture(autouse=True, scope="session")
def no_mount_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a failed test left mounted below pytest's directory is taken down, or it would outlive the session."""
    yield
    if host.LINUX and host.is_root():
        base = f"{tmp_path_factory.getbasetemp()}/"
        while points := [point for point, _, _ in host.mounts() if point.startswith(base)]:
            host.unmount(Path(min(points, key=len)))  # what is mounted below goes with it
