"""A machine without conmon, as on macOS: what is killed takes it down, nothing is left. With DUTCHMAN_SLOW_TESTS=1; the
contract of drivers is put to it in test_2_runtimes.py and test_2_sessions.py, the monitor alone in test_2_monitor.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from runtimebench import SLOW, Bench, bench_of

from engine.runtimes import monitor, pids
from engine.runtimes.conmon import Facts


def started(bench: Bench) -> tuple[Facts, int]:
    """What is known of a container, and the pid of its QEMU."""
    run = bench.place / "containers" / bench.run("sleep") / "run"
    facts = Facts.load(run / "facts.json")
    assert facts is not None and any(b"dutchman-monitor" in word for word in pids.words(facts.conmon))
    assert pids.parent(facts.pid) == facts.conmon
    return facts, int((run / "vm" / "qemu.pid").read_text())


if SLOW:

    def test_who_owns_a_machine_takes_it_along(tmp_path: Path) -> None:
        bench = bench_of("own", tmp_path)
        try:
            facts, qemu = started(bench)
            os.kill(facts.pid, signal.SIGKILL)
            bench.until(lambda: pids.start_time(qemu) is None)
            assert bench.end().exit_code == 137
            facts, qemu = started(bench)
            os.kill(facts.conmon, signal.SIGKILL)
            bench.until(lambda: pids.start_time(qemu) is None and pids.start_time(facts.pid) is None)
            end = bench.end()
            assert end.exit_code in (137, 255) and "was killed" in end.reason
        finally:
            bench.close()


def test_its_runtime_speaks_the_same_language() -> None:
    """shim.py reads what monitor.py says."""
    from engine.runtimes.vm import shim

    options, words = shim.parse(["--root", "/r", "exec", "--process", "/p", "--detach", "--pid-file", "/f", "id"])
    assert words == ["exec", "id"] and options["--process"] == "/p" and "--detach" in options
    assert shim.STAY == monitor.STAY
