"""kernels/ through a real mount and the command line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import ROOT, Daemon, can_mount
from test_2_kernels import vmlinux


def dutchman(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "fdfs", *words[:2], "--mount", str(daemon.mount), *words[2:]]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_kernels_are_imported_chosen_used_and_removed_through_files(tmp_path: Path) -> None:
    if reason := can_mount():
        pytest.skip(reason)
    for version in ("6.9.1", "6.10.0"):
        (tmp_path / version).write_bytes(vmlinux(version))
    (tmp_path / "text").write_text("no kernel\n")
    with Daemon(tmp_path, runtime="fake") as daemon:
        top = daemon.mount / "kernels"
        assert os.listdir(top) == ["ctl", "error"]
        first = dutchman(daemon, "kernels", "import", "--arch=x86_64", str(tmp_path / "6.9.1"))
        assert first.stdout.strip() == "6.9.1", first.stderr
        dutchman(daemon, "kernels", "import", "--arch=x86_64", str(tmp_path / "6.10.0"), "new")
        assert (top / "6.9.1" / "vmlinux").read_bytes() == vmlinux("6.9.1")
        assert (top / "new" / "version").read_text() == "6.10.0\n" and os.readlink(top / "default") == "new"
        (top / "ctl").write_text("default 6.9.1\n")
        assert os.readlink(top / "default") == "6.9.1"

        refused = dutchman(daemon, "kernels", "import", str(tmp_path / "text"))
        assert refused.returncode and "begins with 6e6f206b" in refused.stderr + (top / "error").read_text()
        with pytest.raises(OSError) as caught:
            (top / "ctl").write_text(f"import {tmp_path}/6.9.1 x digest=sha256:12\n")
        assert caught.value.errno == errno.EINVAL

        os.mkdir(daemon.mount / "containers" / "web")
        (daemon.mount / "containers" / "web" / "config" / "kernel").write_text("6.9.1\n")
        assert (top / "6.9.1" / "used_by").read_text() == "web\n"
        with pytest.raises(OSError) as caught:
            os.rmdir(top / "6.9.1")
        assert caught.value.errno == errno.EBUSY and "used by web" in (top / "6.9.1" / "error").read_text()
        listed = dutchman(daemon, "kernels", "ls").stdout
        assert "6.9.1 *" in listed and "new" in listed and "web" in listed

        daemon.kill()
        daemon.start()
        assert os.readlink(top / "default") == "6.9.1"
        assert dutchman(daemon, "kernels", "rm", "new").stdout == "new\n"
        assert sorted(os.listdir(top)) == ["6.9.1", "ctl", "default", "error"]
