"""What the session's own check for things left behind can see (leftbehind.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dutchman import wait_for
from leftbehind import processes_at, processes_of_session

from engine import host

ORPHAN = """import os, sys
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()"""


@pytest.mark.skipif(not host.LINUX, reason="needs /proc")
def test_an_orphan_whose_command_names_no_place_is_seen(tmp_path: Path) -> None:
    """As a QEMU with relative paths, whose parent was killed, or what keeps a machine that stands by."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        orphan = f"process {process.stdout.readline().strip()}:"
        process.wait()
        assert any(line.startswith(orphan) for line in processes_of_session())
        assert not any(line.startswith(orphan) for line in processes_at(f"{tmp_path}/"))
    wait_for(lambda: not any(line.startswith(orphan) for line in processes_of_session()), 30)
