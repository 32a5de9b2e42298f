"""An added measurement: the norm of the final weights. Mirrors engine/measure.py."""

import math

import numpy as np

from engine.measure import Measurement

MIRRORS = ("engine/measure.py",)


def norm(reading) -> float:
    """Euclidean norm over all weights."""
    return math.sqrt(sum(float(weight.double().square().sum()) for weight in reading.weights().values()))


WEIGHT_NORM = Measurement("norm of the final weights", "f4", np.nan, {"language": norm}, best="weight norm")
