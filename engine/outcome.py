"""What a cell's raw numbers say about its run: one label a cell.

Labels are never stored. They are computed from the stored measurements, so that other thresholds give
other maps of the same data: here for the live map of a running sweep, in `analysis/classify.py` for
everything else.
"""

from dataclasses import dataclass

import numpy as np

# status of a cell, as stored
NOT_COMPUTED, DONE = 0, 1

# labels, by code
MISSING, CONVERGED, MARGINAL, UNDERTRAINED, WORSENED, NONFINITE, INVALID = range(7)
LABELS = ("missing", "converged", "marginal", "undertrained", "worsened", "nonfinite", "invalid")


@dataclass(frozen=True)
class Thresholds:
    """Bounds on last_loss / first_loss that separate the finite labels."""

    converged: float = 0.85  # at or below: converged
    moved: float = 0.02  # within 1 +- moved: undertrained; above 1 + moved: worsened; between: marginal


def label(status, first_loss, last_loss, nonfinite_step, thresholds: Thresholds) -> np.ndarray:
    """Label codes of cells, elementwise.

    Args:
        status: NOT_COMPUTED or DONE.
        first_loss: loss of the first step, before any update.
        last_loss: mean loss over the last 20 steps (all, if fewer).
        nonfinite_step: first step whose loss or updated weights were not finite, -1 if none.
        thresholds: bounds on last_loss / first_loss.

    Returns:
        uint8 codes into LABELS, of the arguments' common shape. A cell whose loss is 0 or not finite before
        any update measured nothing and is `invalid`.
    """
    first_loss, last_loss = np.asarray(first_loss, np.float64), np.asarray(last_loss, np.float64)
    ratio = np.divide(last_loss, first_loss, out=np.full(first_loss.shape, np.nan), where=first_loss != 0)
    codes = np.select(
        [
            np.asarray(status) == NOT_COMPUTED,
            ~np.isfinite(first_loss) | (first_loss == 0),
            (np.asarray(nonfinite_step) >= 0) | ~np.isfinite(last_loss),
            ratio > 1 + thresholds.moved,
            ratio >= 1 - thresholds.moved,
            ratio > thresholds.converged,
        ],
        [MISSING, INVALID, NONFINITE, WORSENED, UNDERTRAINED, MARGINAL],
        default=CONVERGED,
    )
    return codes.astype(np.uint8)
