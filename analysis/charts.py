"""Log-log line charts as SVG, for the report."""

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np


class Series(NamedTuple):
    """One line, or one set of dots, of a chart."""

    name: str  # stands at its end; may be empty
    x: np.ndarray
    y: np.ndarray
    colour: str
    dots: bool = False


def chart(series: list[Series], x_name: str, y_name: str) -> str:
    """A log-log plot as SVG; values that are not above 0 are left out."""
    width, height, left, right, top, bottom = 500, 300, 62, 96, 8, 40
    drawn = [s._replace(x=s.x[s.y > 0], y=s.y[s.y > 0]) for s in series if (s.y > 0).any()]
    x_span = chart_span([s.x for s in drawn])
    y_span = chart_span([s.y for s in drawn])

    def across(log_x: Any) -> Any:
        return left + (log_x - x_span[0]) / (x_span[1] - x_span[0]) * (width - left - right)

    def down(log_y: Any) -> Any:
        return height - bottom - (log_y - y_span[0]) / (y_span[1] - y_span[0]) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_name)} against {escape(x_name)}">']
    for tick in chart_ticks(*x_span):
        parts.append(svg_line(across(tick), top, across(tick), height - bottom))
        parts.append(svg_text(across(tick), height - bottom + 15, plain(10.0**tick), "middle"))
    for tick in chart_ticks(*y_span):
        parts.append(svg_line(left, down(tick), width - right, down(tick)))
        parts.append(svg_text(left - 6, down(tick) + 4, plain(10.0**tick), "end"))
    heights = label_places([(float(down(np.log10(s.y[-1]))), s.name) for s in drawn if s.name])
    for s in drawn:
        points = np.stack([across(np.log10(s.x)), down(np.log10(s.y))], -1)
        if s.dots:
            parts += [f'<circle cx="{u:.1f}" cy="{v:.1f}" r="2.6" fill="{s.colour}"/>' for u, v in points]
        else:
            path = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{s.colour}" stroke-width="1.6"/>')
        if s.name:
            parts.append(svg_text(width - right + 7, heights[s.name] + 4, s.name, "start", f"fill:{s.colour}"))
    parts.append(svg_text((left + width - right) / 2, height - 6, x_name, "middle", "fill:var(--ink)"))
    parts.append(f'<g transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)">')
    parts.append(svg_text(0, 0, y_name, "middle", "fill:var(--ink)"))
    return "".join([*parts, "</g></svg>"])


def chart_span(values: list[np.ndarray]) -> tuple[float, float]:
    """Decimal logarithms of the least and the greatest value, apart."""
    logs = np.log10(np.concatenate(values))
    return float(logs.min()), float(max(logs.max(), logs.min() + 1e-3))


def svg_line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin line of the grid."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--line)"/>'


def svg_text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    """A text, escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def plain(value: float) -> str:
    """A round number without needless digits."""
    return f"{value:.6g}" if 1e-3 <= value < 1e5 else f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")


def chart_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of round numbers: decades, or 1, 2, 5 in narrow ranges."""
    steps = [math.log10(m) for m in ((1,) if high - low > 2.5 else (1, 2, 5))]
    found = [d + s for d in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    found = [tick for tick in found if low <= tick <= high]
    return found[:: -(-len(found) // 8)] if found else []


def label_places(wanted: list[tuple[float, str]], apart: float = 14) -> dict[str, float]:
    """Heights of line names, moved down where they would overlap."""
    placed: dict[str, float] = {}
    last = -math.inf
    for height, name in sorted(wanted):
        last = max(height, last + apart)
        placed[name] = last
    return placed
