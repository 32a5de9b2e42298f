"""Pictures of a map, and its one-screen summary: `uv run analysis/plot.py --store S`.

Three panels side by side (analysis/panels.py), or each alone.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.classify import Labelling
from analysis.dimension import parse_fit
from analysis.maps import Map, analyse, dimension_line, summary
from analysis.panels import TEXT, draw_convergence, draw_labels, draw_loss, save
from analysis.recommend import recommend
from analysis.recommend import show as show_answer
from engine.command import parse, screen, user_errors
from engine.store import open_map, open_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """What to draw, and where."""

    store: str  # path of the sweep's store
    out: str = ""  # folder of the pictures (default: figures/ inside the store)
    pdf: bool = False  # write PDFs beside the PNGs
    separate: bool = False  # also write every panel as a picture of its own
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)


def draw_store(path: Path) -> None:
    """What a finished sweep ends with: the answer first, then the maps of its first replicate, and the summary."""
    store = open_store(path)
    show_answer(recommend(store))
    if len(store.run.cells.shape) < 2:
        screen().print(f"{path} holds a list of points, which has no map; read it with engine.open_store")
        return
    found = analyse(store.replicate(0), Labelling(), None)
    show(found, save(draw(found), store.figures, "map", pdf=False))


def show(found: Map, paths: list[Path]) -> None:
    """Print the summary, and where the pictures are."""
    console = screen()
    console.print(summary(found))
    console.print(f"pictures: {', '.join(map(str, paths))}", soft_wrap=True)


def main() -> None:
    """Draw the pictures and print the summary."""
    options = parse(Options, "Draw a store's maps (labels, loss, convergence) and print its one-screen summary.")
    with user_errors():
        store = open_map(options.store, options.replicate)
        found = analyse(store, options, parse_fit(options.fit))
        folder = Path(options.out) if options.out else store.figures
        paths = save(draw(found), folder, "map", options.pdf)
        for panel in ("label", "loss", "convergence") if options.separate else ():
            paths += save(draw_one(found, panel), folder, panel, options.pdf)
        show(found, paths)


if __name__ == "__main__":
    main()
