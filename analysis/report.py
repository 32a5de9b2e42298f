"""One self-contained HTML file about a store: `uv run analysis/report.py --store S`.

The answer first; maps on a canvas with pan, zoom and hover, by mouse or keys; loss traces of chosen cells; what the
labels mean; rules of thumb over seeds; how it was measured, with the boundary's dimension, the noise floor, where it
was measured, and provenance; and for every cell the command that replays it. The page (report.html, .css and .js
beside this file) needs no network.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path

import numpy as np
from rich.table import Table

from analysis.boundary import map_edges
from analysis.charts import Series, chart
from analysis.classify import Labelling, counts
from analysis.colours import LABEL_COLOURS, MISSING_COLOUR
from analysis.dimension import nulls, parse_fit
from analysis.distance import cell_distances, findings
from analysis.distance import table as relations_table
from analysis.evaluate import scores_table
from analysis.maps import Map, analyse
from analysis.noise import depth_of, percent_words, read_noise, verdict
from analysis.page import page_data
from analysis.recommend import shown_columns, why_not
from analysis.rules import mean_rates, rules, sentences
from analysis.samples import read_samples
from analysis.scores import score_line
from engine.command import parse, screen, user_errors
from engine.outcome import MEANINGS, Thresholds
from engine.replay import cell_name
from engine.scores import stored_tasks
from engine.store import Replicate, Store, open_map

SAMPLE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FORMS_IN_WORDS = {"chat": "the prompts are a user's messages.", "text": "the prompts are gone on with."}
FILES = {kind: Path(__file__).with_name(f"report.{kind}") for kind in ("html", "css", "js")}


def table_html(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """A table; every text is escaped."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def rich_html(table: Table) -> str:
    """A table that a command prints."""
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    return table_html([tuple(map(str, row)) for row in rows], tuple(str(column.header) for column in table.columns))


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
    series = [Series(name, n.sizes, n.counts, "#6b7079") for name, n in null.items() if n]
    series += [
        Series("", d.sizes, d.counts, "var(--accent)", dots=True),
        Series("this boundary", d.sizes[d.in_fit], slope, "var(--accent)"),
    ]
    return (
        table_html(rows, ("boundary", "dimension", "95% interval"))
        + fit
        + warning
        + chart(series, "box side, cells", "boxes")
    )


def rules_html(store: Store, thresholds: Thresholds) -> str:
    """Rules of thumb with the plot of best and critical rates, or why there are none."""
    try:
        r = rules(store, thresholds)
    except ValueError as error:
        return f"<p>{escape(str(error))}</p>"
    x, series = r.found.other.values, []
    if r.borders is not None:
        for i, level in enumerate(r.borders.levels):
            rate = np.where(np.isfinite(r.borders.rate[i]), r.borders.rate[i], 0)
            series.append(Series(f"P = {level:g}", x, rate, ("#5f0f12", "#d24b12")[i]))
    if r.safe is not None:
        series.append(Series("safe", x, np.nan_to_num(r.safe.rate), "#6b7079"))
    if r.best is not None:
        best = np.nan_to_num(mean_rates(r.best.rate))
        series.append(Series("best", x, best, "var(--accent)", dots=True))
    drawn = any((each.y > 0).any() for each in series) and (x > 0).all()
    return table_html(sentences(r)) + (chart(series, r.found.other.name, r.found.lr.name) if drawn else "")


def noise_html(store: Replicate, labelling: Labelling) -> str:
    """The noise floor of the store and its zooms, where measured."""
    rows = []
    for path in [store.path, *store.children()]:
        current = store if path == store.path else open_map(path)
        floors = read_noise(current, labelling)
        depth = depth_of(current)
        rows += [
            (
                path.name if path != store.path else "this map",
                f.variant,
                f"{f.near} / {f.away}",
                f"{f.labels_near:.2%} / {f.labels_away:.2%}",
                f"{percent_words(f.flips_near, f.flips_near_interval)} / {f.flips_away:.2%}",
                verdict(f, depth),
            )
            for f in floors
        ]
    if not rows:
        command = f"uv run analysis/noise.py --store {shlex.quote(str(store.path))} --share 0.1"
        return f"<p>Not measured. <code>{escape(command)}</code></p>"
    return table_html(rows, ("map", "variant", "cells near / away", "labels changed", "flips", "verdict"))


def provenance_html(store: Replicate) -> str:
    """Where the numbers come from, and the whole configuration."""
    flat: list[tuple[str, ...]] = [("configuration hash", str(store.attributes["configuration_hash"]))]
    for name, value in store.attributes.get("provenance", {}).items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        flat.append((name, text))
    for name in ("data", "exact"):
        if store.attributes.get(name):
            flat.append((name, str(store.attributes[name])))
    configuration = escape(json.dumps(store.config.flat(), indent=1))
    return table_html(flat) + f"<details><summary>configuration</summary><pre>{configuration}</pre></details>"


def json_in_html(value: object) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def answer_html(of: Map) -> str:
    """The recommendation in words, what else to know of it, and its columns; or why there is none."""
    found = of.answer
    if found is None:
        return f"<p>{escape(why_not(of.store.store))}</p>"
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in found.notes())
    rows = [found.row(column) for column in shown_columns(found, None)] if found.columns else []
    table = table_html(rows, found.head()) if rows else ""
    scroll = f'<div class="scroll" tabindex="0" role="group" aria-label="best rates">{table}</div>' if table else ""
    return f'<p class="answer">{escape(found.sentence())}</p>{notes}{scroll}'


