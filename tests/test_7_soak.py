"""The soak of tools/soak, small: nothing lost, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys

from dutchman import needs_oci
from mounting import ROOT


def test_a_small_soak_finds_nothing() -> None:
    needs_oci()
    numbers = {"many": 4, "stopped": 4, "followers": 8, "rate": 5, "seconds": 0.3, "cycles": 8, "shells": 2}
    command = [sys.executable, str(ROOT / "tools/soak/soak.py")]
    for name, number in numbers.items():
        command += [f"--{name}", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["failures"] == [] and last["events"] > 50
