"""The panels of a picture: labels, loss after training, and the convergence map of Sohl-Dickstein (2024).

All are drawn over the same log axes; the boundary is drawn between the cells it separates, never at the
picture's frame.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.axes import extent, ticks
from analysis.boundary import map_edges
from analysis.classify import counts, measured, trains
from analysis.colours import LABEL_COLOURS, colour_scale, convergence_rgba, equalise, label_rgba
from analysis.overlay import draw_best, draw_epochs
from analysis.stability import draw_stability
from engine.store import Replicate

if TYPE_CHECKING:  # matplotlib takes half a second to import: the drawing functions import what they use
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

MISSING_STYLE: dict[str, Any] = {"facecolor": "#eeeeee", "edgecolor": "#b5b5b5", "hatch": "////"}
MOST_SEGMENTS = 20_000  # boundary segments drawn as lines; more are drawn as pixels
MOST_DRAWN = 2048  # cells a side that a panel draws; of larger maps every n-th
OUTLINED = 128, 0.15  # a convergence map is outlined up to this side and share of boundary blocks
DOTS = 200  # dots an inch of the PNGs
TEXT: dict[Any, Any] = {"font.size": 8.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}


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


def draw_frame(axes: "Axes", store: Replicate, title: str) -> None:
    """Axes, ticks and title of a panel; grey hatching shows through where a cell is missing."""
    from matplotlib.patches import Rectangle

    x, y = extent(store.grid.x), extent(store.grid.y)
    axes.set(xlim=x, ylim=y)
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, lw=0, zorder=0, **MISSING_STYLE))
    draw_epochs(axes, store)
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


def draw_cells(axes: "Axes", store: Replicate, rgba: np.ndarray) -> None:
    """Fill a panel with the colours [row, col, 4] of its cells."""
    axes.imshow(rgba, origin="lower", extent=(*extent(store.grid.x), *extent(store.grid.y)), aspect="auto", zorder=1)


def draw_boundary(axes: "Axes", store: Replicate, codes: np.ndarray, colour: str, casing: str = "") -> None:
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


def draw_labels(axes: "Axes", store: Replicate, codes: np.ndarray) -> None:
    """The label map, its legend below."""
    from matplotlib.patches import Patch

    draw_frame(axes, store, "Label")
    draw_cells(axes, store, label_rgba(thinned(codes)))
    draw_boundary(axes, store, codes, "black", "white")
    patches: list[Any] = draw_best(axes, store)
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


def draw_loss(axes: "Axes", store: Replicate, codes: np.ndarray) -> None:
    """The loss after training: held-out where there is one, else the last; dark where it is not finite or far up."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    held_out = "val_loss" in store
    loss = store.read("val_loss" if held_out else "last_loss").astype(float)
    known = measured(codes)
    start = "val_first" if held_out and "val_first" in store else "first_loss"
    first = float(np.median(store.read(start)[known])) if known.any() else 1.0
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
    draw_stability(axes, store)
    bar = colour_bar(axes, ScalarMappable(norm, scale), extend="max")
    bar.ax.axvline(first, color="black", lw=1.2)
    bar.ax.text(first, 1.25, "start", ha="center", va="bottom", fontsize=7, transform=bar.ax.get_xaxis_transform())
    if not held_out:
        bar.ax.xaxis.set_minor_formatter("")
    bar.set_label("loss (nat a token); dark: not finite, or above" if held_out else "loss; dark: not finite, or above")


def draw_convergence(axes: "Axes", store: Replicate, codes: np.ndarray, value: np.ndarray) -> None:
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


def draw_convergence_cells(axes: "Axes", store: Replicate, codes: np.ndarray, value: np.ndarray) -> None:
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


def save(figure: "Figure", folder: Path, name: str, pdf: bool) -> list[Path]:
    """Write a figure as PNG, and as PDF if asked; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png"] + ([folder / f"{name}.pdf"] if pdf else [])
    for path in paths:
        figure.savefig(path, dpi=DOTS)
    return paths
