"""For every test: the CI rule about skips, and nothing left behind: no mount, process or directory of networks.

In CI (CI=true) a skipped test is a failed session, with its reason: a check that did not run has not passed.
Helpers: mounting.py (a live mount), registry.py (a real registry); fixtures come from `fixtures/` beside the project.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from leftbehind import MARK, left_behind, mounts_below

from engine import host, hostmounts

# containers of tests have loopback alone unless a test asks for networks: the host's stay as they are
os.environ.setdefault("DUTCHMAN_DEFAULT_NETWORK", "none")
# no machine stands by but in the tests of that: each takes a second of CPU to make
os.environ.setdefault("DUTCHMAN_STANDBY", "0")
# what has been compiled is kept, as for a person: each of the hundreds of programs started here would compile us anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# whatever is started here, and whatever that starts, has this in its environment: what it is left of is known by it
os.environ[MARK[0]] = MARK[1]

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else all we start ignores it too

CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
SKIPPED: list[str] = []
LEFT: list[str] = []  # mounts, processes and directories that outlived their tests

# how long an example takes is the machine's affair; in CI hypothesis' own profile says so already
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")

# files that take long, the longest first: one that began last would run on alone
LONG = (
    *("7_faults", "7_cli", "4_engine_killed", "4_hostile", "6_vm_run", "6_vm_shares", "7_networks", "7_vm_networks"),
    *("7_exec", "6_mount", "2_runtimes", "7_rootless", "7_input", "2_vm_templates", "6_vm_files", "1_logs", "6_binds"),
    *("7_vm_rootless", "6_kernels", "2_runtimes_oci", "1_layers", "2_sessions", "2_runtimes_vm", "7_readme", "7_spec"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of xdist, which begins with files of many tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {f"test_{name}": number for number, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))  # within a file they stay in order


def skipped(node: str, why: object) -> None:
    SKIPPED.append(f"{node}: {why[2] if isinstance(why, tuple) else why}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped(report.nodeid, report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped(report.nodeid, report.longrepr)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (LEFT or (CI and SKIPPED)) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CI and SKIPPED:
        terminalreporter.section("skipped, which fails here (CI is set)", red=True)
        for line in SKIPPED:
            terminalreporter.line(line)
    if LEFT:
        terminalreporter.section("left behind, which fails", red=True)
        for line in LEFT:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def rootfs_released(request: pytest.FixtureRequest) -> Iterator[None]:
    """Root filesystems outlive an engine on purpose, as its containers do; those of a test go with it.

    Only these: any other mount that a test leaves is a failure of the session.
    """
    yield
    place = request.node.funcargs.get("tmp_path") if hasattr(request.node, "funcargs") else None
    if place is not None and host.LINUX and host.is_root():
        for point, kind in reversed(mounts_below(place)):
            if kind in ("overlay", "erofs"):
                hostmounts.unmount(Path(point))


@pytest.fixture(autouse=True, scope="session")
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A session that leaves something behind has failed, though each of its tests has passed."""
    yield
    if host.LINUX and host.is_root():
        LEFT.extend(left_behind(tmp_path_factory.getbasetemp()))
