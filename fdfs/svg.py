"""Pictures of where the bytes are, as SVG text. Floor 5.

Only here: how they look. Plain SVG 1.1 with a style sheet of its own: readable on light and dark (the page's colours
follow prefers-color-scheme; a viewer that knows none shows the light ones), no scripts, no fonts or files from
elsewhere. Everything that is not ours is escaped, control characters and all. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unicodedata import east_asian_width
from xml.sax.saxutils import escape

WIDTH = 960
MARGIN = 28
ROW = 24
MAX_ROWS = 400  # rows of one picture; what is beyond is added up in one
MAX_IMAGES = 30

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2933; }
  .title { font-size: 19px; font-weight: 600; }
  .dim { fill: #66727f; }
  .number { text-anchor: end; font-variant-numeric: tabular-nums; }
  .middle { text-anchor: middle; }
  .page { fill: #ffffff; }
  .track { fill: #eef1f4; }
  .own { fill: #2f6fb2; } .shared { fill: #8fbf6a; }
  .a { fill: #e0962f; } .b { fill: #2f6fb2; } .c { fill: #8b6bb8; } .rest { fill: #dfe4e8; }
  .mark { stroke: #c0392b; stroke-width: 2; }
  .grid { stroke: #d5dbe1; stroke-width: 1; }
  .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .area { opacity: 0.22; }
  .cpu { stroke: #2f6fb2; } .cpu.area { fill: #2f6fb2; stroke: none; }
  .memory { stroke: #8b6bb8; } .memory.area { fill: #8b6bb8; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e9ee; }
    .dim { fill: #9aa6b2; }
    .page { fill: #14191f; }
    .track { fill: #232b33; }
    .own { fill: #5b9bdc; } .shared { fill: #7fae5b; }
    .a { fill: #e3a24a; } .b { fill: #5b9bdc; } .c { fill: #a78bd0; } .rest { fill: #36414b; }
    .mark { stroke: #ff7566; } .grid { stroke: #36414b; }
    .cpu { stroke: #5b9bdc; } .cpu.area { fill: #5b9bdc; }
    .memory { stroke: #a78bd0; } .memory.area { fill: #a78bd0; }
  }
"""


class Layer(NamedTuple):
    """`size`: bytes of its files; `shared_with`: how many other images have it."""

    diff_id: str
    size: int
    shared_with: int
    created_by: str


class Image(NamedTuple):
    """`own`: bytes in layers no other image has, of `size`."""

    name: str
    own: int
    size: int


def human(size: int) -> str:
    """1024-based, three digits: 0 B, 512 B, 1.50 KiB, 23.4 MiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000 or unit == "PiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size} B"
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def text(value: str, width: int) -> str:
    """`value` on one line, cut to about `width` pixels, as it may stand in an element or an attribute."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in value).split())  # no controls, no surrogates
    room, used = width / 7.2, 0
    for at, c in enumerate(clean):
        used += 2 if east_asian_width(c) in "WF" else 1
        if used > room:
            clean = clean[: max(0, at - 1)].rstrip() + "…"
            break
    return escape(clean, {'"': "&quot;", "'": "&apos;"})


