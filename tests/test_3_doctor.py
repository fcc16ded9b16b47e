"""What `dutchman doctor` knows: every fact has a name and, when something is missing, what to do about it."""

from __future__ import annotations

import glob
import os
import shutil
from typing import Any

import pytest

from engine import doctor, host


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with nothing installed and no rights."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(glob, "glob", lambda *_, **__: [])
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(host, "is_root", lambda: False)


def test_it_never_raises_and_names_every_fact_once() -> None:
    checks = doctor.examine()
    names = [check.name for check in checks]
    assert len(names) == len(set(names)) > 8
    assert all(check.name and check.found for check in checks)


@pytest.mark.usefixtures("bare")
def test_what_is_missing_comes_with_advice() -> None:
    checks = {check.name: check for check in doctor.examine()}
    for check in checks.values():
        assert check.ok or check.advice, check
    for name in ("conmon", "runtime oci", "libfuse 2", "/dev/fuse", "store") if host.LINUX else ():
        assert not checks[name].ok and checks[name].needed
    assert "apt-get install" in checks["libfuse 2"].advice if host.LINUX else True


def test_one_runtime_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    if not host.LINUX:
        pytest.skip("needs Linux")

    def report(**_: Any) -> list[tuple[str, bool, str, str]]:
        return [("runc", False, "not installed", "apt-get install runc"), ("crun", True, "/usr/bin/crun", "")]

    monkeypatch.setattr(doctor, "host_report", report)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    checks = {check.name: check for check in doctor.examine()}
    assert not checks["runc"].ok and not checks["runc"].needed
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert {check.name: check for check in doctor.examine()}["runc"].needed
