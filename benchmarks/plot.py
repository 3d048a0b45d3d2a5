"""Bar charts as SVG, by hand: readable on light and dark pages, nothing to install."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _LABELS, _VALUES = 760, 250, 110
_ROW, _BAR, _HEADING = 26, 16, 34
_FONT = "font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
# The page behind is not painted, so that the chart takes on its reader's light or dark.
_STYLE = f"""
  text {{ {_FONT}; font-size: 13px; fill: #24292f }}
  .title {{ font-size: 15px; font-weight: 600 }}
  .heading {{ font-weight: 600 }}
  .note {{ font-size: 12px; fill: #57606a }}
  .bar {{ fill: #8c959f }} .ours {{ fill: #0969da }} .range, .mark {{ stroke: #24292f; fill: none }}
  .mark {{ stroke-width: 2 }} .axis {{ stroke: #d0d7de }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3 }} .note {{ fill: #9198a1 }} .bar {{ fill: #6e7681 }} .ours {{ fill: #4493f8 }}
    .range, .mark {{ stroke: #e6edf3 }} .axis {{ stroke: #3d444d }}
  }}
"""


@dataclass(frozen=True)
class Bar:
    """One value with the range it was seen in, and a mark to compare with."""

    label: str
    value: float
    low: float
    high: float
    is_ours: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Group:
    """Bars below one heading; an empty heading takes no room."""

    heading: str
    bars: Sequence[Bar]


def write_bar_chart(path: Path, title: str, note: str, groups: Sequence[Group], unit: str = "s") -> None:
    """Write horizontal bars; all groups share one scale that begins at zero."""
    path.write_text(bar_chart(title, note, groups, unit), encoding="utf-8")


def bar_chart(title: str, note: str, groups: Sequence[Group], unit: str) -> str:
    """Return the chart as the text of an SVG file."""
    top = max(max(bar.high, bar.mark or 0.0) for group in groups for bar in group.bars) or 1.0
    scale = (_WIDTH - _LABELS - _VALUES) / top
    lines, y = [], 62
    for group in groups:
        if group.heading:
            lines.append(_text(0, y + 18, group.heading, "heading"))
            y += _HEADING
        axis = f'<line class="axis" x1="{_LABELS}" x2="{_LABELS}" y1="{y}" y2="{y + _ROW * len(group.bars)}"/>'
        lines.append(axis)
        for bar in group.bars:
            lines.extend(_bar(bar, y, scale, unit))
            y += _ROW
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {_WIDTH + 16} {y + 12}" role="img"'
        f' aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        _text(0, 20, title, "title"),
        _text(0, 42, note, "note"),
    ]
    return "\n".join([*head, *lines, "</svg>", ""])


def _bar(bar: Bar, y: int, scale: float, unit: str) -> list[str]:
    middle = y + _ROW / 2
    length = bar.value * scale
    kind = "ours" if bar.is_ours else "bar"
    low, high = _LABELS + bar.low * scale, _LABELS + bar.high * scale
    lines = [
        _text(_LABELS - 10, middle + 4.5, bar.label, "", ' text-anchor="end"'),
        f'<rect class="{kind}" x="{_LABELS}" y="{middle - _BAR / 2}" width="{length:.1f}" height="{_BAR}" rx="2"/>',
    ]
    if bar.high > bar.low:
        ends = f"M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
        lines.append(f'<path class="range" d="M{low:.1f} {middle}H{high:.1f}{ends}"/>')
    if bar.mark is not None:
        lines.append(f'<path class="mark" d="M{_LABELS + bar.mark * scale:.1f} {middle - 11}v22"/>')
    end = max(high, _LABELS + length, _LABELS + (bar.mark or 0.0) * scale)
    return [*lines, _text(end + 8, middle + 4.5, f"{bar.value:.1f} {unit}", "")]


def _text(x: float, y: float, text: str, kind: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{extra}>{escape(text)}</text>'
