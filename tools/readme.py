"""Write the table of files in README.md from the declared rows: python tools/readme.py [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
WIDTH = 40
BEGIN, END = "<!-- files: made by tools/readme.py -->\n", "<!-- end of files -->"


def table() -> str:
    from fdfs import entry
    from fdfs.tree.root import ROOT

    lines = ["```"]
    depth = 0
    for path, doc in entry.table(ROOT):
        if path.startswith("  "):  # a verb, below its ctl
            name, indent = path.strip(), depth + 2
        else:
            depth = path.rstrip("/").count("/")
            name, indent = path.rstrip("/").rpartition("/")[2] + ("/" if path.endswith("/") else ""), depth
        if depth and name == "error":
            continue  # the one at the top says it for all
        lines.append(f"{'  ' * indent}{name}".ljust(WIDTH) + f" {doc}")
    return "\n".join([*lines, "```"]) + "\n"


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + table() + END + after
    if "--check" in sys.argv:
        raise SystemExit(
            0 if wanted == text else "README.md: the table of files is not current: python tools/readme.py"
        )
    README.write_text(wanted)


if __name__ == "__main__":
    main()