class Page:
    """Elements from the top down; `y` is where the next one goes."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._out: list[str] = []
        self.y = 0

    def say(self, x: int, words: str, *kinds: str, width: int = WIDTH) -> None:
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        self._out.append(f'<text x="{x}" y="{self.y}"{kind}>{text(words, width)}</text>')

    def bar(self, x: float, y: int, width: float, height: int, kind: str, tip: str = "", round: int = 2) -> None:
        if width > 0:
            title = f"<title>{text(tip, 1 << 20)}</title>" if tip else ""
            self._out.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(width, 1):.2f}" height="{height}" rx="{round}" class="{kind}">'
                f"{title}</rect>"
            )

    def add(self, element: str) -> None:
        """An element as it is; whatever is not ours in it has gone through `text`."""
        self._out.append(element)

    def line(self, x: float, y1: int, y2: int, kind: str) -> None:
        self._out.append(f'<line x1="{x:.2f}" y1="{y1}" x2="{x:.2f}" y2="{y2}" class="{kind}"/>')

    def key(self, entries: Sequence[tuple[str, str]]) -> None:
        """A legend in one line."""
        x = MARGIN
        for kind, words in entries:
            self.bar(x, self.y - 11, 13, 13, kind)
            self.say(x + 20, words, "dim")
            x += 20 + int(len(words) * 7.0) + 28

    def done(self) -> str:
        height = self.y + MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">\n<title>{text(self._title, 1 << 20)}</title>\n'
            f'<style>{STYLE}</style>\n<rect width="{WIDTH}" height="{height}" class="page"/>\n'
            + "\n".join(self._out)
            + "\n</svg>\n"
        )


def layers(name: str, stack: Sequence[Layer]) -> str:
    """The layers of an image, lowest first: how large each is, and which other images have too."""
    total = sum(layer.size for layer in stack)
    shared = sum(layer.size for layer in stack if layer.shared_with)
    page = Page(f"Layers of {name}")
    page.y = MARGIN + 16
    page.say(MARGIN, name, "title", width=(WIDTH - 2 * MARGIN) * 7 // 10)
    page.y += 24
    count = f"{len(stack)} layer{'' if len(stack) == 1 else 's'}"
    page.say(MARGIN, f"{count}, {human(total)}: {human(total - shared)} its own, {human(shared)} shared", "dim")
    page.y += 14
    _strip(page, stack, total)
    page.y += 28
    page.key([("own", "only in this image"), ("shared", "in other images too")])
    page.y += 14
    shown = list(stack[:MAX_ROWS])
    largest = max((layer.size for layer in shown), default=0)
    bar_x, bar_width, words_x = MARGIN + 120, 240, MARGIN + 380
    for number, layer in enumerate(shown):
        page.y += ROW
        page.say(MARGIN + 18, f"{number:02d}", "dim", "number")
        page.say(MARGIN + 108, human(layer.size), "number")
        page.bar(bar_x, page.y - 12, bar_width, 15, "track")
        others = f"{layer.shared_with} other image{'' if layer.shared_with == 1 else 's'}"
        tip = f"{layer.diff_id}, {layer.size} bytes" + (f", in {others} too" if layer.shared_with else "")
        part = bar_width * layer.size / largest if largest else 0
        page.bar(bar_x, page.y - 12, part, 15, "shared" if layer.shared_with else "own", tip)
        words = layer.created_by or layer.diff_id[:19]
        page.say(words_x, words, width=WIDTH - MARGIN - words_x - 100)
        if layer.shared_with:
            page.say(WIDTH - MARGIN, f"also in {layer.shared_with}", "dim", "number")
    if len(stack) > MAX_ROWS:
        page.y += ROW
        rest = stack[MAX_ROWS:]
        page.say(words_x, f"and {len(rest)} more layers of {human(sum(layer.size for layer in rest))}", "dim")
    return page.done()


def _strip(page: Page, stack: Sequence[Layer], total: int) -> None:
    """All layers side by side, as wide as they are large."""
    x, width = float(MARGIN), WIDTH - 2 * MARGIN
    page.bar(x, page.y, width, 16, "track")
    for layer in stack:
        part = width * layer.size / total if total else 0
        if part >= 0.5:
            gap = 1 if part > 3 else 0
            kind = "shared" if layer.shared_with else "own"
            page.bar(x, page.y, part - gap, 16, kind, f"{layer.diff_id}, {human(layer.size)}")
        x += part
    page.y += 16


KINDS = {"blobs": ("a", "blobs as pulled"), "layers": ("b", "files of layers"), "trees": ("c", "merged trees")}


def usage(sizes: Mapping[str, int], *, free: int, limit: int | None, images: Sequence[Image]) -> str:
    """Where the bytes of a store are: by class against the limit, and the largest images.

    `sizes` has blobs, layers and trees; `free` is the disk's; `images` come largest first. All in bytes.
    """
    total = sum(sizes.values())
    page = Page("Bytes of the store")
    page.y = MARGIN + 16
    page.say(MARGIN, f"The store takes {human(total)}", "title")
    page.y += 24
    bound = "no limit is set" if limit is None else f"policy.yaml allows {human(limit)}"
    page.say(MARGIN, f"{bound}; {human(free)} are free on its disk", "dim")
    page.y += 16
    whole = max(total, limit or 0, 1)
    x, width = float(MARGIN), WIDTH - 2 * MARGIN
    page.bar(x, page.y, width, 30, "track", round=3)
    for name, size in sizes.items():
        kind, words = KINDS.get(name, ("rest", name))
        part = width * size / whole
        page.bar(x, page.y, part, 30, kind, f"{words}: {size} bytes", round=0)
        x += part
    if limit is not None and limit < total:
        at = MARGIN + width * limit / whole
        page.line(at, page.y - 5, page.y + 35, "mark")
        page.y += 47
        page.say(int(at), "limit", "middle")
        page.y -= 47
    page.y += 54 + (16 if limit is not None and limit < total else 0)
    page.key(
        [(KINDS.get(name, ("rest", name))[0], f"{KINDS.get(name, ('', name))[1]} {human(size)}")
         for name, size in sizes.items()]
    )  # fmt: skip
    if images:
        page.y += 44
        page.say(MARGIN, f"{len(images)} image{'' if len(images) == 1 else 's'}, by size", "title")
        page.y += 24
        page.key([("own", "only in this image"), ("shared", "in layers other images have too")])
        page.y += 6
    largest = max((image.size for image in images), default=0)
    bar_x = MARGIN + 330
    bar_width = WIDTH - MARGIN - bar_x - 90
    for image in images[:MAX_IMAGES]:
        page.y += ROW
        page.say(MARGIN, image.name, width=320)
        page.bar(bar_x, page.y - 12, bar_width, 15, "track")
        own = bar_width * image.own / largest if largest else 0
        common = bar_width * (image.size - image.own) / largest if largest else 0
        page.bar(bar_x, page.y - 12, own, 15, "own", f"{image.name}: {image.own} bytes only here")
        page.bar(bar_x + own, page.y - 12, common, 15, "shared", f"{image.name}: {image.size - image.own} bytes shared")
        page.say(WIDTH - MARGIN, human(image.size), "number")
    if len(images) > MAX_IMAGES:
        page.y += ROW
        page.say(MARGIN, f"and {len(images) - MAX_IMAGES} smaller ones", "dim")
    return page.done()
