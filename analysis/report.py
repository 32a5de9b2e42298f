"""One self-contained HTML file about a store: `uv run analysis/report.py --store S`.

Maps on a canvas with pan, zoom and hover; the boundary's dimension with its nulls and fit; rules of
thumb; loss traces of clicked cells; the noise floor, where it was measured; provenance; and for every
cell the command that replays it. The page (report.html beside this file) needs no network.
"""

import base64
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.boundary import map_edges
from analysis.classify import Labelling, measured, planned_steps, trains
from analysis.dimension import nulls, parse_fit
from analysis.noise import exponent_of, read_noise, verdict
from analysis.plot import CONVERGENCE_COLOURS, LABEL_COLOURS, Map, analyse, colour_scale, equalise, extent
from analysis.rules import FEWEST, SAFE, rules, sentences
from engine.command import parse, screen, user_errors
from engine.grid import Axis
from engine.outcome import LABELS
from engine.store import Store, open_store

TEMPLATE = Path(__file__).with_name("report.html")
MOST_CELLS = 1024  # a side; larger maps are shown every n-th cell
MOST_STEPS = 200  # steps of a trace; longer ones are shown at as many, evenly spread
MOST_LOSSES = 4_000_000  # losses in the file; larger stores carry the traces of every n-th cell
OVER, NONE = 255, 0  # picture indices of a loss above the scale, and of a cell without one


# ---- numbers for the page


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as base64 with its little-endian type, for typed arrays."""
    return {
        "dtype": array.dtype.str[1:],
        "bytes": base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode(),
    }


def axis_json(axis: Axis, values: np.ndarray) -> dict:
    """Name, values, and the drawn extent (log10 units for a log axis)."""
    low, high = extent(axis)
    return {"name": axis.name, "log": axis.scale == "log", "from": low, "to": high, "values": values.tolist()}


def indexed(scaled: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as picture indices 1..254, above 1 as OVER, NaN as NONE; uint8."""
    index = np.where(scaled > 1, OVER, 1 + np.clip(np.nan_to_num(scaled), 0, 1) * 253)
    return np.where(np.isnan(scaled), NONE, index).round().astype(np.uint8)


def loss_layer(store: Store, codes: np.ndarray) -> tuple[np.ndarray, dict]:
    """Picture indices of the loss after training, and how the page colours them."""
    from matplotlib import colormaps

    held_out = "val_loss" in store
    loss = store.read("val_loss" if held_out else "last_loss").astype(float)
    known = measured(codes)
    first = float(np.median(store.read("first_loss")[known])) if known.any() else 1.0
    finite = loss[known & np.isfinite(loss)]
    low = float(np.percentile(finite, 1)) if len(finite) else first / 2
    high = max(1.25 * first, low * (1 + 1e-6))
    if held_out:
        scaled = (np.where(np.isfinite(loss), loss, np.inf) - low) / (high - low)
    else:
        low = max(low, 1e-4 * first)
        with np.errstate(divide="ignore"):
            scaled = np.log(np.maximum(np.where(np.isfinite(loss), loss, np.inf), low) / low) / math.log(high / low)
    colours = (colormaps["cividis_r"](np.linspace(0, 1, 254))[:, :3] * 255).round().astype(int).tolist()
    layer = {
        "name": "held-out loss" if held_out else "loss",
        "array": "loss_index",
        "line": "#ffffff",
        "colours": [None, *colours, [29, 29, 31]],
        "legend": [["not finite, or above", "#1d1d1f"]],
        "ramp": {"from": f"{low:.3g}", "to": f"{high:.3g}", "colours": [hex_colour(c) for c in colours[::23]]},
    }
    return indexed(np.where(known, scaled, np.nan)), layer


def convergence_layer(value: np.ndarray) -> tuple[np.ndarray, dict]:
    """Picture indices of the equalised convergence map, and how the page colours them."""
    colours = colour_scale(CONVERGENCE_COLOURS, 254).tolist()
    layer = {
        "name": "convergence",
        "array": "convergence_index",
        "line": "#000000",
        "colours": [None, *colours, None],
        "legend": [],
        "ramp": {
            "from": "trains slowly",
            "to": "breaks late",
            "colours": [colour for _, colour in CONVERGENCE_COLOURS],
        },
    }
    return indexed((equalise(value) + 1) / 2), layer