def scores_html(store: Store, thresholds: Thresholds) -> str:
    """What cells score and what that has to do with the border, as a section; '' without scores."""
    if not stored_tasks(store):
        return ""
    said = rich_html(scores_table(store))
    try:
        found = findings(store, thresholds)
        said += rich_html(relations_table(found))
        words = [found.sentence(), *(each.sentence() for each in found.resolutions), *found.left_out]
    except ValueError as error:  # no border, or no probe
        words = [str(error)]
    said += "".join(f'<p class="soft">{escape(each)}</p>' for each in words if each)
    return f'<section aria-labelledby="scores"><h2 id="scores">Scores</h2><div class="scroll">{said}</div></section>'


def samples_html(store: Store) -> str:
    """What chosen cells write before and after training, with their losses, scores and commands, as a section; ''
    without samples."""
    samples = read_samples(store)
    if samples is None:
        return ""
    parts, series, tasks = [], [], stored_tasks(store)
    for colour, each in zip(cycle(SAMPLE_COLOURS), samples.cells, strict=False):
        replicate, *cell = each.place
        words = ["--store", str(store.path), "--row", str(cell[0]), "--col", str([*cell, 0][1])]
        words += ["--replicate", str(replicate)] if replicate else []
        again = shlex.join(["uv", "run", "engine/replay.py", *words])
        name = f"{each.why}: {cell_name(store, each.place)}"
        scores = [score_line(task, tuple(cell)) for task in tasks]
        rows = list(zip(samples.prompts, each.start, each.end, strict=True))
        parts += [
            f'<h3><i class="swatch" style="background:{colour}"></i>{escape(name)}</h3>',
            table_html(rows, ("prompt", "before training", "after")),
            *[f'<p class="soft">{escape(line)}</p>' for line in scores if line],
            f"<code>{escape(again)}</code><code>{escape(f'{again} --save-weights cell.safetensors')}</code>",
        ]
        if "losses" in store:
            losses = store.read("losses", replicate, slice(cell[0], cell[0] + 1))[0][tuple(cell[1:])]
            step = np.arange(1, len(losses) + 1)
            series.append(Series("", step, np.nan_to_num(losses, posinf=0.0), colour))
    drawn = any((each.y > 0).any() for each in series)
    plot = chart(series, "step", "training loss") if drawn else ""
    told = f"Greedy, at most {samples.tokens} tokens; " + FORMS_IN_WORDS[samples.form]
    return (
        '<section class="samples" aria-labelledby="samples"><h2 id="samples">Before and after</h2>'
        f'<p class="soft">{told}</p>{plot}<div class="scroll" tabindex="0" role="group" aria-label="samples">'
        f"{''.join(parts)}</div></section>"
    )


def labels_html(codes: np.ndarray) -> str:
    """Every label of the map with its colour, its cells and its meaning."""
    rows = []
    for name, count in counts(codes).items():
        colour = MISSING_COLOUR if name == "missing" else LABEL_COLOURS[name]
        rows.append(
            f'<dt><i style="background:{colour}"></i>{name}, {count:,} cells</dt><dd>{escape(MEANINGS[name])}</dd>'
        )
    return f'<dl class="labels">{"".join(rows)}</dl>'


def measured_html(found: Map) -> str:
    """Network, data and seeds, in a sentence or two."""
    return f"<p>{escape(found.title)}. {escape(found.caption)}</p>"


def write_report(path: Path, labelling: Labelling, found: Map, distance: bool = False) -> None:
    """Write the page; `distance`: with each cell's to the border. Raises ValueError where there is none."""
    far = cell_distances(found.store.store, labelling.thresholds) if distance else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(found, labelling, distance=far), "utf-8")


def report_html(found: Map, labelling: Labelling, live: bool = False, distance: np.ndarray | None = None) -> str:
    """The whole page; live, it asks analysis/serve.py for what is new. distance: of the cells to the border."""
    store = found.store
    data = page_data(found, live, distance)
    shown = "" if data["stride"] == 1 else f"; the map below shows every {data['stride']}th row and column"
    parts = {
        "title": escape(found.title),
        "subtitle": escape(f"{store.path}{shown}"),
        "style": FILES["css"].read_text("utf-8"),
        "script": FILES["js"].read_text("utf-8"),
        "answer": answer_html(found),
        "labels": labels_html(found.codes),
        "measured": measured_html(found),
        "dimension": dimension_html(found),
        "samples": samples_html(store.store),
        "scores": scores_html(store.store, found.thresholds),
        "rules": rules_html(store.store, found.thresholds),
        "noise": noise_html(store, labelling),
        "provenance": provenance_html(store),
        "data": json_in_html(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], FILES["html"].read_text("utf-8"))


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """What to report on."""

    store: str  # path of the sweep's store
    out: str = ""  # the HTML file to write (default: figures/report.html inside the store)
    distance: bool = False  # show each cell's distance to the border of training
    fit: str = ""  # box sides of the dimension's fit, low:high in cells (default: 2 to an eighth of the side)
    serve: bool = False  # show the sweep live in a browser on this machine instead, while it runs
    port: int = 8377  # of the live page on the loopback (0: any that is free)


def main() -> None:
    """Write the report."""
    options = parse(Options, "Write one self-contained HTML file about a store: maps, dimension, rules, traces, noise.")
    with user_errors():
        if options.serve:
            from analysis.serve import serve

            serve(options.store, options, options.port)
            return
        store = open_map(options.store, options.replicate)
        found = analyse(store, options, parse_fit(options.fit))
        path = Path(options.out) if options.out else store.figures / "report.html"
        write_report(path, options, found, options.distance)
        screen().print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
