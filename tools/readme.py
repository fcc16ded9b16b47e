"""Write the table of files in README.md from the declared rows: python tools/readme.py [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- files: made by tools/readme.py -->\n", "<!-- end of files -->"


def table() -> str:
    from fdfs import entry
    from fdfs.tree.root import ROOT

    lines = ["```"]
    width = 44
    for path, doc in entry.table(ROOT):
        lines.append(f"{path:<{width}} {doc}" if len(path) < width else f"{path}\n{'':<{width}} {doc}")
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
