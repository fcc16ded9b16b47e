"""A pruned journal through a real mount, with the tools people use: cat, tail, grep, jq, du, and history/."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Daemon, can_mount
from runtimebench import skip_or_fail

POLICY = "events_max: 20"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if (why := can_mount()) is not None:
        skip_or_fail(why)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import engine.retention\nengine.retention.EVERY = 0.2\n")
    root = str(Path(__file__).parents[1])
    with Daemon(tmp_path, env={"PYTHONPATH": f"{tmp_path / 'site'}:{root}"}) as daemon:
        yield daemon


def test_who_reads_a_pruned_journal(daemon: Daemon, tmp_path: Path) -> None:
    daemon.sh("mkdir containers/c; for i in $(seq 60); do echo a=$i > containers/c/config/labels; done")
    whole = daemon.sh("cat events")
    out = (tmp_path / "followed").open("w+b")
    with subprocess.Popen(["tail", "-n", "+1", "-f", "events"], cwd=daemon.mount, stdout=out) as tail:
        try:
            size = int(daemon.sh("stat -c %s events"))
            daemon.until(f"wc -c < {out.name}", str(size), seconds=20)
            daemon.sh(f"echo '{POLICY}' > store/policy.yaml")
            daemon.until(
                "head -n 1 containers/c/events | grep -c seq; cat events | wc -l | sed 's/^20$/pruned/'", "pruned"
            )
            kept = daemon.sh("cat events")
            assert kept.splitlines() == daemon.sh("grep seq events").splitlines()
            seqs = [json.loads(line)["seq"] for line in kept.splitlines()]
            assert seqs == list(range(seqs[0], seqs[0] + 20)) and seqs[0] > 40
            assert int(daemon.sh("stat -c %s events")) >= size
            assert int(daemon.sh("du -B1 events").split()[0]) < size
            assert daemon.sh("tail -n 3 events").splitlines() == kept.splitlines()[-3:]
            assert daemon.sh("tail -c 50 events") == kept[-50:]
            assert daemon.sh("head -n 1 events") == kept.splitlines()[0] + "\n"
            if shutil.which("jq"):
                assert daemon.sh("jq -r 'select(.type==\"containerConfigured\") | .name' events").split()[-1] == "c"
            daemon.sh("echo last=1 > containers/c/config/labels")
            newest = daemon.sh("tail -n 1 events")
            daemon.until(f"tail -n 1 {out.name}", newest, seconds=20)
        finally:
            tail.terminate()
    out.seek(0)
    followed = out.read().decode().splitlines()
    assert followed[: len(whole.splitlines())] == whole.splitlines()
    numbers = [json.loads(line)["seq"] for line in followed]
    assert numbers == list(range(1, len(numbers) + 1))
    history = daemon.sh("ls -v containers/c/history").split()
    assert history and int(history[0]) >= seqs[0] - 1
    last = history[-1]
    assert "last" in daemon.sh(f"cat containers/c/history/{last}/config.yaml")
    assert daemon.sh(f"cat containers/c/history/{last}/state") == "created\n"
    assert json.loads(daemon.sh(f"cat containers/c/history/{last}/event"))["seq"] == int(last)
    daemon.refused("ls containers/c/history/1", "No such file")
    daemon.refused("ls containers/c/history/007", "No such file")