def label_layer(codes: np.ndarray) -> dict:
    """How the page colours label codes."""
    present = [code for code in range(1, len(LABELS)) if (codes == code).any()]
    rgb = [[int(LABEL_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)] for name in LABELS]
    return {
        "name": "labels",
        "array": "codes",
        "line": "#000000",
        "colours": [None, *rgb[1:]],
        "legend": [[LABELS[code], LABEL_COLOURS[LABELS[code]]] for code in present],
    }


def hex_colour(rgb: list[int]) -> str:
    """#rrggbb."""
    return "#" + "".join(f"{channel:02x}" for channel in rgb)


def traces_json(store: Store, stride: int) -> dict | None:
    """Loss traces at up to MOST_STEPS steps, of as many shown cells as MOST_LOSSES allows; None if not stored."""
    if "losses" not in store:
        return None
    longest = int(planned_steps(store).max())
    steps = np.unique(np.linspace(0, longest - 1, MOST_STEPS).round().astype(np.int32))
    rows, cols = (-(-side // stride) for side in store.grid.shape)
    thin = math.ceil(math.sqrt(max(rows * cols * len(steps) / MOST_LOSSES, 1)))
    every = stride * thin
    losses = np.stack(
        [
            store.read("losses", rows=slice(row, row + 1))[0, ::every, :][:, steps]
            for row in range(0, store.grid.shape[0], every)
        ]
    )
    return {"step": packed(steps), "losses": packed(losses.astype(np.float32)), "row_stride": thin, "col_stride": thin}


def page_data(found: Map) -> dict:
    """Everything the page's script draws, as JSON values."""
    store, stride = found.store, -(-max(found.codes.shape) // MOST_CELLS)
    loss_index, loss = loss_layer(store, found.codes)
    convergence_index, convergence = convergence_layer(found.value)
    arrays = {
        "codes": found.codes,
        "side": np.where(measured(found.codes), trains(found.codes), 2).astype(np.uint8),
        "loss_index": loss_index,
        "convergence_index": convergence_index,
        "value": found.value.astype(np.float32),
    }
    values = [["convergence value", "value"]]
    for name, words in (
        ("first_loss", "first loss"),
        ("last_loss", "last loss"),
        ("val_loss", "held-out loss"),
        ("steps", "steps"),
        ("nonfinite_step", "first non-finite step"),
    ):
        if name in store:
            arrays[name] = store.read(name)
            values.append([words, name])
    thinned = {name: array[::stride, ::stride] for name, array in arrays.items()}
    return {
        "shape": thinned["codes"].shape,
        "stride": stride,
        "store": shlex.quote(str(store.path)),
        "labels": LABELS,
        "y": axis_json(store.grid.y, store.grid.y.values[::stride]),
        "x": axis_json(store.grid.x, store.grid.x.values[::stride]),
        "layers": [label_layer(found.codes), loss, convergence],
        "values": values,
        "arrays": {name: packed(array) for name, array in thinned.items()},
        "traces": traces_json(store, stride),
    }


# ---- the page's parts


def table_html(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """A table; every text is escaped."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def dimension_html(found: Map) -> str:
    """The dimension with its interval, nulls and fit plot, or why there is none."""
    if not found.blocks:
        return "<p>No boundary: every measured cell is on one side, so there is no dimension.</p>"
    d = found.dimension
    if d is None:
        return f"<p>{found.blocks} boundary blocks; the map is too small for a dimension.</p>"
    null = nulls(map_edges(found.codes).shape, d.fit)
    rows = [("this boundary", f"{d.value:.3f}", f"{d.low:.3f} to {d.high:.3f}")]
    for name, n in null.items():
        rows.append((name, f"{n.value:.3f}", f"{n.low:.3f} to {n.high:.3f}") if n else (name, "no boundary", ""))
    fit = f"<p class=soft>Box counting over boxes of {d.fit[0]} to {d.fit[1]} cells, {d.decades:.1f} decades.</p>"
    warning = f'<p class="warn">{escape(d.warning)}</p>' if d.warning else ""
    slope = d.counts[d.in_fit][0] * (d.sizes[d.in_fit] / d.sizes[d.in_fit][0]) ** -d.value
    series = [Series(name, n.sizes, n.counts, "#8b9099") for name, n in null.items() if n]
    series += [
        Series("", d.sizes, d.counts, "var(--accent)", dots=True),
        Series("this boundary", d.sizes[d.in_fit], slope, "var(--accent)"),
    ]
    return (
        table_html(rows, ("", "dimension", "95% interval")) + fit + warning + chart(series, "box side, cells", "boxes")
    )


def rules_html(found: Map) -> str:
    """Rules of thumb with the plot of critical rates, or why there are none."""
    c = found.critical
    if c is None or c.other.name.startswith("lr"):
        return "<p>They need a map of a learning rate against something else, such as tokens.</p>"
    if c.bracketed.sum() < FEWEST or c.other.low <= 0:
        lines = f"{c.bracketed.sum()} of {c.other.points} lines"
        return f"<p>The boundary is bracketed in {lines} along {escape(c.other.name)}; a law needs {FEWEST}.</p>"
    r = rules(found.store, found.codes)
    x = c.other.values
    series = [
        Series(f"{SAFE:g} x critical", x, SAFE * r.law.fitted, "#8b9099"),
        Series("critical", x, r.law.fitted, "var(--accent)"),
        Series("", x[c.bracketed], c.value[c.bracketed], "var(--accent)", dots=True),
        Series("best", x, r.best, "var(--warm)", dots=True),
    ]
    return table_html(sentences(r)) + chart(series, c.other.name, c.lr.name)


def noise_html(store: Store, labelling: Labelling) -> str:
    """The noise floor of the store and its zooms, where measured."""
    rows = []
    for path in [store.path, *store.children()]:
        current = store if path == store.path else open_store(path)
        floors = read_noise(current, labelling)
        exponent = exponent_of(current, labelling) if floors else 1.0
        rows += [
            (
                path.name if path != store.path else "this map",
                f.variant,
                f"{f.near} / {f.away}",
                f"{f.labels_near:.2%} / {f.labels_away:.2%}",
                f"{f.flips_near:.2%} / {f.flips_away:.2%}",
                verdict(f, exponent),
            )
            for f in floors
        ]
    if not rows:
        command = f"uv run analysis/noise.py --store {shlex.quote(str(store.path))} --share 0.1"
        return f"<p>Not measured. <code>{escape(command)}</code></p>"
    return table_html(rows, ("map", "variant", "cells near / away", "labels changed", "flips", "verdict"))


def provenance_html(store: Store) -> str:
    """Where the numbers come from, and the whole configuration."""
    flat: list[tuple[str, ...]] = [("configuration hash", str(store.attributes["configuration_hash"]))]
    for name, value in store.attributes.get("provenance", {}).items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        flat.append((name, text))
    for name in ("data", "exact"):
        if store.attributes.get(name):
            flat.append((name, str(store.attributes[name])))
    configuration = escape(json.dumps(store.config.to_json(), indent=1))
    return table_html(flat) + f"<details><summary>configuration</summary><pre>{configuration}</pre></details>"


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


# ---- the file


def json_in_html(value: object) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def report_html(found: Map, labelling: Labelling) -> str:
    """The whole page."""
    store = found.store
    thinned = -(-max(found.codes.shape) // MOST_CELLS)
    shown = "" if thinned == 1 else f"; the map below shows every {thinned}th row and column"
    parts = {
        "title": escape(found.title),
        "subtitle": escape(f"{store.path}{shown}"),
        "dimension": dimension_html(found),
        "rules": rules_html(found),
        "noise": noise_html(store, labelling),
        "provenance": provenance_html(store),
        "data": json_in_html(page_data(found)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text("utf-8"))


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """What to report on."""

    store: str  # path of the sweep's store
    out: str = ""  # the HTML file to write (default: figures/report.html inside the store)
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)


def main() -> None:
    """Write the report."""
    options = parse(Options, "Write one self-contained HTML file about a store: maps, dimension, rules, traces, noise.")
    with user_errors():
        store = open_store(options.store)
        found = analyse(store, options, parse_fit(options.fit))
        path = Path(options.out) if options.out else store.figures / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report_html(found, options), "utf-8")
        screen().print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
