"""A picture of what a container used over the last minutes, as SVG text. Floor 5, pure.

Only here: curves over time. The looks, and what may stand in a text, are svg.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fdfs.svg import MARGIN, WIDTH, Page, human

SPANS = 60.0, 120.0, 300.0, 600.0  # seconds across: the least that holds what was seen
GAP = 8.0  # seconds between two points that are not joined
LEFT, RIGHT, HEIGHT = MARGIN + 76, WIDTH - MARGIN, 150
Point = tuple[float, float]  # seconds (0 is now, before it negative), value


def usage(
    name: str,
    state: str,
    samples: Sequence[tuple[float, float, int]],
    *,
    memory_limit: int | None = None,
    cpus: float | None = None,
) -> str:
    """`samples`: (seconds, CPU in % of one CPU, memory in bytes), oldest first; limits as configured."""
    page = Page(f"What {name} uses")
    page.y = MARGIN + 16
    page.say(MARGIN, name, "title", width=(WIDTH - 2 * MARGIN) * 7 // 10)
    page.y += 24
    span = next((span for span in SPANS if samples and -samples[0][0] <= span), SPANS[-1])
    minutes = "minute" if span == 60 else f"{span / 60:.0f} minutes"
    seen = f"the last {minutes}" if samples else f"nothing was seen of it in the last {minutes}"
    page.say(MARGIN, f"{state}; {seen}", "dim")
    cpu = [(at, percent) for at, percent, _ in samples]
    memory = [(at, float(size)) for at, _, size in samples]
    limit = None if cpus is None else cpus * 100
    _panel(page, "CPU, % of one", "cpu", cpu, limit, span, _percent)
    _panel(page, "Memory", "memory", memory, memory_limit, span, lambda value: human(round(value)))
    return page.done()


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %"


def ceiling(value: float, binary: bool) -> float:
    """A round number above `value`: 1, 2 or 5 times a power of ten, or a power of two."""
    if value <= 0:
        return 1.0
    if binary:
        return float(2 ** math.ceil(math.log2(value)))
    base = 10.0 ** math.floor(math.log10(value))
    return next(factor * base for factor in (1, 2, 5, 10) if factor * base >= value * (1 - 1e-9))


def _panel(
    page: Page,
    title: str,
    kind: str,
    points: Sequence[Point],
    limit: float | None,
    span: float,
    shown: Callable[[float], str],
) -> None:
    peak = max((value for _, value in points), default=0.0)
    page.y += 40
    page.say(MARGIN, title)
    if points:
        bound = "" if limit is None else f", limit {shown(limit)}"
        page.say(RIGHT, f"last {shown(points[-1][1])}, at most {shown(peak)}{bound}", "dim", "number")
    page.y += 18
    top, bottom = page.y, page.y + HEIGHT
    page.bar(LEFT, top, RIGHT - LEFT, HEIGHT, "track")
    near = limit is not None and limit <= 4 * max(peak, 1e-9)  # a limit far above would flatten the curve
    # a limit is overshot a little between two looks: that is no reason for a scale of twice its size
    high = limit if limit is not None and near and peak <= limit * 1.1 else peak
    whole = ceiling(max(high, 1.0), kind == "memory")

    def x(at: float) -> float:
        return RIGHT + max(at, -span) / span * (RIGHT - LEFT)

    def y(value: float) -> float:
        return bottom - min(value / whole, 1.0) * HEIGHT

    for part in (0.0, 0.5, 1.0):
        page.add(f'<line x1="{LEFT}" y1="{y(part * whole):.1f}" x2="{RIGHT}" y2="{y(part * whole):.1f}" class="grid"/>')
        page.y = round(y(part * whole)) + 4
        page.say(LEFT - 8, shown(part * whole), "dim", "number")
    for run in runs(points):
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in run)
        if len(run) > 1:
            ends = f"{x(run[-1][0]):.1f},{bottom} {x(run[0][0]):.1f},{bottom}"
            page.add(f'<polygon points="{path} {ends}" class="{kind} area"/>')
            page.add(f'<polyline points="{path}" class="{kind} curve"/>')
        else:
            page.add(f'<circle cx="{x(run[0][0]):.1f}" cy="{y(run[0][1]):.1f}" r="2" class="{kind} curve"/>')
    if near and limit is not None:
        page.add(f'<line x1="{LEFT}" y1="{y(limit):.1f}" x2="{RIGHT}" y2="{y(limit):.1f}" class="mark"/>')
    page.y = bottom + 18
    for part in range(6):
        back = span * part / 5
        words = (
            "now"
            if part == 0
            else f"\N{MINUS SIGN}{back:.0f} s"
            if span < 300
            else f"\N{MINUS SIGN}{back / 60:.0f} min"
        )
        page.say(round(x(-back)), words, "dim", "number" if part == 0 else "middle")


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """`points` cut where more than GAP seconds lie between two."""
    out: list[list[Point]] = []
    for point in points:
        if out and point[0] - out[-1][-1][0] <= GAP:
            out[-1].append(point)
        else:
            out.append([point])
    return out
