"""What a cell's raw numbers say about its run: one label a cell, one rule a workload.

Labels are never stored. They are computed from the stored measurements, so that other thresholds give other
maps of the same data. The live map, W&B, the pictures and the report all use the rule of `Workload.label`.
Whether a run trains or breaks depends on its cell alone; how well it trains is told by its column.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# status of a cell, as stored
NOT_COMPUTED, DONE = 0, 1

# labels, by code
MISSING, CONVERGED, MARGINAL, UNDERTRAINED, WORSENED, COLLAPSED, NONFINITE, INVALID = range(8)
LABELS = ("missing", "converged", "marginal", "undertrained", "worsened", "collapsed", "nonfinite", "invalid")
TRAINS = (CONVERGED, MARGINAL, UNDERTRAINED)  # the run did not break
BREAKS = (WORSENED, COLLAPSED, NONFINITE)  # it did; missing and invalid cells say nothing about either
MEANINGS = {
    "converged": "within a tenth of the way from the start to the best of its budget and seed",
    "marginal": "better than the start, not as good as that",
    "undertrained": "as good as the start, and never far from it",
    "worsened": "worse than the start",
    "collapsed": "as good as the start, but its training losses left it on the way",
    "nonfinite": "a loss or a weight is infinite or not a number",
    "invalid": "nothing to measure: the first loss is 0 or not finite",
    "missing": "not computed yet",
}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Thresholds:
    """Where one label ends and the next begins."""

    converged: float = 0.1  # excess over the best of the budget, as a share of what the best gained, up to which
    moved: float = 0.02  # share of the start's loss that a loss must leave it by to count as moved


def trains(codes: np.ndarray) -> np.ndarray:
    """Whether a cell's run did not break, bool of the same shape; meaningful where `measured`."""
    return np.isin(codes, TRAINS)


def measured(codes: np.ndarray) -> np.ndarray:
    """Whether a cell says anything about training: neither missing nor invalid, bool of the same shape."""
    return np.isin(codes, TRAINS + BREAKS)


def probe_label(arrays: Arrays, budget: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Labels of language models, by the probe at the mark paired with the probe of the untrained weights.

    Args:
        arrays: `status`, `first_loss`, `nonfinite_step`, `val_first`, `val_loss`, `loss_min`, `loss_max` and
            `loss_noise`, each [replicate, *cells].
        budget: tokens planned for each cell, [*cells].
        thresholds: shares of the first probe loss L0, and of what the best of a budget gained.

    Returns:
        uint8 codes into LABELS [replicate, *cells]. Breaks: `nonfinite`; `worsened`, L > L0 (1 + moved);
        `collapsed`, L within L0 (1 +- moved) though a training loss lay further from L0 than that and 4
        `loss_noise`. Trains: `undertrained`, L within L0 (1 +- moved) otherwise; `converged`, where
        (L - L*) / (L0 - L*) <= converged for the best L* of the same budget and replicate; `marginal`, the rest, and
        all of a budget whose cells are not all computed.
    """
    start, loss = (np.asarray(arrays[name], np.float64) for name in ("val_first", "val_loss"))
    first = np.asarray(arrays["first_loss"], np.float64)
    moved = thresholds.moved * start
    reach = moved + 4 * np.asarray(arrays["loss_noise"], np.float64)
    done = np.asarray(arrays["status"]) == DONE
    with np.errstate(invalid="ignore"):
        still = (arrays["loss_min"] >= start - reach) & (arrays["loss_max"] <= start + reach)
        codes = np.select(
            [
                ~done,
                ~np.isfinite(start) | (start == 0) | ~np.isfinite(first) | (first == 0),
                (np.asarray(arrays["nonfinite_step"]) >= 0) | ~np.isfinite(loss),
                loss > start + moved,
                loss >= start - moved,
            ],
            [MISSING, INVALID, NONFINITE, WORSENED, np.where(still, UNDERTRAINED, COLLAPSED)],
            default=MARGINAL,
        )
    best = best_of_budget(np.where(codes == MARGINAL, loss, np.inf), done, budget)
    with np.errstate(invalid="ignore"):
        converged = loss - best <= thresholds.converged * (start - best)
    return np.where((codes == MARGINAL) & converged, CONVERGED, codes).astype(np.uint8)


def best_of_budget(loss: np.ndarray, done: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """The lowest loss among the cells of the same replicate and budget; inf where one of them is not done yet."""
    best = np.full(loss.shape, np.inf)
    for value in np.unique(budget):
        cells = np.broadcast_to(budget == value, loss.shape[1:])
        column, complete = loss[:, cells], done[:, cells].all(1)
        best[:, cells] = np.where(complete, column.min(1), np.inf)[:, None]
    return best


def near_threshold(arrays: Arrays, thresholds: Thresholds) -> np.ndarray:
    """Cells whose probe loss lies within two standard errors of L0 (1 +- moved), paired with L0; bool."""
    start, loss = (np.asarray(arrays[name], np.float64) for name in ("val_first", "val_loss"))
    with np.errstate(invalid="ignore"):
        from_threshold = np.abs(np.abs(loss - start) - thresholds.moved * start)
        return (from_threshold <= 2 * np.asarray(arrays["val_difference_se"])) & (arrays["status"] == DONE)


def measure_label(arrays: Arrays, budget: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Labels of the paper's network, by its own rule: the sign of the stored `measure`.

    Converged where it is negative, else nonfinite if the loss or a weight ever was, else worsened; invalid
    where the first loss is 0 or not finite. uint8 codes of the arrays' shape.
    """
    status, measure, step = (np.asarray(arrays[name]) for name in ("status", "measure", "nonfinite_step"))
    first = np.asarray(arrays["first_loss"])
    codes = np.select(
        [status != DONE, ~np.isfinite(first) | (first == 0) | np.isnan(measure), measure < 0, step >= 0],
        [MISSING, INVALID, CONVERGED, NONFINITE],
        default=WORSENED,
    )
    return codes.astype(np.uint8)


def window_label(arrays: Arrays, budget: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """The old rule, for stores without a probe at step 0: the mean of the last 20 training losses over the first.

    It measures that window as much as the network: critical rates by it follow the window's length.
    """
    first, last = (np.asarray(arrays[name], np.float64) for name in ("first_loss", "last_loss"))
    ratio = np.divide(last, first, out=np.full(first.shape, np.nan), where=first != 0)
    codes = np.select(
        [
            np.asarray(arrays["status"]) != DONE,
            ~np.isfinite(first) | (first == 0),
            (np.asarray(arrays["nonfinite_step"]) >= 0) | ~np.isfinite(last),
            ratio > 1 + thresholds.moved,
            ratio >= 1 - thresholds.moved,
            ratio > WINDOW_CONVERGED,
        ],
        [MISSING, INVALID, NONFINITE, WORSENED, UNDERTRAINED, MARGINAL],
        default=CONVERGED,
    )
    return codes.astype(np.uint8)


WINDOW_CONVERGED = 0.85  # last over first loss, at or below which the old rule says converged
