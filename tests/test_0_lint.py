"""The code reads the same everywhere: ruff, formatting, strict types, shell syntax; no leftovers in any text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("engine", "fdfs", "tests", "tools")
MAX_LINES = 460
MAX_TEST_LINES = 600  # tables of cases are long and read easily


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def texts() -> list[Path]:
    """Every text of the project as a reader finds it: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive without git
        names = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    found = []
    for path in names:
        if path.is_file() and b"\0" not in path.read_bytes()[:4096] and "__pycache__" not in path.parts:
            found.append(path)
    return found


def test_ruff_check() -> None:
    run("ruff", "check", *SOURCES)


def test_ruff_format() -> None:
    run("ruff", "format", "--check", "--diff", *SOURCES)


@pytest.mark.timeout(300)
def test_mypy_strict() -> None:
    run("mypy", "--strict", "-p", "engine", "-p", "fdfs")


def test_shell_scripts_parse() -> None:
    scripts = [path for path in texts() if path.read_bytes()[:20].startswith((b"#!/usr/bin/env bash", b"#!/bin/sh"))]
    assert scripts
    for script in scripts:
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


def test_no_file_is_too_long() -> None:
    long = {}
    for path in texts():
        lines = path.read_bytes().count(b"\n")
        limit = MAX_LINES if path.parts[len(ROOT.parts)] != "tests" else MAX_TEST_LINES
        if path.suffix == ".py" and lines > limit:
            long[str(path.relative_to(ROOT))] = lines
    assert not long, "split by topic"


def test_no_leftovers() -> None:
    """No machine's paths and no unfinished marks. The words are put together here so that this file has none itself."""
    words = [r"/wo" + r"rk/", r"/tmp/" + r"venv", r"/opt/" + r"pypi", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"]
    words += [r"language " + r"model", r"\bas an " + r"AI\b", r"\bissue " + r"#\d"]
    pattern = re.compile("|".join(words))
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_nothing_unexpected_at_the_top() -> None:
    allowed = {".ci", ".gitignore", "ARCHITECTURE.md", "LICENSE", "README.md", "engine", "fdfs", "pyproject.toml"}
    allowed |= {"tests", "tools"}
    top = {path.relative_to(ROOT).parts[0] for path in texts()}
    assert top <= allowed, sorted(top - allowed)


def test_every_module_says_its_purpose() -> None:
    silent = []
    for path in texts():
        body = path.read_text() if path.suffix == ".py" else ""
        if body and not ast.get_docstring(ast.parse(body)):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent
