"""The panels of a picture: labels, loss after training, convergence (Sohl-Dickstein 2024), and P(train) over seeds.

All are drawn over the same axes; the boundary is drawn between the cells it separates, never at the picture's frame.
Legends and colour bars stand below their panels, where they hide nothing.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.axes import extent, middles, place_of, ticks
from analysis.boundary import map_edges
from analysis.classify import counts, measured, trains
from analysis.colours import (
    LABEL_COLOURS,
    MISSING_COLOUR,
    SHARE_COLOURS,
    colour_scale,
    equalise,
    label_rgba,
    scale_rgba,
)
from analysis.overlay import draw_best, draw_epochs
from analysis.recommend import Recommendation
from analysis.stability import draw_stability
from engine.store import Replicate

if TYPE_CHECKING:  # matplotlib takes half a second to import: the drawing functions import what they use
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

    from analysis.maps import Trained

MISSING_STYLE: dict[str, Any] = {"facecolor": MISSING_COLOUR, "edgecolor": "#b5b5b5", "hatch": "////"}
MOST_SEGMENTS = 20_000  # boundary segments drawn as lines; more are drawn as pixels
MOST_DRAWN = 2048  # cells a side that a panel draws; of larger maps every n-th
OUTLINED = 128, 0.15  # a convergence map is outlined up to this side and share of boundary blocks
DOTS = 200  # dots an inch of the PNGs
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Size:
    """How wide a picture is, in inches, and how large its letters are, in points."""

    width: float  # of several panels side by side
    alone: float  # of one
    font: float


# a slide is 13.3 inches wide and read from 14 points, a paper's two columns are 6.9 and one is 3.4
SIZES = {"screen": Size(12.9, 5.6, 8.5), "slide": Size(13.3, 7.4, 14.0), "paper": Size(6.9, 3.4, 6.5)}
# what stands around a panel, in heights of a letter: ticks and name at the left; title above; ticks, name, legend below
LEFT, ABOVE, BELOW, APART = 5.2, 2.2, 9.2, 0.8


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Where a picture is written, and for what; shared by the commands that draw."""

    to: str = ""  # the picture to write: .png, .pdf or .svg (default: a .png in figures/ inside the store)
    size: str = "screen"  # screen, slide (large letters) or paper (two columns wide)

    def check(self) -> None:
        """Raise ValueError for a size or a kind of picture that there is not."""
        check_picture(self.to, self.size)

    def path(self, default: Path) -> Path:
        """Where to write."""
        return Path(self.to) if self.to else default


def check_picture(to: str, size: str) -> None:
    """Raise ValueError for a size or a kind of picture that there is not."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    if to and Path(to).suffix.lower() not in SUFFIXES:
        raise ValueError(f"to is {to!r}; expected a name that ends in one of {', '.join(SUFFIXES)}")


def style(size: str) -> dict[Any, Any]:
    """matplotlib's settings for a size of picture."""
    font = SIZES[size].font
    line = font / 14
    return {
        "font.size": font,
        "axes.titlesize": 1.12 * font,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.fontsize": 0.9 * font,
        "legend.frameon": False,
        "axes.linewidth": line,
        "xtick.major.width": line,
        "ytick.major.width": line,
        "xtick.major.size": 0.3 * font,
        "ytick.major.size": 0.3 * font,
        "xtick.major.pad": 0.35 * font,
        "ytick.major.pad": 0.35 * font,
        "axes.labelpad": 0.35 * font,
        "svg.fonttype": "none",
    }


def drawable(text: str) -> str:
    """Text whose letters all are some: under a locale without unicode, names of files hold bytes that are none."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def side_by_side(count: int, size: str, title: str, caption: str) -> "tuple[Figure, list[Axes]]":
    """A figure of square panels with a title above and a caption below; call it within `style(size)`.

    All places are computed from the letters' size, so that nothing lies over anything at any size.
    """
    from matplotlib.figure import Figure

    of, em = SIZES[size], SIZES[size].font / 72
    width = min(of.width, 0.8 * of.alone * count) if count > 1 else of.alone
    side = (width - count * (LEFT + APART) * em) / count
    # a letter is about half as wide as high, a bold one of the title 0.8
    lines = textwrap.wrap(drawable(caption), int(width / em / 0.58))
    titles = textwrap.wrap(drawable(title), int(width / em / 0.82))
    head, foot = (1.8 * len(titles) + ABOVE) * em, (BELOW + 1.3 * len(lines)) * em
    height = head + side + foot
    figure = Figure(figsize=(width, height))
    panels = []
    for i in range(count):
        left = (i * (side + (LEFT + APART) * em) + LEFT * em) / width
        panels.append(figure.add_axes((left, foot / height, side / width, side / height)))
    figure.text(em / width, 1 - 0.6 * em / height, "\n".join(titles), va="top", fontsize=1.3 * of.font, weight="bold")
    figure.text(em / width, 0.6 * em / height, "\n".join(lines), va="bottom", color="#444444")
    return figure, panels


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
    axes.set_title(title)
    axes.set_box_aspect(1)


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


def draw_labels(axes: "Axes", store: Replicate, codes: np.ndarray, answer: Recommendation | None) -> None:
    """The label map with what the store recommends, its legend below."""
    from matplotlib.patches import Patch

    draw_frame(axes, store, "Label")
    draw_cells(axes, store, label_rgba(thinned(codes)))
    draw_boundary(axes, store, codes, "black", "white")
    patches: list[Any] = draw_best(axes, store, answer)
    for name, count in counts(codes).items():
        style: dict[str, Any] = (
            MISSING_STYLE if name == "missing" else {"facecolor": LABEL_COLOURS[name], "edgecolor": "#777777"}
        )
        patches.append(Patch(label=f"{name} {count / codes.size:.0%}", linewidth=0.4, **style))
    legend_below(axes, patches)


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
    draw_frame(axes, store, "Held-out loss" if held_out else "Last loss")
    draw_cells(axes, store, rgba)
    draw_boundary(axes, store, codes, "white", "black")
    draw_stability(axes, store)
    bar = colour_bar(axes, ScalarMappable(norm, scale), extend="max")
    bar.ax.axvline(first, color="black", lw=1.2)
    bar.ax.text(first, 1.2, "start", ha="center", va="bottom", size="small", transform=bar.ax.get_xaxis_transform())
    if not held_out:
        bar.ax.xaxis.set_minor_formatter("")
    bar.set_label(f"{'nat a token' if held_out else 'loss'}; dark: not finite, or above")


def draw_convergence(axes: "Axes", store: Replicate, codes: np.ndarray, value: np.ndarray) -> None:
    """The two-sided equalised convergence map."""
    draw_frame(axes, store, "Convergence, each side equalised")
    draw_convergence_cells(axes, store, codes, value)
    convergence_bar(axes)


def convergence_bar(axes: "Axes") -> None:
    """The legend of a convergence map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    bar = colour_bar(axes, ScalarMappable(Normalize(-1, 1), ListedColormap(colour_scale() / 255)))
    bar.set_ticks([-1, 0, 1], labels=["trains slowly", "at once", "breaks late"])
    bar.ax.tick_params(length=0)
    texts = bar.ax.get_xticklabels()
    texts[0].set_horizontalalignment("left")
    texts[-1].set_horizontalalignment("right")


def draw_convergence_cells(axes: "Axes", store: Replicate, codes: np.ndarray, value: np.ndarray) -> None:
    """The cells of a convergence map, outlined where that helps: elsewhere its two colours are the line."""
    draw_cells(axes, store, scale_rgba(thinned(equalise(value))))
    side, share = OUTLINED
    if max(codes.shape) <= side and (not (blocks := map_edges(codes)).size or blocks.mean() < share):
        draw_boundary(axes, store, codes, "black")


def draw_trained(axes: "Axes", store: Replicate, found: "Trained") -> None:
    """P(train) over seeds, with the rates at which it first falls below each level, and the islands above LR50."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.lines import Line2D

    draw_frame(axes, store, f"P(train) over {found.seeds} seeds")
    draw_cells(axes, store, scale_rgba(thinned(found.share), SHARE_COLOURS))
    colour_bar(axes, ScalarMappable(Normalize(0, 1), ListedColormap(colour_scale(SHARE_COLOURS) / 255)))
    if found.borders is None:
        return
    lr, other = (store.grid.y, store.grid.x) if found.lr_rows else (store.grid.x, store.grid.y)
    along = middles(other)
    handles = []
    for level, rate, line in zip(found.borders.levels, found.borders.rate, ("-", "--"), strict=False):
        inside = np.isfinite(rate) & (rate > 0)
        place = np.where(inside, place_of(lr, np.where(inside, rate, lr.high)), np.nan)
        for colour, width in (("white", 3.2), ("black", 1.6)):
            axes.plot(*((along, place) if found.lr_rows else (place, along)), line, color=colour, lw=width, zorder=3)
        handles.append(Line2D([], [], ls=line, color="black", lw=1.6, label=f"LR{100 * level:.0f}"))
    pieces = []
    half = (along[1] - along[0]) / 3 if len(along) > 1 else 0.1
    for at, ranges in zip(along, found.borders.islands[0], strict=True):
        for low, high in ranges:
            for u in (at - half, at + half):  # the two sides of a bracket
                ends = [(u, place_of(lr, low)), (u, place_of(lr, high))]
                pieces.append(ends if found.lr_rows else [(v, u) for u, v in ends])
    if pieces:
        axes.add_collection(LineCollection(pieces, colors="black", linewidths=1.0, linestyles=":", zorder=3))
        handles.append(Line2D([], [], ls=":", color="black", lw=1.0, label="islands: half train again"))
    legend_below(axes, handles, lines=6.6)


def below(axes: "Axes", lines: float) -> "Transform":
    """A panel's own coordinates, moved down by some lines of text."""
    from matplotlib import rcParams
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(0, -lines * rcParams["font.size"] / 72, axes.figure.dpi_scale_trans)


def legend_below(axes: "Axes", handles: list[Any], lines: float = 2.9) -> None:
    """A legend some lines of text under a panel, in as many columns as its width has place for."""
    from matplotlib import rcParams

    side = axes.get_window_extent().width * 72 / axes.figure.dpi / rcParams["font.size"]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below(axes, lines),
        ncols=3 if side > 26 else 2,
        handlelength=1.3,
        handleheight=1.0,
        columnspacing=1.0,
        borderaxespad=0,
    )


def colour_bar(axes: "Axes", mappable: "ScalarMappable", extend: str = "neither") -> "Colorbar":
    """A thin horizontal colour bar under a panel's ticks and name."""
    inset = axes.inset_axes((0.04, -0.035, 0.92, 0.035), transform=below(axes, 4.4))
    bar = axes.figure.colorbar(mappable, cax=inset, orientation="horizontal", extend=extend)
    bar.outline.set_linewidth(0.4)
    return bar


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as what the path's suffix says; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS)
    return path
