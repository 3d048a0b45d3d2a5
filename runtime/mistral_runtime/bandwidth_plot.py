"""Bars as SVG, by hand: what decoding drew from memory in each round, and what memory gave in the same round."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

_LEFT, _LONGEST, _RIGHT = 90, 520, 190
_ROW, _TOP = 30, 78
# No background, so that the picture takes on its reader's light or dark.
_STYLE = """
  text { font: 13px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 } .note { font-size: 12px; fill: #57606a }
  .ceiling { fill: #d0d7de } .used { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9198a1 } .ceiling { fill: #3d444d } .used { fill: #4493f8 }
  }"""


def bandwidth_svg(title: str, note: str, rounds: Sequence[tuple[float, float]]) -> str:
    """Return an SVG with one bar a round: (used, ceiling) in bytes per second, the former drawn inside the latter."""
    scale = _LONGEST / max(max(pair) for pair in rounds)
    rows = []
    for number, (used, ceiling) in enumerate(rounds):
        y = _TOP + number * _ROW
        rows += [
            _text(_LEFT - 10, y + 15, f"round {number + 1}", ' text-anchor="end"'),
            f'<rect class="ceiling" x="{_LEFT}" y="{y}" width="{ceiling * scale:.1f}" height="20" rx="2"/>',
            f'<rect class="used" x="{_LEFT}" y="{y + 5}" width="{used * scale:.1f}" height="10" rx="2"/>',
            _text(_LEFT + max(used, ceiling) * scale + 8, y + 15, f"{used / 1e9:.1f} of {ceiling / 1e9:.1f} GB/s"),
        ]
    height = _TOP + len(rounds) * _ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _LONGEST + _RIGHT} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            _text(8, 22, title, ' class="title"'),
            _text(8, 42, note, ' class="note"'),
            _text(8, 60, "grey: a plain read of memory · blue: the weights read while decoding", ' class="note"'),
            *rows,
            "</svg>",
            "",
        ]
    )


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}"{attributes}>{escape(text)}</text>'
