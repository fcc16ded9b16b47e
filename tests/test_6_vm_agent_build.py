"""The guest's agent is built when the first machine starts: a job that starts wait for, through the real mount.

In place of the compiler is a program that takes as long as the test wants; what it gives is nothing that could boot,
and the kernel the containers want is not there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import demo_archive, wait_for
from guestkernel import copy_kernels
from leftbehind import processes_at
from mounting import ROOT, Daemon, can_mount
from runtimebench import no_vm, skip_or_fail

COMPILER = """import os, sys, time
place = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
while not os.path.exists(f"{place}/go"):
    time.sleep(0.01)
with open(sys.argv[sys.argv.index("-o") + 1], "w") as file:
    file.write("agent")
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if (why := can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang/__init__.py").touch()
    (tmp_path / "ziglang/__main__.py").write_text(COMPILER)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    daemon = Daemon(tmp_path, runtime="vm", env=env)
    daemon.store.mkdir()
    copy_kernels(daemon.store)
    with daemon:
        daemon.sh(f"echo 'load {demo_archive()}' > images/ctl")
        wait_for(lambda: "demo:1" in os.listdir(daemon.mount / "images"), 60)
        for name in "ab":
            daemon.sh(f"mkdir containers/{name}; cd containers/{name}/config; echo demo:1 > image; echo none > kernel")
        yield daemon


def start(daemon: Daemon, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", f"echo start > containers/{name}/ctl"], cwd=daemon.mount)


def test_starts_wait_for_one_build_and_say_so(daemon: Daemon, tmp_path: Path) -> None:
    def compilers() -> list[str]:
        return [line for line in processes_at(f"{tmp_path}/cache/") if "ziglang" in line]

    writes = [start(daemon, name) for name in "ab"]
    number = wait_for(lambda: daemon.sh("grep -l '^agent build ' jobs/*/verb || true"), 60).split("/")[1]
    for name in "ab":
        daemon.until(f"cat containers/{name}/reason", f"waits for jobs/{number}: Zig ", seconds=60)
    assert " builds the agent of guests, once: " in daemon.sh(f"cat jobs/{number}/progress")
    assert len(compilers()) == 1 and daemon.sh("cat containers/?/state") == "starting\nstarting\n"
    # cancelled: the starts have failed, and nothing is left
    daemon.sh(f"echo cancel > jobs/{number}/ctl")
    for name, write in zip("ab", writes, strict=True):
        write.wait()
        daemon.until(f"cat containers/{name}/state", "stopped", seconds=60)
        assert f"jobs/{number}, agent build" in daemon.sh(f"cat containers/{name}/reason")
    assert not compilers() and os.listdir(tmp_path / "cache/dutchman/agents") == [".lock"]
    # the daemon is killed: so is the compiler, and what it was making is removed by the next that builds
    write = start(daemon, "a")
    wait_for(compilers, 60)
    daemon.kill()
    write.wait()
    wait_for(lambda: not compilers(), 60)
    daemon.unmount()
    daemon.start()
    assert daemon.sh("cat containers/a/state") == "stopped\n"
    (tmp_path / "go").touch()
    write = start(daemon, "a")
    daemon.until("cat containers/a/error", "no kernel 'none' is here", seconds=60)
    write.wait()
    left = sorted(os.listdir(tmp_path / "cache/dutchman/agents"))
    assert left[0] == ".lock" and len(left) == 2 and left[1].startswith("agent-")
    assert daemon.sh("cat jobs/*/state | tail -1") == "done\n" and daemon.sh("cat containers/a/state") == "stopped\n"
