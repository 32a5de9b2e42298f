"""Which learning rate, as the answer to one question: `uv run analysis/recommend.py --store S --tokens 30000`.

For each budget: the best rate by the probe with its interval over seeds, the rates within BASINS nat of the best, the
safe rate, and up to where every seed trains (rates and intervals are those of analysis/laws.py). Nothing beyond the
swept rates is named: there a number is a bound. Maps that are no learning rate against something get their best cell.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.measure import Measurement
from rich.table import Table
from simple_parsing import field

from analysis.boundary import is_rate
from analysis.classify import Limits
from analysis.trl import trl_arguments, trl_text
from engine.command import parse, screen, user_errors
from engine.grid import Grid
from engine.measure import MEASUREMENTS
from engine.outcome import DONE, Thresholds, trains
from engine.progress import clock
from engine.store import Store, open_store

if TYPE_CHECKING:
    from analysis.laws import BestRates, Estimate
    from analysis.rules import Turned

WIDEST = 1000  # characters of a table, which takes what it needs of them
SHOWN = 8  # columns in the printed table
FEWEST_RATES = 3


@dataclass(frozen=True)
class Column:
    """What one column of a rate map, a budget say, recommends. Rates are NaN where there is none."""

    at: float  # value of the other axis
    index: int  # of the column
    seeds: int  # replicates that have all rates of it
    best: "Estimate"  # over seeds; ends are NaN below laws.FEWEST_SEEDS
    edge: int  # -1 or 1: the best lies on the lowest or highest rate swept, a bound; else 0
    loss: float  # mean over seeds at the best swept rate
    nearest: int  # index on the rate's axis of the swept rate nearest the best
    within: tuple[tuple[float, float], ...]  # for each of laws.BASINS, the swept rates around the best so near to it
    safe: float  # the largest rate up to which each seed stays within laws.SAFE_NAT of its own best
    trains: float  # the largest rate up to which, from the best on, each seed trains
    supported: float  # one-sided 95% lower bound of the share of seeds, all of these holding


@dataclass(frozen=True)
class BestCell:
    """The cell with the lowest mean over replicates among those that train in all of them."""

    cell: tuple[int, ...]
    values: dict[str, float]  # of the swept hyper-parameters
    score: float
    seeds: int


@dataclass(frozen=True)
class Recommendation:
    """What a store recommends: a rate for each column, and its best cell."""

    store: Store
    thresholds: Thresholds  # of the labels that it follows from
    lr: str  # the swept rate; '' where the map has no columns of one rate
    other: str  # the other axis
    rates: np.ndarray  # swept, ascending, positive; [0] without columns
    columns: tuple[Column, ...]
    best: BestCell | None  # None where no cell trains in all replicates
    law: str  # how the best rate moves with the other axis; '' where the seeds do not carry it
    bits: float = math.nan  # a byte of text, that a nat of loss is; NaN where the store does not say

    @property
    def seeds(self) -> int:
        """Replicates behind it."""
        return max((column.seeds for column in self.columns), default=self.best.seeds if self.best else 0)

    @property
    def by_tokens(self) -> bool:
        """Whether its columns are budgets."""
        return bool(self.columns) and self.other == "tokens"

    def column(self, tokens: float | None = None) -> Column | None:
        """The budget nearest to some tokens, on the log scale; without them the largest that has an answer.

        Where columns are no budgets, that of the best cell; None where nothing trains.

        Raises:
            ValueError: the map has no budgets, or none so large or small.
        """
        if tokens is not None:
            return self.budget(tokens)
        answered = [column for column in self.columns if math.isfinite(column.best.value)]
        if self.by_tokens or not answered:
            return answered[-1] if answered else None
        return min(answered, key=lambda column: column.loss)

    def cell(self, tokens: float | None = None) -> tuple[int, ...] | None:
        """The swept cell nearest the answer, an index a dimension; None where nothing trains."""
        column = self.column(tokens)
        if column is None:
            return self.best.cell if self.best else None
        return None if math.isnan(column.best.value) else self.place(column)

    def cells(self) -> list[tuple[int, ...]]:
        """The swept cell nearest each column's best rate, or the best cell."""
        if not self.columns:
            return [self.best.cell] if self.best else []
        return [self.place(column) for column in self.columns if math.isfinite(column.best.value)]

    def place(self, column: Column) -> tuple[int, ...]:
        """The cell of a column that is nearest its best rate."""
        places = {self.lr: column.nearest, self.other: column.index}
        return tuple(places[name] for name in self.store.run.cells.dims)

    def budget(self, tokens: float) -> Column:
        """`column` of a budget that was asked for."""
        if not self.by_tokens:
            raise ValueError(
                f"got tokens {tokens:g}, but {self.store.path} maps no learning rate against tokens; leave --tokens "
                "out, or sweep --x tokens"
            )
        low, high = self.columns[0].at, self.columns[-1].at
        if not low * (1 - 1e-9) <= tokens <= high * (1 + 1e-9):
            raise ValueError(
                f"got tokens {tokens:g}; expected {low:g} to {high:g}, the budgets that {self.store.path} holds; sweep "
                "tokens further"
            )
        return min(self.columns, key=lambda column: abs(math.log(column.at / tokens)))

    # ---- in words

    def sentence(self, tokens: float | None = None) -> str:
        """The answer in one sentence, with what it holds for.

        Raises:
            ValueError: as `column`.
        """
        column = self.column(tokens)
        said = self.cell_words() if column is None else self.column_words(column, tokens)
        run = self.store.run
        holds = f"{run.config.title}, from {run.config.family.start}, {run.config.workload.setting(run)}"
        return f"{said}. Measured for {holds}: for these only."

    def column_words(self, column: Column, tokens: float | None) -> str:
        """One column's answer."""
        from analysis import laws

        lr, words = map(self.store.config.long_name, (self.lr, self.other))
        at = f"{column.at:,.4g}" if column.at < 1e4 else f"{column.at:,.0f}"
        where = f"For {at} {words}" if self.by_tokens else f"At {words} {at}"
        if tokens is not None and abs(tokens / column.at - 1) > 1e-3:
            where += f" (swept; the nearest to {tokens:,.0f})"
        if (epochs := self.epochs(column)) > 1:
            where += f", which are {epochs:.2g} epochs"
        if math.isnan(column.best.value):
            return f"{where}: no {lr} trains in {'this seed' if column.seeds == 1 else 'all seeds'}"
        if column.edge:
            side, end = ("or lower", self.rates[0]) if column.edge < 0 else ("or higher", self.rates[-1])
            answer = f"a {lr} of {end:.3g} {side}, the edge of what was swept (widen {self.lr})"
        else:
            answer = f"a {lr} of {estimate_text(column.best, self.rates)}"
        nat = laws.BASINS[-1]
        near = f"within {nat} nat of the best: {range_text(column.within[-1], self.rates)}"
        safe = "no rate is safe in all seeds"
        if math.isfinite(column.safe):
            held = f" (all {column.seeds} seeds, so at least {column.supported:.0%} of any)"
            below = ", the swept rate below the best" if column.safe < column.best.value and not column.edge else ""
            safe = f"safe up to {bound_text(column.safe, self.rates)}{below}{held if column.seeds > 1 else ''}"
        draw = "one seed, which is one draw" if column.seeds == 1 else f"{column.seeds} seeds"
        return f"{where}, {answer}; {near}; {safe}; {draw}"

    def epochs(self, column: Column) -> float:
        """How often a column's longest run sees the data; 0 where the store does not say how much there is."""
        epochs = self.store.epochs
        if epochs is None:
            return 0.0
        return float(epochs.take(column.index, axis=1 + self.store.run.cells.dims.index(self.other)).max())

    def cell_words(self) -> str:
        """The best cell's answer."""
        if self.best is None:
            return "No cell trains in all seeds"
        called = self.store.config.long_name
        values = ", ".join(f"{called(name)} {value:.4g}" for name, value in self.best.values.items())
        measure = MEASUREMENTS[self.store.config.workload.ranks]
        units = f" {measure.units}" if measure.units != "1" else ""
        draw = "one seed, which is one draw" if self.best.seeds == 1 else f"mean of {self.best.seeds} seeds"
        return f"The best cell is {values}: {measure.long_name} {self.best.score:.4g}{units} ({draw})"

    def notes(self) -> list[str]:
        """What else to know: the law, more seeds and their cost, cells that are missing."""
        from analysis import laws

        said = [self.law] if self.law else []
        fewest, more = laws.FEWEST_SEEDS, laws.FEWEST_SEEDS - self.store.run.replicates
        if self.columns and more > 0:
            took, cost = self.store.attributes.get("took"), ""
            if took and took["cells"]:
                each = took["seconds"] / took["cells"] * math.prod(self.store.run.cells.shape)
                cost = f", in about {clock(more * each)} as measured here"
            said.append(
                f"An interval needs {fewest} seeds: the same sweep with --replicates {fewest} trains only the {more} "
                f"missing{cost}."
            )
        done, cells = int((self.store.status == DONE).sum()), math.prod(self.store.run.shape)
        if done < cells:
            said.append(f"{done:,} of {cells:,} cells are measured; only whole columns are read.")
        from analysis.distance import distance_note
        from analysis.samples import sample_notes
        from analysis.scores import score_notes

        scores = score_notes(self.store, self.cell())
        far = distance_note(self.store, self.cell(), self.thresholds) if scores else []
        return said + sample_notes(self.store, self.cell()) + scores + far

    def head(self) -> tuple[str, ...]:
        """Names of what `rows` has."""
        from analysis import laws

        near = [f"+{nat} nat" for nat in laws.BASINS]
        bits = ["bits/byte"] if math.isfinite(self.bits) else []
        return (self.other, f"best {self.lr}", "95%", *near, "safe to", "trains", "loss", *bits)

    def rows(self) -> list[tuple[str, ...]]:
        """A row of texts a column that is measured; none for a map that has its best cell only."""
        return [self.row(column) for column in self.columns]

    def row(self, column: Column) -> tuple[str, ...]:
        """One column in texts."""
        at = f"{column.at:.5g}"
        if math.isnan(column.best.value):
            return (at, "none", *[""] * (len(self.head()) - 2))
        best, interval = f"{column.best.value:.3g}", span((column.best.low, column.best.high), self.rates)
        if column.edge:
            best, interval = marked(self.rates[0 if column.edge < 0 else -1], self.rates), f"widen {self.lr}"
        near = [span(each, self.rates) for each in column.within]
        ends = [marked(each, self.rates) for each in (column.safe, column.trains)]
        bits = [f"{column.loss * self.bits:.3f}"] if math.isfinite(self.bits) else []
        return (at, best, interval, *near, *ends, f"{column.loss:.2f}", *bits)

    def summary(self, tokens: float | None = None) -> dict[str, Any]:
        """The answer as plain values (numbers, texts, None), for a report's or W&B's summary."""
        found: dict[str, Any] = {"recommendation": self.sentence(tokens), "seeds": self.seeds}
        column = self.column(tokens)
        if column is not None:
            names = {"best": column.best.value, "low": column.best.low, "high": column.best.high, "safe": column.safe}
            found |= {f"{self.lr}/{name}": plain(value) for name, value in names.items()}
            found |= {self.other: column.at, "loss": plain(column.loss), "on_the_edge": bool(column.edge)}
            if math.isfinite(self.bits):
                found["bits_per_byte"] = plain(column.loss * self.bits)
        elif self.best is not None:
            found |= {f"best/{name}": value for name, value in self.best.values.items()}
            found[f"best/{self.store.config.workload.ranks}"] = self.best.score
        return found


