"""A file imports only its own floor or a lower one (the table in ARCHITECTURE.md); some modules are confined."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFINED = {
    "subprocess": (
        "engine/hostmounts.py",
        "engine/programs.py",
        "engine/runtimes/*",
        "fdfs/mount.py",
        "fdfs/binds.py",
        "fdfs/binder.py",
        "fdfs/cli*",
    ),
    "ctypes": (
        "engine/host.py",
        "engine/runtimes/*",
        "fdfs/libfuse.py",
        "fdfs/mount.py",
        "fdfs/binder.py",
    ),
    "fuse": ("fdfs/libfuse.py", "fdfs/mount.py", "fdfs/binds.py", "fdfs/binder.py"),
    "click": ("fdfs/cli*", "fdfs/__main__.py"),
    "rich": ("fdfs/cli*",),
    "httpx": ("engine/images/*",),
    "sqlite3": ("engine/store/*", "engine/*.py"),
}


def floors() -> dict[str, int]:
    """Pattern of a path -> floor, from the block below `## Floors`: a folder, then numbers, each before its files."""
    block = re.search(r"## Floors\n```\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.S)
    assert block
    table: dict[str, int] = {}
    folder, floor = "", -1
    for word in block[1].split():
        if word in ("engine/", "fdfs/"):
            folder = word
        elif word.isdigit():
            floor = int(word)
        else:
            assert folder + word not in table, f"{word} has two places in ARCHITECTURE.md, ## Floors"
            table[folder + word + ("*" if word.endswith("/") else "")] = floor
    return table


def modules() -> dict[str, Path]:
    found = {}
    for package in ("engine", "fdfs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[str(path.relative_to(ROOT))] = path
    return found


def floor_of(name: str, table: dict[str, int]) -> int | None:
    if name.endswith("__init__.py") and name.count("/") == 1:
        return 0  # empty, and nothing but a place
    exact = [floor for pattern, floor in table.items() if pattern == name]
    found = exact or [floor for pattern, floor in table.items() if fnmatch(name, pattern)]
    return found[0] if found else None


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it; `from a.b import c` counts as a.b and a.b.c."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def file_of(dotted: str, known: dict[str, Path]) -> str | None:
    for name in (dotted.replace(".", "/") + ".py", dotted.replace(".", "/") + "/__init__.py"):
        if name in known:
            return name
    return None


def test_every_module_has_a_floor() -> None:
    table = floors()
    homeless = [name for name in modules() if floor_of(name, table) is None]
    assert not homeless, "name them in ARCHITECTURE.md, ## Floors"


def test_the_table_names_only_what_exists() -> None:
    known = modules()
    ghosts = [pattern for pattern in floors() if not any(fnmatch(name, pattern) for name in known)]
    assert not ghosts


def test_nothing_imports_a_higher_floor() -> None:
    table, known = floors(), modules()
    wrong = []
    for name, path in known.items():
        here = floor_of(name, table)
        for dotted in imports(path):
            target = file_of(dotted, known)
            there = floor_of(target, table) if target else None
            if here is not None and there is not None and there > here:
                wrong.append(f"{name} (floor {here}) imports {target} (floor {there})")
    assert not wrong


def test_the_engine_knows_nothing_of_the_mount() -> None:
    for name, path in modules().items():
        if name.startswith("engine/"):
            assert not [dotted for dotted in imports(path) if dotted.split(".")[0] in ("fdfs", "fuse")], name


def test_dangerous_modules_stay_where_they_belong() -> None:
    wrong = []
    for name, path in modules().items():
        for dotted in imports(path):
            allowed = CONFINED.get(dotted.split(".")[0])
            if allowed is not None and not any(fnmatch(name, pattern) for pattern in allowed):
                wrong.append(f"{name} imports {dotted}")
    assert not wrong
