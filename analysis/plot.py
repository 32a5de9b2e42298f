"""Pictures of a map, and its one-screen summary: `uv run analysis/plot.py --store S`.

Three panels over the same log axes: the labels, the loss after training, and the convergence map of
Sohl-Dickstein (2024), whose two sides, converging and breaking, are each histogram-equalised. The
boundary is drawn between the cells it separates, never at the picture's frame.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from analysis.boundary import Critical, critical, map_edges
from analysis.classify import Labelling, classify, convergence_value, counts, measured, trains
from analysis.dimension import LEAST_CELLS, Dimension, measure, nulls, parse_fit
from engine.command import parse, screen, user_errors
from engine.grid import Axis
from engine.outcome import LABELS
from engine.store import Store, open_store

if TYPE_CHECKING:  # matplotlib takes half a second to import: the drawing functions import what they use
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

# what trains is blue, what breaks is orange and red: told apart in every common colour blindness
LABEL_COLOURS = {
    "missing": "#00000000",
    "converged": "#0b559f",
    "marginal": "#5ba3d0",
    "undertrained": "#cfe1f2",
    "worsened": "#fdae61",
    "nonfinite": "#a6231c",
    "invalid": "#b9a3c9",
}
# places in [-1, 1]: quick convergence is pale blue, slow is navy; slow divergence dark red, quick is pale
CONVERGENCE_COLOURS = (
    (-1.00, "#081d58"),
    (-0.80, "#225ea8"),
    (-0.55, "#41a1c9"),
    (-0.25, "#d3ecf4"),
    (0.00, "#f7f7f2"),
    (0.25, "#feedbb"),
    (0.55, "#fd9d43"),
    (0.80, "#d7301f"),
    (1.00, "#67000d"),
)
MISSING_STYLE: dict[str, Any] = {"facecolor": "#eeeeee", "edgecolor": "#b5b5b5", "hatch": "////"}
GAP = 0.25  # share of each side's colours left out around 0, so that the two sides never look alike
MOST_SEGMENTS = 20_000  # boundary segments drawn as lines; more are drawn as pixels
MOST_DRAWN = 2048  # cells a side that a panel draws; of larger maps every n-th
OUTLINED = 128, 0.15  # a convergence map is outlined up to this side and share of boundary blocks
DOTS = 200  # dots an inch of the PNGs
TEXT: dict[Any, Any] = {"font.size": 8.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}


# ---- numbers to colours


def equalise(values: np.ndarray, reference: np.ndarray | None = None, gap: float = GAP) -> np.ndarray:
    """Two-sided histogram equalisation to [-1, -gap] and [gap, 1], NaN kept, float64 of the same shape.

    Each side's place is the share of the reference's values of that side at or nearer to 0 (ties at
    their middle), so each side's colours are used evenly and signs are kept.

    Args:
        values: signed convergence values.
        reference: the values that set the scale; default: the same. A side without any stays in the middle.
    """
    reference = values if reference is None else reference
    placed = np.full(values.shape, np.nan)
    for sign in (-1, 1):
        mine = values * sign > 0
        ordered = np.sort(reference[reference * sign > 0] * sign)
        asked = values[mine] * sign
        order = np.argsort(asked)  # searching in order is ten times as fast
        share = np.full(len(asked), 0.5)
        if len(ordered):
            left, right = (np.searchsorted(ordered, asked[order], side) for side in ("left", "right"))
            share[order] = (left + right) / (2 * len(ordered))
        placed[mine] = sign * (gap + (1 - gap) * share)
    return placed


def colour_scale(stops: tuple[tuple[float, str], ...] = CONVERGENCE_COLOURS, size: int = 256) -> np.ndarray:
    """RGB colours [size, 3] uint8 evenly spaced over the stops' range."""
    at = np.array([place for place, _ in stops])
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in stops])
    places = np.linspace(at[0], at[-1], size)
    return np.stack([np.interp(places, at, channel) for channel in rgb.T], -1).round().astype(np.uint8)


def convergence_rgba(placed: np.ndarray) -> np.ndarray:
    """Colours [row, col, 4] uint8 of equalised values; NaN is transparent."""
    scale = colour_scale()
    index = np.nan_to_num((placed + 1) / 2 * (len(scale) - 1)).round().astype(int)
    opaque = np.where(np.isnan(placed), 0, 255).astype(np.uint8)
    return np.concatenate([scale[index], opaque[..., None]], -1)


