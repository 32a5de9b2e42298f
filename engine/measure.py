"""Measurements: every quantity that is stored of a cell, declared once: array, units, how it is computed.

The store's arrays, the report's entries and the progress line follow from `MEASUREMENTS`. `status` is none of them:
it says whether the others are there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from engine.config import Run

LAST = 20  # steps that last_loss is the mean of


class RowLosses(NamedTuple):
    """Losses of some weights on the probe's sequences, without label smoothing.

    sums: nats of each sequence, float64 [N]. counts: its targets, int64 [N]. text_bytes: what all targets stand for.
    """

    sums: np.ndarray
    counts: np.ndarray
    text_bytes: int

    @property
    def mean(self) -> float:
        """Nats a target."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits of all targets, marks included, a byte of their text; NaN where they have none."""
        return float(self.sums.sum() / self.text_bytes / math.log(2)) if self.text_bytes else math.nan

    def error(self, sums: np.ndarray | None = None) -> float:
        """Standard error of the mean of some sums over the same sequences, which are drawn whole: a ratio estimate."""
        sums = self.sums if sums is None else sums
        count, total = len(sums), self.counts.sum()
        with np.errstate(invalid="ignore", over="ignore"):
            off = sums - sums.sum() / total * self.counts
            return float(np.sqrt(count / (count - 1) * (off**2).sum()) / total)


class Reading(NamedTuple):
    """What a language model's run shows at a mark.

    losses: fp32 [steps until the mark], NaN after a run that broke. steps: taken. nonfinite_step: first step whose
    loss or updated weights are not finite, -1 if none. batch: sequences a step. probe, start: losses of the weights at
    the mark, and of the untrained ones. digest: of the weights. weights: makes the fp32 weights by name, on the CPU.
    sharpness: finds the critical sharpness (`engine.sharpness`).
    """

    losses: np.ndarray
    steps: int
    nonfinite_step: int
    batch: int
    probe: RowLosses
    start: RowLosses
    digest: int
    weights: "Callable[[], dict[str, Tensor]]"
    sharpness: Callable[[], float]


@dataclass(frozen=True)
class Measurement:
    """One stored quantity."""

    long_name: str
    dtype: str
    fill: float
    compute: Mapping[str, Callable[[Any], Any]]
    """workload -> (what it shows) -> the value: of a `Reading` for 'language', of all cells of a `TwoLayerReading`
    for 'two_layer'; a workload that is not named stores none"""
    units: str = "1"
    by_step: bool = False
    """whether it has a value for every step; stored with --trace on"""
    asked: bool = False
    """whether it is stored only where --measure names it"""
    later: bool = False
    """whether stores of this format may lack it, which were made before it was declared"""
    best: str = ""
    """what the progress line calls the lowest value so far; '' for nothing"""


def batch_noise(reading: Reading) -> float:
    """Standard deviation of the untrained network's loss over batches of the run's size, from the probe's sequences."""
    return reading.start.error() * float(np.sqrt(len(reading.start.sums) / reading.batch))


def over_trace(reduce: Callable[[np.ndarray], Any]) -> Callable[[Reading], float]:
    """A reduction over the losses that were computed."""
    return lambda reading: float(reduce(reading.losses[: reading.steps]))


MEASUREMENTS: dict[str, Measurement] = {
    "first_loss": Measurement(
        "loss of the first step, before any update",
        "f4",
        np.nan,
        {"language": lambda r: r.losses[0], "two_layer": lambda r: r.descent.first_loss_R.float()},
        "nat",
    ),
    "last_loss": Measurement(
        f"mean loss of the last {LAST} steps (all, if fewer)",
        "f4",
        np.nan,
        {
            "language": lambda r: r.losses[-LAST:].mean(dtype=np.float64),
            "two_layer": lambda r: r.descent.last_loss_R.float(),
        },
        "nat",
    ),
    "loss_min": Measurement("lowest training loss", "f4", np.nan, {"language": over_trace(np.fmin.reduce)}, "nat"),
    "loss_max": Measurement("highest training loss", "f4", np.nan, {"language": over_trace(np.fmax.reduce)}, "nat"),
    "loss_noise": Measurement(
        "standard deviation of the untrained network's loss over batches",
        "f4",
        np.nan,
        {"language": batch_noise},
        "nat",
    ),
    "val_first": Measurement(
        "held-out loss of the untrained weights", "f4", np.nan, {"language": lambda r: r.start.mean}, "nat"
    ),
    "val_loss": Measurement(
        "held-out loss after the last step",
        "f4",
        np.nan,
        {"language": lambda r: r.probe.mean},
        "nat",
        best="held-out loss",
    ),
    "val_loss_se": Measurement(
        "standard error of val_loss over the held-out sequences",
        "f4",
        np.nan,
        {"language": lambda r: r.probe.error()},
        "nat",
    ),
    "val_difference_se": Measurement(
        "standard error of val_loss - val_first, paired by sequence",
        "f4",
        np.nan,
        {"language": lambda r: r.probe.error(r.probe.sums - r.start.sums)},
        "nat",
    ),
    "val_bits_per_byte": Measurement(
        "val_loss in bits a byte of the held-out targets' text",
        "f4",
        np.nan,
        {"language": lambda r: r.probe.bits_per_byte},
        "bit/byte",
        later=True,
    ),
    "steps": Measurement(
        "steps of the cell's run",
        "i4",
        0,
        {
            "language": lambda r: r.steps,
            "two_layer": lambda r: r.descent.nonfinite_step_R.new_full(r.descent.nonfinite_step_R.shape, r.steps),
        },
    ),
    "nonfinite_step": Measurement(
        "first step whose loss or updated weights are not finite (two_layer: whose loss is not), -1 if none",
        "i4",
        -1,
        {"language": lambda r: r.nonfinite_step, "two_layer": lambda r: r.descent.nonfinite_step_R},
    ),
    "weights_digest": Measurement(
        "64-bit digest of the final weights",
        "u8",
        0,
        {"language": lambda r: r.digest, "two_layer": lambda r: r.descent.weights_digest_R},
    ),
    "measure": Measurement(
        "convergence measure: -sum v if converged, else sum 1/v",
        "f8",
        np.nan,
        {"two_layer": lambda r: r.descent.measure_R},
    ),
    "sharpness": Measurement(
        "critical sharpness: 2 over the rate at which the next update raises its batch's loss",
        "f4",
        np.nan,
        {"language": lambda r: r.sharpness() if r.nonfinite_step < 0 else np.nan},
        asked=True,
    ),
    "losses": Measurement(
        "loss of every step, before its update",
        "f4",
        np.nan,
        {"language": lambda r: r.losses, "two_layer": lambda r: r.descent.losses_RS},
        "nat",
        by_step=True,
    ),
}


def measurements_of(run: "Run") -> dict[str, Measurement]:
    """What a sweep stores of every cell."""
    workload, swept = run.config.family.workload, run.config.swept
    asked = swept.measure.split(",")
    return {
        name: each
        for name, each in MEASUREMENTS.items()
        if workload in each.compute and (swept.trace == "on" or not each.by_step) and (name in asked or not each.asked)
    }