def plain(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def estimate_text(found: "Estimate", rates: np.ndarray) -> str:
    """A rate with its interval, an end beyond the swept rates as a bound."""
    if math.isnan(found.low):
        return f"{found.value:.3g}"
    low = f"{found.low:.3g}" if found.low >= rates[0] else f"below {rates[0]:.3g}"
    high = f"{found.high:.3g}" if found.high <= rates[-1] else f"above {rates[-1]:.3g}"
    return f"{found.value:.3g} [{low}, {high}]"


def marked(rate: float, rates: np.ndarray) -> str:
    """A rate in few characters; on the edge of what was swept, or beyond, as a bound."""
    if math.isnan(rate):
        return "none"
    bound = "<=" if rate <= rates[0] else ">=" if rate >= rates[-1] else ""
    return f"{bound}{np.clip(rate, rates[0], rates[-1]):.2g}"


def span(ends: tuple[float, float], rates: np.ndarray) -> str:
    """A range in few characters, '' where there is none."""
    low, high = (marked(end, rates) for end in ends)
    if math.isnan(ends[0]):
        return ""
    return low if low == high else f"{low}..{high}"


def bound_text(rate: float, rates: np.ndarray) -> str:
    """A largest rate, as a bound on the highest that was swept."""
    if math.isnan(rate):
        return "none"
    return f"{rate:.3g} or more" if rate == rates[-1] else f"{rate:.3g}"


def range_text(ends: tuple[float, float], rates: np.ndarray) -> str:
    """A range of swept rates, its ends on the edge as bounds."""
    if ends[0] == ends[1]:
        return f"{ends[0]:.3g} alone"
    low = f"{ends[0]:.3g}" + (" or less" if ends[0] == rates[0] else "")
    return f"{low} to {bound_text(ends[1], rates)}"


# ---- from a store


def why_not(store: Store) -> str:
    """Why a store recommends nothing, in one line; '' where it does."""
    if missing := [name for name in store.config.workload.labelled if name not in store]:
        return (
            f"{store.path} has no {', '.join(missing)}; expected the probe before and after, by which rates are told "
            "apart; sweep again into another --store"
        )
    measured = (store.status == DONE).any()
    return "" if measured else f"{store.path} has no measured cell yet; expected some; run the sweep"


def recommend(store: Store, thresholds: Thresholds | None = None) -> Recommendation:
    """What a store recommends.

    Raises:
        ValueError: nothing is measured, or the store has no probe of the untrained weights (format 1).
    """
    workload = store.config.workload
    if reason := why_not(store):
        raise ValueError(reason)
    thresholds = thresholds or Thresholds()
    codes = store.labels(thresholds)
    score = store.read(workload.ranks).astype(float)
    done, trained = store.status == DONE, trains(codes)
    cell = best_cell(store, np.where(done & trained, score, np.inf), done)
    if not is_rate_map(store):
        return Recommendation(store, thresholds, "", "", np.empty(0), (), cell, "")
    from analysis import laws
    from analysis.rules import turned

    found = turned(store, thresholds)
    log = found.lr.values > 0
    rates = found.lr.values[log]
    whole = np.logical_and.reduce(found.known, 1)  # [seed, col]
    offset, columns, fits = int((~log).sum()), [], laws.best_rates(rates, found.loss[:, log])
    for col in np.flatnonzero(whole.any(0)).tolist():
        seeds = whole[:, col]
        loss, good = (array[seeds][:, log, col] for array in (found.loss, found.trains))
        own = fits.some(seeds, slice(col, col + 1))
        columns.append(column_of(rates, offset, float(found.other.values[col]), col, loss, good, own))
    law = law_of(found, fits, whole)
    bits = bits_of_a_nat(store, done)
    names = found.lr.name, found.other.name
    return Recommendation(store, thresholds, *names, rates, tuple(columns), cell, law, bits)


def bits_of_a_nat(store: Store, done: np.ndarray) -> float:
    """Bits a byte of held-out text that a nat of held-out loss is: one number a probe; NaN where none is stored."""
    if "val_bits_per_byte" not in store:
        return math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (store.read("val_bits_per_byte").astype(float) / store.read("val_loss"))[done]
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else math.nan


def is_rate_map(store: Store) -> bool:
    """Whether a store maps one learning rate, of FEWEST_RATES values, against something else, by a loss in nat."""
    cells = store.run.cells
    if not isinstance(cells, Grid) or MEASUREMENTS[store.config.workload.ranks].units != "nat":
        return False
    rates = [axis for axis in (cells.y, cells.x) if is_rate(axis)]
    return len(rates) == 1 and int((rates[0].values > 0).sum()) >= FEWEST_RATES


def best_cell(store: Store, score: np.ndarray, done: np.ndarray) -> BestCell | None:
    """The cell of the lowest mean score over the replicates that have it; inf where a run broke."""
    known = done.sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.where(known == known.max(), np.where(done, score, 0).sum(0) / known, np.inf)
    if not np.isfinite(mean).any():
        return None
    cell = tuple(int(i) for i in np.unravel_index(np.where(np.isnan(mean), np.inf, mean).argmin(), mean.shape))
    values = {name: float(np.broadcast_to(v, mean.shape)[cell]) for name, v in store.run.cells.columns.items()}
    return BestCell(cell, values, float(mean[cell]), int(known.max()))


def column_of(
    rates: np.ndarray,
    offset: int,
    at: float,
    index: int,
    loss: np.ndarray,
    trained: np.ndarray,
    found: "BestRates",
) -> Column:
    """What one column recommends.

    Args:
        rates: [rate], ascending and positive.
        offset: rates of the axis below them, which are not positive.
        at, index: of the column.
        loss: [seed, rate], NaN where a run broke.
        trained: bool [seed, rate].
        found: `laws.best_rates` of these losses.
    """
    from analysis import laws

    seeds, nothing = len(loss), laws.Estimate(math.nan, math.nan, math.nan)
    mean = np.where(np.isfinite(loss).all(0), np.nan_to_num(loss).mean(0), np.inf)
    if not np.isfinite(mean).any():
        nowhere = ((math.nan, math.nan),) * len(laws.BASINS)
        return Column(at, index, seeds, nothing, 0, math.nan, 0, nowhere, math.nan, math.nan, math.nan)
    estimate = laws.over_seeds(np.log(found.rate[:, 0]), float(found.bias[0]))
    best = laws.Estimate(*(math.exp(each) for each in (estimate.value, estimate.low, estimate.high)))
    start, last = int(mean.argmin()), len(rates) - 1
    # a seed whose minimum lies on the edge bounds the mean: with half of them, or the mean's own, nothing else does
    share = {side: float((found.edge == side).mean()) for side in (-1, 1)}
    on_edge = [side for side, end in ((-1, 0), (1, last)) if start == end or share[side] >= 0.5]
    low, high = best.low if not share[-1] else -math.inf, best.high if not share[1] else math.inf
    if not math.isnan(best.low):
        best = laws.Estimate(best.value, low, high)
    ranges = [laws.contiguous(mean <= mean[start] + nat, start) for nat in laws.BASINS]
    safe = laws.safe_rates(rates, loss[..., None])
    return Column(
        float(at),
        index,
        seeds,
        best,
        on_edge[0] if on_edge else 0,
        float(mean[start]),
        offset + int(np.abs(np.log(rates / best.value)).argmin()),
        # the best may lie between two swept rates
        tuple((min(float(rates[first]), best.value), max(float(rates[end]), best.value)) for first, end in ranges),
        float(safe.rate[0]),
        float(rates[laws.contiguous(np.logical_and.reduce(trained, 0), start)[1]]),
        safe.supported,
    )


def law_of(found: "Turned", fits: "BestRates", whole: np.ndarray) -> str:
    """How the best rate moves with the other axis, or '' where the whole columns and seeds do not carry it."""
    from analysis import laws

    at, seeds = found.other.values, np.logical_and.reduce(whole, 1)
    if len(at) < laws.FEWEST_COLUMNS or at.min() <= 0 or seeds.sum() < laws.FEWEST_SEEDS:
        return ""
    law = laws.best_rate_law(at, fits.some(seeds))
    if law.refused or not math.isfinite(law.exponent.low):
        return ""
    e = law.exponent
    return (
        f"Ten times the {found.other.long_name}, {law.ten_times:.2f} times the {found.lr.long_name}: "
        f"exponent {e.value:.3f} [{e.low:.3f}, {e.high:.3f}] over {law.seeds} seeds, within the swept range."
    )


# ---- the command


@dataclass(frozen=True, kw_only=True)
class Options(Limits):
    """Which store to ask, and what."""

    store: str  # path of the sweep's store
    tokens: float = 0.0  # the budget asked about (0: the largest)
    form: str = field(default="", alias="--as")  # trl: the equivalent arguments of TRL's SFTConfig instead


def show(found: Recommendation, tokens: float | None = None) -> None:
    """Print the sentence, the notes, and the table of some columns."""
    console = screen()
    console.print(found.sentence(tokens), style="bold", soft_wrap=True)
    for note in found.notes():
        console.print(note, soft_wrap=True)
    if found.columns:
        whole = table(found, shown_columns(found, tokens))
        # as wide as it is, whatever the terminal: a rate that is cut off is another rate
        wide = Measurement.get(console, console.options.update(width=WIDEST), whole).maximum
        screen(width=wide).print(whole)


def shown_columns(found: Recommendation, tokens: float | None) -> Sequence[Column]:
    """SHOWN columns evenly spread, that of the sentence among them."""
    picked = set(np.linspace(0, len(found.columns) - 1, SHOWN).round().astype(int).tolist())
    own = found.column(tokens)
    return [column for i, column in enumerate(found.columns) if i in picked or column is own]


def table(found: Recommendation, columns: Sequence[Column]) -> Table:
    """Some columns as a table."""
    made = Table(box=None, pad_edge=False)
    for name in found.head():
        made.add_column(name, no_wrap=True)
    for column in columns:
        made.add_row(*found.row(column))
    return made


def print_arguments(found: Recommendation, tokens: float | None) -> None:
    """Print TRL's arguments for the swept cell nearest the best rate.

    Raises:
        ValueError: nothing trains, or TRL cannot repeat it.
    """
    cell = found.cell(tokens)
    if cell is None:
        raise ValueError(f"{found.store.path} has no cell that trains in all seeds; expected one; widen the axes")
    screen().print(trl_text(trl_arguments(found.store, cell)), soft_wrap=True)


def main() -> None:
    """Print the recommendation, or the arguments of another trainer."""
    options = parse(Options, "Which learning rate: the best, the safe and the wasted, for each budget of a map.")
    with user_errors():
        if options.form not in ("", "trl"):
            raise ValueError(f"as is {options.form!r}; expected trl, or nothing for words")
        found, tokens = recommend(open_store(options.store), options.thresholds), options.tokens or None
        if options.form:
            print_arguments(found, tokens)
        else:
            show(found, tokens)


if __name__ == "__main__":
    main()