def label_rgba(codes: np.ndarray) -> np.ndarray:
    """Colours [row, col, 4] uint8 of label codes; missing is transparent."""
    from matplotlib.colors import to_rgba_array

    colours = to_rgba_array([LABEL_COLOURS[name] for name in LABELS])
    return (colours * 255).round().astype(np.uint8)[codes]


# ---- axes


def places(axis: Axis) -> tuple[float, float]:
    """An axis's ends in drawing units: log10 of the value, or the value itself."""
    return (math.log10(axis.low), math.log10(axis.high)) if axis.scale == "log" else (axis.low, axis.high)


def extent(axis: Axis) -> tuple[float, float]:
    """The outer edges of an axis's first and last cell, in drawing units."""
    low, high = places(axis)
    half = (high - low) / max(axis.points - 1, 1) / 2 or 0.5
    return low - half, high + half


def ticks(axis: Axis) -> tuple[np.ndarray, list[str], str]:
    """Where an axis has ticks (drawing units), what they say, and the axis's name.

    Decades where there are three or more, round numbers in narrower ranges; in a zoom too narrow for
    four digits to tell ticks apart, distances from the middle.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = extent(axis)
    log = axis.scale == "log"
    first, last = (10.0**low, 10.0**high) if log else (low, high)
    decades = np.arange(math.ceil(low), math.floor(high) + 1)
    if log and len(decades) >= 3:
        decades = decades[:: -(-len(decades) // 7)]
        return decades, [f"$10^{{{d}}}$" for d in decades], axis.name
    if log and last > 8 * first:
        powers = 10.0 ** np.arange(math.floor(low), math.ceil(high))
        values = (powers[:, None] * (1, 2, 5)).ravel()
        values = values[(values >= first) & (values <= last)]
        return np.log10(values), [number(float(v)) for v in values], axis.name
    middle = (first + last) / 2
    if last - first > 2e-3 * abs(middle):
        values = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(first, last))
        values = values[(values >= first) & (values <= last) & ((values > 0) | (not log))]
        return (np.log10(values) if log else values), [number(float(v)) for v in values], axis.name
    offsets = np.asarray(MaxNLocator(4, symmetric=True).tick_values(first - middle, last - middle))
    offsets = offsets[np.abs(offsets) <= (last - first) / 2]
    power = math.floor(math.log10(np.abs(offsets).max()))
    at = np.log10(middle) + offsets / middle / math.log(10) if log else middle + offsets
    texts = [f"{o / 10.0**power:+.2g}" if o else "0" for o in offsets]
    return at, texts, f"{axis.name} $-$ {middle!r}   ($10^{{{power}}}$)"


def number(value: float) -> str:
    """A tick's number: plain, or times a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"${value / 10.0**power:.4g}\\times10^{{{power}}}$"


def boundary_segments(codes: np.ndarray) -> np.ndarray:
    """Cell sides between a measured cell that trains and one that breaks, [n, 2 ends, (x, y)] in cell units.

    Cell (row, col) spans [col, col + 1] x [row, row + 1].
    """
    good, known = trains(codes), measured(codes)
    across = (good[:, 1:] != good[:, :-1]) & known[:, 1:] & known[:, :-1]
    along = (good[1:] != good[:-1]) & known[1:] & known[:-1]
    row, col = np.nonzero(across)
    upright = np.stack([np.stack([col + 1, row], -1), np.stack([col + 1, row + 1], -1)], 1)
    row, col = np.nonzero(along)
    level = np.stack([np.stack([col, row + 1], -1), np.stack([col + 1, row + 1], -1)], 1)
    return np.concatenate([upright, level]).astype(float)


# ---- panels


def draw_frame(axes: "Axes", store: Store, title: str) -> None:
    """Axes, ticks and title of a panel; grey hatching shows through where a cell is missing."""
    from matplotlib.patches import Rectangle

    x, y = extent(store.grid.x), extent(store.grid.y)
    axes.set(xlim=x, ylim=y)
    axes.add_patch(
        Rectangle(
            (0, 0),
            1,
            1,
            transform=axes.transAxes,
            facecolor="#eeeeee",
            edgecolor="#b5b5b5",
            hatch="////",
            lw=0,
            zorder=0,
        )
    )
    for axis, set_ticks, set_label in (
        (store.grid.x, axes.set_xticks, axes.set_xlabel),
        (store.grid.y, axes.set_yticks, axes.set_ylabel),
    ):
        at, texts, name = ticks(axis)
        set_ticks(at, texts)
        set_label(name)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
    axes.set_box_aspect(1)
    axes.tick_params(length=2.5)


