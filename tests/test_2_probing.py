"""Probes inside real containers: whose they are, what is kept of their output, and what their deadline ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import eventually
from runtimebench import Bench, no_oci, skip_or_fail

from engine.errors import DeadlineExceeded
from engine.runtimes.probing import descendants
from engine.upkeep import MAX_OUTPUT


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    if (why := no_oci()) is not None:
        skip_or_fail(why)
    bench = Bench("oci", tmp_path)
    yield bench
    bench.close()


def ask(bench: Bench, id: str, script: str, deadline: float = 20) -> tuple[int, bytes]:
    return bench.runtime.probe_exec(id, ("/bin/sh", "-c", script), deadline=deadline)


def test_it_runs_as_the_container_does(bench: Bench) -> None:
    id = bench.run("sleep", user="web", env={"GREETING": "ahoy"}, workdir="/etc")
    code, output = ask(bench, id, 'id -u; id -g; echo "$GREETING"; cat group | head -n 1; echo $$')
    lines = output.decode().split("\n")
    assert code == 0 and lines[:4] == ["33", "34", "ahoy", "root:x:0:"]
    assert int(lines[4]) < 1000  # in the container's pid namespace


def test_the_beginning_of_its_output_is_kept_and_the_rest_holds_up_nothing(bench: Bench) -> None:
    id = bench.run("sleep")
    code, output = ask(bench, id, "yes 0123456789 | head -n 200000; exit 4")
    assert code == 4 and len(output) == MAX_OUTPUT and output.startswith(b"0123456789\n")
    with pytest.raises(DeadlineExceeded):
        ask(bench, id, "yes", 0.7)


def test_what_it_leaves_behind_is_waited_for_only_while_it_can_print(bench: Bench) -> None:
    id = bench.run("sleep")
    assert ask(bench, id, "sleep 1000 > /dev/null 2>&1 & exit 5", 60)[0] == 5
    with pytest.raises(DeadlineExceeded):
        ask(bench, id, "sleep 1000 & exit 0", 1.0)


def test_its_deadline_ends_it_with_all_its_children(bench: Bench) -> None:
    id = bench.run("sleep")
    before = marked()
    with pytest.raises(DeadlineExceeded):
        ask(bench, id, "sleep 98765 & (sh -c 'sleep 98765; :') & sleep 98765", 1.5)
    assert marked() == before == []
    assert not descendants(os.getpid()) or all("exec" not in line for line in commands(descendants(os.getpid())))
    assert list((bench.place / "containers" / id / "run").glob("probe-*")) == []
    assert ask(bench, id, "exit 0")[0] == 0


def test_what_a_killed_daemon_was_asking_is_ended_by_the_next(bench: Bench) -> None:
    id = bench.run("sleep")
    script = f"""
import sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from engine.runtimes.oci import OciRuntime
place = Path({str(bench.place)!r})
driver = OciRuntime(place / "containers", state=place / "state")
driver.probe_exec({id!r}, ["sh", "-c", "sleep 98765 & sleep 98765"], deadline=600)
"""
    daemon = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    run = bench.place / "containers" / id / "run"
    try:
        eventually(lambda: len(marked()) == 2 or daemon.poll() is not None, 60)
    finally:
        daemon.kill()
        _, said = daemon.communicate()
    assert len(marked()) == 2 and len(list(run.glob("probe-*"))) == 1, said
    assert ask(bench, id, "exit 3")[0] == 3
    eventually(lambda: not marked(), 60)
    assert list(run.glob("probe-*")) == []


def commands(pids: list[int]) -> list[str]:
    out = []
    for pid in pids:
        try:
            out.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return out


def marked() -> list[str]:
    """Processes of the host that run the sleep of the tests above."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [line for line in commands(pids) if line.startswith("sleep 98765")]
