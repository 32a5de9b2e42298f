"""Colours that colour-blind readers tell apart, measured by a simulation of their vision."""

import numpy as np
import pytest
from vision import VISIONS, ciede2000, lab_seen

from analysis.colours import GAP, LABEL_COLOURS, MISSING_COLOUR, colour_scale

APART = 15  # CIEDE2000; 1 is just noticeable side by side


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_the_difference_is_that_of_the_published_pairs():
    # Sharma, Wu & Dalal (2005), table 1
    pairs = [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.4900, -0.0010), (50, -2.4900, 0.0011), 7.2195),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    one, other, published = zip(*pairs, strict=True)
    assert ciede2000(np.array(one, float), np.array(other, float)) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("vision", VISIONS)
def test_any_two_labels_are_apart_to_every_kind_of_eye(vision):
    colours = LABEL_COLOURS | {"missing": MISSING_COLOUR}
    seen = lab_seen(np.array([rgb(colour) for colour in colours.values()]), vision)
    differences = ciede2000(seen[:, None], seen[None])
    assert differences[np.triu_indices(len(seen), 1)].min() >= APART


@pytest.mark.parametrize("vision", VISIONS)
def test_the_two_sides_of_a_convergence_map_are_apart_to_every_kind_of_eye(vision):
    scale = colour_scale() / 255
    side = int((1 - GAP) / 2 * len(scale)) + 1
    trains, breaks = lab_seen(scale[:side], vision), lab_seen(scale[-side:], vision)
    assert ciede2000(trains[:, None], breaks[None]).min() >= APART