def thinned(cells: np.ndarray) -> np.ndarray:
    """Every n-th row and column of a map too large to draw."""
    step = -(-max(cells.shape[:2]) // MOST_DRAWN)
    return cells[::step, ::step]


def draw_cells(axes: "Axes", store: Store, rgba: np.ndarray) -> None:
    """Fill a panel with the colours [row, col, 4] of its cells."""
    axes.imshow(rgba, origin="lower", extent=(*extent(store.grid.x), *extent(store.grid.y)), aspect="auto", zorder=1)


def draw_boundary(axes: "Axes", store: Store, codes: np.ndarray, colour: str, casing: str = "") -> None:
    """Draw the boundary between the cells it separates; as pixels where it has too many segments."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    segments = boundary_segments(codes)
    if len(segments) > MOST_SEGMENTS:
        blocks = thinned(map_edges(codes))
        rgba = np.zeros((*blocks.shape, 4))
        rgba[blocks] = to_rgba(colour, 0.8)
        draw_cells(axes, store, rgba)
        return
    for column, axis in enumerate((store.grid.x, store.grid.y)):
        low, high = extent(axis)
        segments[..., column] = low + segments[..., column] * (high - low) / axis.points
    width = np.clip(48 / max(store.grid.shape), 0.35, 1.4)
    for shade, scale in ((casing, 2.4), (colour, 1.0)):
        if shade:
            thickness = float(width) * scale
            axes.add_collection(
                LineCollection(list(segments), colors=shade, linewidths=thickness, capstyle="projecting", zorder=2)
            )


def draw_labels(axes: "Axes", store: Store, codes: np.ndarray) -> None:
    """The label map, its legend below."""
    from matplotlib.patches import Patch

    draw_frame(axes, store, "Label")
    draw_cells(axes, store, label_rgba(thinned(codes)))
    draw_boundary(axes, store, codes, "black", "white")
    patches = []
    for name, count in counts(codes).items():
        style: dict[str, Any] = (
            MISSING_STYLE if name == "missing" else {"facecolor": LABEL_COLOURS[name], "edgecolor": "#777777"}
        )
        patches.append(Patch(label=f"{name} {count / codes.size:.0%}", linewidth=0.4, **style))
    axes.legend(
        handles=patches,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        frameon=False,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.2,
    )


def draw_loss(axes: "Axes", store: Store, codes: np.ndarray) -> None:
    """The loss after training: held-out where there is one, else the last; dark where it is not finite or far up."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    held_out = "val_loss" in store
    loss = store.read("val_loss" if held_out else "last_loss").astype(float)
    known = measured(codes)
    first = float(np.median(store.read("first_loss")[known])) if known.any() else 1.0
    finite = loss[known & np.isfinite(loss)]
    low = float(finite.min()) if len(finite) else first / 2
    if held_out:
        norm = Normalize(low, max(1.25 * first, low + 1e-9))
    else:  # a loss that can fall to almost nothing
        low = float(np.clip(np.percentile(finite, 2), first * 1e-4, first / 2)) if len(finite) else first / 2
        norm = LogNorm(low, 1.25 * first)
    scale = colormaps["cividis_r"].with_extremes(over="#1d1d1f")
    drawn = thinned(np.where(np.isfinite(loss), loss, 10 * first))  # far above the scale, which leaves out inf
    rgba = scale(norm(drawn), bytes=True)
    rgba[~thinned(known)] = 0
    draw_frame(axes, store, "Held-out loss after training" if held_out else "Loss after training")
    draw_cells(axes, store, rgba)
    draw_boundary(axes, store, codes, "white", "black")
    bar = colour_bar(axes, ScalarMappable(norm, scale), extend="max")
    bar.ax.axvline(first, color="black", lw=1.2)
    bar.ax.text(first, 1.25, "start", ha="center", va="bottom", fontsize=7, transform=bar.ax.get_xaxis_transform())
    if not held_out:
        bar.ax.xaxis.set_minor_formatter("")
    bar.set_label("loss (nat a token); dark: not finite, or above" if held_out else "loss; dark: not finite, or above")


def draw_convergence(axes: "Axes", store: Store, codes: np.ndarray, value: np.ndarray) -> None:
    """The two-sided equalised convergence map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    draw_frame(axes, store, "Convergence, each side equalised")
    draw_convergence_cells(axes, store, codes, value)
    bar = colour_bar(axes, ScalarMappable(Normalize(-1, 1), ListedColormap(colour_scale() / 255)))
    bar.set_ticks([-1, 0, 1], labels=["trains slowly", "at once", "breaks late"])
    bar.ax.tick_params(length=0)
    texts = bar.ax.get_xticklabels()
    texts[0].set_horizontalalignment("left")
    texts[-1].set_horizontalalignment("right")


def draw_convergence_cells(axes: "Axes", store: Store, codes: np.ndarray, value: np.ndarray) -> None:
    """The cells of a convergence map, outlined where that helps: elsewhere its two colours are the line."""
    draw_cells(axes, store, convergence_rgba(thinned(equalise(value))))
    side, share = OUTLINED
    if max(codes.shape) <= side and (not (blocks := map_edges(codes)).size or blocks.mean() < share):
        draw_boundary(axes, store, codes, "black")


def colour_bar(axes: "Axes", mappable: "ScalarMappable", extend: str = "neither") -> "Colorbar":
    """A thin horizontal colour bar below a panel."""
    inset = axes.inset_axes((0.04, -0.23, 0.92, 0.035))
    bar = axes.figure.colorbar(mappable, cax=inset, orientation="horizontal", extend=extend)
    bar.outline.set_linewidth(0.4)
    return bar


# ---- the picture and the summary


@dataclass(frozen=True)
class Map:
    """A store with everything the picture and the summary say about it."""

    store: Store
    codes: np.ndarray  # label codes [row, col]
    value: np.ndarray  # convergence values [row, col]
    critical: Critical | None  # None without a learning-rate axis
    dimension: Dimension | None  # None without a boundary, or on a map too small for three box sides
    blocks: int  # boundary blocks

    @property
    def title(self) -> str:
        """What was swept, in one line."""
        config, (rows, cols) = self.store.config, self.store.grid.shape
        network = {
            "gpt": f"gpt, depth {config.depth}, width {config.width}",
            "smollm2": "SmolLM2-135M",
            "mlp": f"mlp, {config.nonlinearity}",
        }[config.network]
        return f"{network}: {self.store.grid.y.name} by {self.store.grid.x.name}, {rows} x {cols} cells"


def analyse(store: Store, labelling: Labelling, fit: tuple[int, int] | None) -> Map:
    """Labels, convergence, critical rates and dimension of a store."""
    codes = classify(store, labelling.thresholds)
    blocks = map_edges(codes)
    rated = any(axis.name == "lr" or axis.name.startswith("lr.") for axis in (store.grid.y, store.grid.x))
    large = min(blocks.shape) >= LEAST_CELLS
    return Map(
        store,
        codes,
        convergence_value(store, codes),
        critical(store.grid, codes) if rated else None,
        measure(blocks, fit) if large or fit else None,
        int(blocks.sum()),
    )


def draw(found: Map) -> "Figure":
    """The three panels side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(TEXT):
        figure = Figure(figsize=(12.6, 5.25))
        grid = {"left": 0.05, "right": 0.985, "top": 0.855, "bottom": 0.225, "wspace": 0.17}
        panels = figure.subplots(1, 3, gridspec_kw=grid)
        draw_labels(panels[0], found.store, found.codes)
        draw_loss(panels[1], found.store, found.codes)
        draw_convergence(panels[2], found.store, found.codes, found.value)
        figure.text(0.018, 0.945, found.title, fontsize=11.5, fontweight="bold")
        if found.dimension:
            figure.text(0.985, 0.945, dimension_line(found.dimension), fontsize=8, ha="right", color="#444444")
    return figure


def draw_one(found: Map, panel: str) -> "Figure":
    """One panel alone: label, loss or convergence."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(TEXT):
        figure = Figure(figsize=(5.4, 6.0))
        axes = figure.subplots(gridspec_kw={"left": 0.13, "right": 0.97, "top": 0.95, "bottom": 0.19})
        if panel == "label":
            draw_labels(axes, found.store, found.codes)
        elif panel == "loss":
            draw_loss(axes, found.store, found.codes)
        else:
            draw_convergence(axes, found.store, found.codes, found.value)
    return figure


def dimension_line(d: Dimension) -> str:
    """The dimension with its interval and fit range, in one line."""
    return (
        f"boundary dimension {d.value:.2f} (95%: {d.low:.2f} to {d.high:.2f}; boxes of {d.fit[0]} to {d.fit[1]} cells)"
    )


def save(figure: "Figure", folder: Path, name: str, pdf: bool) -> list[Path]:
    """Write a figure as PNG, and as PDF if asked; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png"] + ([folder / f"{name}.pdf"] if pdf else [])
    for path in paths:
        figure.savefig(path, dpi=DOTS)
    return paths


def summary(found: Map) -> Table:
    """The one-screen summary: grid, labels, critical learning rates, dimension with its nulls."""
    table = Table(title=found.title, show_header=False, title_justify="left", title_style="bold", box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, axis in (("rows", found.store.grid.y), ("columns", found.store.grid.x)):
        table.add_row(name, f"{axis.name}, {axis.points} values, {axis.low:.4g} to {axis.high:.4g} ({axis.scale})")
    cells = found.codes.size
    table.add_row("labels", ", ".join(f"{name} {n} ({n / cells:.0%})" for name, n in counts(found.codes).items()))
    for name, text in critical_lines(found.critical) if found.critical else ():
        table.add_row(name, text)
    if not found.blocks:
        table.add_row("boundary", "none: every measured cell is on one side, so there is no dimension")
    elif found.dimension is None:
        table.add_row("boundary", f"{found.blocks} blocks; the map is too small for a dimension")
    else:
        table.add_row("boundary", f"{found.blocks} of {map_edges(found.codes).size} blocks of 2 x 2 cells")
        d = found.dimension
        table.add_row(
            "dimension",
            f"{d.value:.3f}, 95% interval {d.low:.3f} to {d.high:.3f}, boxes of {d.fit[0]} to {d.fit[1]} cells "
            f"({d.decades:.1f} decades)",
        )
        null = nulls(map_edges(found.codes).shape, d.fit)
        texts = (f"{name} {n.value:.3f}" if n else f"{name}: no boundary" for name, n in null.items())
        table.add_row("nulls", ", ".join(texts))
        if d.warning:
            table.add_row("warning", d.warning, style="yellow")
    return table


def critical_lines(found: Critical, most: int = 8) -> list[tuple[str, str]]:
    """Summary rows of the critical learning rates: the range, and the rate at up to `most` lines."""
    rows = []
    bracketed = np.flatnonzero(found.bracketed)
    name = f"critical {found.lr.name}"
    if not len(bracketed):
        return [(name, f"in none of {found.other.points} lines is the boundary bracketed")]
    chosen = bracketed[np.unique(np.linspace(0, len(bracketed) - 1, most).round().astype(int))]
    rows.append((name, "  ".join(f"{found.value[i]:.2e}" for i in chosen)))
    rows.append((f"at {found.other.name}", "  ".join(f"{found.other.values[i]:<8.3g}" for i in chosen)))
    if len(bracketed) < found.other.points:
        rows.append(("", f"bracketed in {len(bracketed)} of {found.other.points} lines"))
    return rows


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """What to draw, and where."""

    store: str  # path of the sweep's store
    out: str = ""  # folder of the pictures (default: figures/ inside the store)
    pdf: bool = False  # write PDFs beside the PNGs
    separate: bool = False  # also write every panel as a picture of its own
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)


def main() -> None:
    """Draw the pictures and print the summary."""
    options = parse(Options, "Draw a store's maps (labels, loss, convergence) and print its one-screen summary.")
    with user_errors():
        store = open_store(options.store)
        found = analyse(store, options, parse_fit(options.fit))
        folder = Path(options.out) if options.out else store.figures
        paths = save(draw(found), folder, "map", options.pdf)
        for panel in ("label", "loss", "convergence") if options.separate else ():
            paths += save(draw_one(found, panel), folder, panel, options.pdf)
        console = screen()
        console.print(summary(found))
        console.print(f"pictures: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
