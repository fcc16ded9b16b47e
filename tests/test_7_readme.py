"""README.md is true: the tour runs as written, the tables are current, the first command ends with a live mount."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import ROOT, Dutchman, demo_archive, needs_oci

from fdfs.cli import COMMANDS

README = (ROOT / "README.md").read_text()
EXPECT = re.compile(r"^(?P<command>.*?)\s+# (?P<fails>fails )?→ (?P<text>.+)$")


def tour() -> list[tuple[str, bool, str]]:
    """(command, whether it fails, what its output contains) of every line of the tour."""
    block = re.search(r"## A tour.*?```sh\n(.*?)```", README, re.S)
    assert block
    steps = []
    for line in block[1].splitlines():
        if not line or line.startswith("#"):
            continue
        match = EXPECT.match(line)
        steps.append((match["command"], bool(match["fails"]), match["text"]) if match else (line.rstrip(), False, ""))
    return steps


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path) as engine:
        yield engine


@pytest.mark.timeout(180)
def test_the_tour(engine: Dutchman) -> None:
    engine.up()
    engine.cli("load", str(demo_archive()))
    steps = tour()
    assert len(steps) > 40
    # one shell for all, as a person has; a mark with the exit status after each command
    mark = "@@@done"
    script = "\n".join(f"{{ {command}\n}} 2>&1; echo {mark} $?" for command, _, _ in steps)
    command = ["bash", "-c", script]
    done = subprocess.run(command, env=engine.env, cwd="/", capture_output=True, text=True, timeout=150, input="")
    outputs = re.split(rf"{mark} (\d+)\n", done.stdout)
    assert not done.stderr
    for number, (shell, fails, expected) in enumerate(steps):
        output, status = outputs[2 * number], outputs[2 * number + 1]
        assert (status != "0") == fails, f"{shell}\n{output}"
        assert expected in output, f"{shell}\n{output}"


def test_every_command_is_in_the_table() -> None:
    table = README[README.index("## The command") : README.index("## The files")]
    missing = [name for name in COMMANDS if not re.search(rf"`(dutchman )?{name}\b", table)]
    assert not missing


def test_the_table_of_files_is_current() -> None:
    script = [sys.executable, str(ROOT / "tools" / "readme.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_files_named_in_the_readme_exist() -> None:
    for path in re.findall(r"`\./(tools/\w+)", README) + re.findall(r"\]\((\w+\.md)\)", README) + ["tools/bench"]:
        assert (ROOT / path).exists(), path


@pytest.mark.timeout(600)
def test_the_first_command_ends_with_a_live_mount_and_can_be_repeated(engine: Dutchman, tmp_path: Path) -> None:
    env = engine.env | {"DUTCHMAN_LINK": str(tmp_path / "link" / "dutchman")}
    demo = str(ROOT / "tools" / "demo")
    for _ in range(2):
        done = subprocess.run([demo], env=env, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"mounted at {engine.mount}" in done.stdout
        assert "tick" in done.stdout or "hello from" in done.stdout
        assert engine.state("demo") == "running"
        assert sorted(os.listdir(engine.mount / "images" / "demo:2" / "rootfs" / "srv")) == ["hello.txt", "new.txt"]
    assert os.readlink(tmp_path / "link" / "dutchman") == str(ROOT / ".venv" / "bin" / "dutchman")


def test_the_demo_image_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        script = [sys.executable, str(ROOT / "tools" / "demo_image.py"), str(tmp_path / name)]
        subprocess.run(script, check=True, timeout=60)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
