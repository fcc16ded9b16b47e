"""Tables of other projects' own tests (fixtures), as oracles for what we parse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

PLACE = Path(__file__).parents[2] / "shared" / "fixtures" / "tables"


def rows(file: str, test: str) -> list[Any]:
    """The rows of one test's table. Skips (in CI fails) where the fixtures are not."""
    path = PLACE / file
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail("fixtures are not here")
        pytest.skip("fixtures are not here")
    return next(table["rows"] for table in json.loads(path.read_text())["tables"] if table["test"] == test)
