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
from analysis.maps import Map, analyse, dimension_line, summary
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


def draw_panel(axes: "Axes", panel: str, found: Map) -> None:
    """One of PANELS."""
    if panel == "label":
        draw_labels(axes, found.store, found.codes, found.answer)
    elif panel == "loss":
        draw_loss(axes, found.store, found.codes)
    elif panel == "convergence":
        draw_convergence(axes, found.store, found.codes, found.value)
    else:
        assert panel == "trained" and found.trained is not None
        draw_trained(axes, found.store, found.trained)


def draw(found: Map, panels: tuple[str, ...] = (), size: str = "screen") -> "Figure":
    """Panels side by side, with what was swept above and on what data and seeds below.

    Args:
        panels: of PANELS; default label, loss, and P(train), or convergence of one seed.
        size: one of analysis.panels.SIZES.
    """
    from matplotlib import rc_context

    panels = panels or ("label", "loss", "convergence" if found.trained is None else "trained")
    caption = found.caption + (f" {dimension_line(found.dimension).capitalize()}." if found.dimension else "")
    caption += f" {found.trained.missing}." if found.trained is not None and found.trained.missing else ""
    with rc_context(style(size)):
        figure, places = side_by_side(len(panels), size, found.title, caption)
        for axes, panel in zip(places, panels, strict=True):
            draw_panel(axes, panel, found)
    return figure


@dataclass(frozen=True, kw_only=True)
class Options(Labelling, Picture):
    """What to draw, and where."""

    store: str  # path of the sweep's store
    panel: str = ""  # label, loss, convergence or trained alone (default: three side by side)
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)


def draw_store(path: Where) -> tuple[Map | None, dict[str, Any]]:
    """What a finished sweep ends with: the answer first, then the maps of its first replicate, and the summary.

    Returns:
        The map, None of a list of points, and the answer as plain values.
    """
    store = open_store(path)
    if len(store.run.cells.shape) < 2:
        answer = recommend(store)
        show_answer(answer)
        screen().print(f"{path} holds a list of points, which has no map; read it with engine.open_store")
        return None, answer.summary()
    found = analyse(store.replicate(0), Labelling(), None)
    assert found.answer is not None, "a finished sweep of this version has its probe"
    show_answer(found.answer)
    show(found, save(draw(found), store.figures / "map.png"))
    return found, found.answer.summary()


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
        if options.panel == "trained" and store.run.replicates == 1:
            raise ValueError(f"{store.path} has one seed; expected several for P(train): sweep it with --replicates")
        found = analyse(store, options, parse_fit(options.fit))
        panels = (options.panel,) if options.panel else ()
        path = options.path(store.figures / f"{options.panel or 'map'}.png")
        show(found, save(draw(found, panels, options.size), path))


if __name__ == "__main__":
    main()
