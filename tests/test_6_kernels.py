"""kernels/ through a real mount and the command line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dutchman import demo_archive, wait_for
from guestkernel import copy_kernels, guest_kernel
from mounting import ROOT, Daemon, can_mount
from runtimebench import bench_of
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
    with Daemon(tmp_path, runtime="vm") as daemon:
        top = daemon.mount / "kernels"
        assert os.listdir(top) == ["ctl", "error", "plan"]
        assert "no guest kernel is here" in (daemon.mount / "status").read_text()
        first = dutchman(daemon, "kernels", "import", "--arch=x86_64", str(tmp_path / "6.9.1"))
        assert first.stdout.strip() == "6.9.1", first.stderr
        assert "no guest kernel is here" not in (daemon.mount / "status").read_text()  # nor anything else of before
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
        assert sorted(os.listdir(top)) == ["6.9.1", "ctl", "default", "error", "plan"]
        told = [(event["type"], event["name"]) for event in events(daemon) if event["type"].startswith("kernel")]
        assert told == [
            ("kernelImported", "6.9.1"),
            ("kernelImported", "new"),
            ("kernelChosen", "6.9.1"),
            ("kernelRemoved", "new"),
        ]


def events(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (daemon.mount / "events").read_text().splitlines()]


def test_prune_removes_what_its_plan_lists_and_every_file_reads(tmp_path: Path) -> None:
    if reason := can_mount():
        pytest.skip(reason)
    with Daemon(tmp_path, runtime="fake") as daemon:
        top = daemon.mount / "kernels"
        for version in ("6.9.1", "6.10.0", "6.8.2"):
            (tmp_path / version).write_bytes(vmlinux(version))
            dutchman(daemon, "kernels", "import", "--arch=x86_64", str(tmp_path / version))
        assert os.readlink(top / "default") == "6.10.0"
        for name in sorted(os.listdir(top / "6.8.2")):
            text = (top / "6.8.2" / name).read_bytes()
            assert text or name in ("error", "initfs", "modules", "templates", "used_by", "verified"), name

        with pytest.raises(OSError) as caught:
            (top / "ctl").write_text("prune\n")
        assert caught.value.errno == errno.EINVAL and "cat kernels/plan" in (top / "error").read_text()
        first = (top / "plan").read_text()
        assert "kernel 6.8.2 " in first and "kernel 6.9.1 " in first and "6.10.0" not in first
        os.mkdir(daemon.mount / "containers" / "web")
        (daemon.mount / "containers" / "web" / "config" / "kernel").write_text("6.9.1\n")
        with pytest.raises(OSError) as caught:  # what was read is no longer so
            (top / "ctl").write_text(first.splitlines()[-1])
        assert caught.value.errno == errno.EBUSY and "6.8.2" in os.listdir(top)
        assert "1 kernels removed" in dutchman(daemon, "kernels", "prune", "--yes").stdout
        assert sorted(set(os.listdir(top))) == ["6.10.0", "6.9.1", "ctl", "default", "error", "plan"]
        (daemon.store / "kernels" / "6.9.1" / "kernel.json").write_text("{")  # a disk that loses bytes
        broken = daemon.run("ls kernels/6.9.1; cat kernels/6.9.1/version")
        assert "Input/output error" in broken.stderr and "vmlinux" in broken.stdout
        assert "kernel 6.9.1" not in (top / "plan").read_text()
        assert os.readlink(top / "default") == "6.10.0"
        (daemon.mount / "containers" / "web" / "config" / "kernel").write_text("\n")
        os.rmdir(top / "6.9.1")

        daemon.kill()
        shutil.rmtree(daemon.store / "kernels" / "6.10.0")  # behind its back
        daemon.start()
        last = [event for event in events(daemon) if event["object"] == "kernel/6.10.0"][-1]
        assert (last["type"], last["found"]) == ("kernelRemoved", True)


def test_a_kernel_is_used_by_a_machine_that_runs_with_it(tmp_path: Path) -> None:
    """Whatever the default is by then. One boot."""
    if reason := can_mount():
        pytest.skip(reason)
    bench_of("vm", tmp_path / "bench").close()  # skips where there is no virtual machine
    kernel = guest_kernel()
    (tmp_path / "other").write_bytes(vmlinux("1.0.0"))
    daemon = Daemon(tmp_path, runtime="vm")
    daemon.store.mkdir(parents=True, mode=0o700)
    copy_kernels(daemon.store, templates=True)
    with daemon:
        top, web = daemon.mount / "kernels", daemon.mount / "containers" / "web"
        assert [event["found"] for event in events(daemon) if event["type"] == "kernelImported"] == [True]
        daemon.sh(f"echo 'load {demo_archive()}' > images/ctl")
        wait_for(lambda: "demo:1" in os.listdir(daemon.mount / "images"), 60)
        dutchman(daemon, "kernels", "import", "--arch=x86_64", str(tmp_path / "other"), "other")
        daemon.sh(
            "mkdir containers/web; cd containers/web/config; echo demo:1 > image; printf 'sleep\\n1000\\n' > command"
        )
        (web / "config" / "kernel").write_text("missing\n")
        done = daemon.run("echo start > containers/web/ctl; cat containers/web/error", timeout=120)
        assert "no kernel 'missing' is here" in done.stdout and (web / "state").read_text() != "running\n"
        (web / "config" / "kernel").write_text("\n")
        daemon.sh("echo start > containers/web/ctl || cat containers/web/error", timeout=120)
        wait_for(lambda: (web / "state").read_text() != "starting\n", 120)
        assert (web / "state").read_text() == "running\n", (web / "error").read_text()
        try:
            (top / "ctl").write_text("default other\n")
            assert (top / "other" / "used_by").read_text() == "web\n"  # at its next start
            daemon.kill()
            daemon.start()
            assert (top / kernel.name / "used_by").read_text() == "web\n"
            with pytest.raises(OSError) as caught:
                os.rmdir(top / kernel.name)
            assert caught.value.errno == errno.EBUSY and "used by web" in (top / kernel.name / "error").read_text()
            assert f"kernel {kernel.name} " not in (top / "plan").read_text()
        finally:
            daemon.sh("echo kill > containers/web/ctl")
        wait_for(lambda: (web / "state").read_text() == "stopped\n", 60)
        os.rmdir(top / kernel.name)
        assert os.readlink(top / "default") == "other" and kernel.name not in os.listdir(top)
