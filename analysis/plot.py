"""Pictures of a map, and its one-screen summary: `uv run analysis/plot.py --store S`.

Three panels side by side (analysis/panels.py), or one alone.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.classify import Labelling
from analysis.dimension import parse_fit
from analysis.maps import Map, Trained, analyse, dimension_line, summary, trained_share
from analysis.panels import Picture, draw_convergence, draw_labels, draw_loss, draw_trained, save, side_by_side, style
from analysis.recommend import recommend
from analysis.recommend import show as show_answer
from engine.command import parse, screen, user_errors
from engine.place import Where
from engine.store import open_map, open_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = ("label", "loss", "convergence", "trained")


def draw_panel(axes: "Axes", panel: str, found: Map, trained: Trained | None) -> None:
    """One of PANELS."""
    if panel == "label":
        draw_labels(axes, found.store, found.codes)
    elif panel == "loss":
        draw_loss(axes, found.store, found.codes)
    elif panel == "convergence":
        draw_convergence(axes, found.store, found.codes, found.value)
    else:
        assert panel == "trained" and trained is not None
        draw_trained(axes, found.store, trained)


def draw(found: Map, trained: Trained | None = None, panels: tuple[str, ...] = (), size: str = "screen") -> "Figure":
    """Panels side by side, with what was swept above and on what data and seeds below.

    Args:
        trained: P(train), for the panel of that name.
        panels: of PANELS; default label, loss, and P(train) or else convergence.
        size: one of analysis.panels.SIZES.
    """
    from matplotlib import rc_context

    panels = panels or ("label", "loss", "convergence" if trained is None else "trained")
    caption = found.caption + (f" {dimension_line(found.dimension).capitalize()}." if found.dimension else "")
    caption += f" {trained.missing}." if trained is not None and trained.missing else ""
    with rc_context(style(size)):
        figure, places = side_by_side(len(panels), size, found.title, caption)
        for axes, panel in zip(places, panels, strict=True):
            draw_panel(axes, panel, found, trained)
    return figure


@dataclass(frozen=True, kw_only=True)
class Options(Labelling, Picture):
    """What to draw, and where."""

    store: str  # path of the sweep's store
    panel: str = ""  # label, loss, convergence or trained alone (default: three side by side)
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)


def draw_store(path: Where) -> dict[str, Any]:
    """What a finished sweep ends with: the answer first, then the maps of its first replicate, and the summary.

    Returns:
        The answer as plain values.
    """
    store = open_store(path)
    answer = recommend(store)
    show_answer(answer)
    if len(store.run.cells.shape) < 2:
        screen().print(f"{path} holds a list of points, which has no map; read it with engine.open_store")
        return answer.summary()
    labelling = Labelling()
    found = analyse(store.replicate(0), labelling, None)
    trained = trained_share(store, labelling.thresholds) if store.run.replicates > 1 else None
    show(found, save(draw(found, trained), store.figures / "map.png"))
    return answer.summary()


def show(found: Map, picture: Path) -> None:
    """Print the summary, and where the picture is."""
    console = screen()
    console.print(summary(found))
    console.print(f"picture: {picture}", soft_wrap=True)


def main() -> None:
    """Draw the picture and print the summary."""
    options = parse(Options, "Draw a store's maps (labels, loss, P(train)) and print its one-screen summary.")
    with user_errors():
        options.check()
        if options.panel and options.panel not in PANELS:
            raise ValueError(f"panel is {options.panel!r}; expected one of {', '.join(PANELS)}")
        store = open_map(options.store, options.replicate)
        several = store.run.replicates > 1
        if options.panel == "trained" and not several:
            raise ValueError(f"{store.path} has one seed; expected several for P(train): sweep it with --replicates")
        found = analyse(store, options, parse_fit(options.fit))
        trained = trained_share(store.store, options.thresholds) if several else None
        panels = (options.panel,) if options.panel else ()
        path = options.path(store.figures / f"{options.panel or 'map'}.png")
        show(found, save(draw(found, trained, panels, options.size), path))


if __name__ == "__main__":
    main()
