"""Bar charts as plain SVG: a few rectangles need no library."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from report import Spread

WIDTH = 760
LABEL_WIDTH = 210
VALUE_WIDTH = 150
BAR, GAP, GROUP_GAP, TOP = 16, 4, 26, 44
OURS_COLOUR, OTHER_COLOUR, RANGE_COLOUR, TEXT_COLOUR = "#1769aa", "#9aa7b4", "#333333", "#222222"


@dataclass(frozen=True)
class Bar:
    label: str
    spread: Spread
    is_ours: bool = False


@dataclass(frozen=True)
class Group:
    """Bars under one heading, with a scale of their own: what is compared stands together."""

    heading: str
    bars: list[Bar]


def chart(title: str, unit: str, groups: list[Group], digits: int = 0) -> str:
    """The medians as bars, lowest to highest as a line across the end of each; text for those who see no picture."""
    parts: list[str] = []
    y = TOP
    for group in groups:
        parts.append(text(8, y + 12, group.heading, weight="bold"))
        y += GROUP_GAP - GAP
        longest = max(0.0, *(bar.spread.high for bar in group.bars)) or 1.0
        scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / longest
        for bar in group.bars:
            parts += draw(bar, y, scale, digits)
            y += BAR + GAP
        y += GAP * 2
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
    )
    frame = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    heading = text(8, 22, f"{title} ({unit}; median, lowest to highest)", weight="bold", size=14)
    return "\n".join([head, frame, heading, *parts, "</svg>"]) + "\n"


def draw(bar: Bar, y: int, scale: float, digits: int) -> list[str]:
    spread, middle = bar.spread, y + BAR / 2
    # A difference may come out below 0 on a busy machine; the number says so, the bar has no room for it.
    low, end, high = (LABEL_WIDTH + max(0.0, value) * scale for value in (spread.low, spread.median, spread.high))
    colour = OURS_COLOUR if bar.is_ours else OTHER_COLOUR
    return [
        text(LABEL_WIDTH - 8, y + 12, bar.label, anchor="end"),
        f'<rect x="{LABEL_WIDTH}" y="{y}" width="{end - LABEL_WIDTH:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{RANGE_COLOUR}"/>',
        text(round(high) + 6, y + 12, f"{spread.median:,.{digits}f}"),
    ]


def text(x: int, y: int, content: str, *, anchor: str = "start", weight: str = "normal", size: int = 12) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{TEXT_COLOUR}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(content)}</text>'
