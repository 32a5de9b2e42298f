"""The colours of a map: label codes and equalised convergence values as RGBA.

What trains is blue, what breaks is yellow, orange and dark red. Any two labels differ by 20 or more of CIEDE2000,
and any two colours of a convergence map's two sides by 22, to full vision and to eyes without the cones for long,
middle or short wavelengths (Machado et al. 2009): within those hues the palette makes the least difference large. A
convergence map's two sides are each histogram-equalised, as in Sohl-Dickstein (2024).
"""

import numpy as np

from engine.outcome import LABELS

MISSING_COLOUR = "#eeeeee"  # under the hatching of cells that are not computed
LABEL_COLOURS = {
    "missing": "#00000000",
    "converged": "#072f70",
    "marginal": "#2a6ad4",
    "undertrained": "#9fc0f8",
    "worsened": "#f4c531",
    "collapsed": "#d24b12",
    "nonfinite": "#5f0f12",
    "invalid": "#9c798b",
}
# places in [-1, 1]: quick convergence is pale blue, slow is navy; slow divergence dark red, quick is pale
CONVERGENCE_COLOURS = (
    (-1.00, "#081d58"),
    (-0.80, "#225ea8"),
    (-0.55, "#41a1c9"),
    (-0.25, "#d3ecf4"),
    (0.00, "#f7f7f2"),
    (0.25, "#feedbb"),
    (0.55, "#fd9d43"),
    (0.80, "#d7301f"),
    (1.00, "#67000d"),
)
# shares of seeds that train, 0 to 1
SHARE_COLOURS = ((0.0, "#b3410e"), (0.25, "#f0a45e"), (0.5, "#f7f4ec"), (0.75, "#7fabf0"), (1.0, "#0d4db3"))
GAP = 0.25  # share of each side's colours left out around 0, so that the two sides never look alike


def equalise(values: np.ndarray, reference: np.ndarray | None = None, gap: float = GAP) -> np.ndarray:
    """Two-sided histogram equalisation to [-1, -gap] and [gap, 1], NaN kept, float64 of the same shape.

    Each side's place is the share of the reference's values of that side at or nearer to 0 (ties at
    their middle), so each side's colours are used evenly and signs are kept.

    Args:
        values: signed convergence values.
        reference: the values that set the scale; default: the same. A side without any stays in the middle.
    """
    reference = values if reference is None else reference
    placed = np.full(values.shape, np.nan)
    for sign in (-1, 1):
        mine = values * sign > 0
        ordered = np.sort(reference[reference * sign > 0] * sign)
        asked = values[mine] * sign
        order = np.argsort(asked)  # searching in order is ten times as fast
        share = np.full(len(asked), 0.5)
        if len(ordered):
            left, right = (np.searchsorted(ordered, asked[order], side) for side in ("left", "right"))
            share[order] = (left + right) / (2 * len(ordered))
        placed[mine] = sign * (gap + (1 - gap) * share)
    return placed


def colour_scale(stops: tuple[tuple[float, str], ...] = CONVERGENCE_COLOURS, size: int = 256) -> np.ndarray:
    """RGB colours [size, 3] uint8 evenly spaced over the stops' range."""
    at = np.array([place for place, _ in stops])
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in stops])
    places = np.linspace(at[0], at[-1], size)
    return np.stack([np.interp(places, at, channel) for channel in rgb.T], -1).round().astype(np.uint8)


def scale_rgba(values: np.ndarray, stops: tuple[tuple[float, str], ...] = CONVERGENCE_COLOURS) -> np.ndarray:
    """Colours [row, col, 4] uint8 of values within the stops' range; NaN is transparent."""
    scale, low, high = colour_scale(stops), stops[0][0], stops[-1][0]
    index = np.nan_to_num((values - low) / (high - low) * (len(scale) - 1)).round().astype(int)
    opaque = np.where(np.isnan(values), 0, 255).astype(np.uint8)
    return np.concatenate([scale[index], opaque[..., None]], -1)


def label_rgba(codes: np.ndarray) -> np.ndarray:
    """Colours [row, col, 4] uint8 of label codes; missing is transparent."""
    from matplotlib.colors import to_rgba_array

    colours = to_rgba_array([LABEL_COLOURS[name] for name in LABELS])
    return (colours * 255).round().astype(np.uint8)[codes]
