"""In CI a check that did not run has not passed: conftest.py turns a session with a skipped test red."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SKIPPING = "import pytest\ndef test_a():\n    pass\ndef test_b():\n    pytest.skip('no such tool')\n"


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_skip_fails_the_session_in_ci_with_its_reason(tmp_path: Path, ci: str, code: int) -> None:
    (tmp_path / "test_x.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = os.environ | {"CI": ci, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--basetemp"]
    done = subprocess.run([*command, str(tmp_path / "base")], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("test_b: Skipped: no such tool" in done.stdout) == bool(ci)
