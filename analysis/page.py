"""What the report's script draws: the arrays of a map as JSON values, and how the page colours them."""

import base64
import math
import shlex

import numpy as np

from analysis.axes import extent
from analysis.classify import measured, trains
from analysis.colours import CONVERGENCE_COLOURS, LABEL_COLOURS, SHARE_COLOURS, colour_scale, equalise
from analysis.maps import Map, Trained
from engine.grid import Axis
from engine.outcome import LABELS, MISSING
from engine.scores import stored_tasks
from engine.store import Replicate

MOST_CELLS = 1024  # a side; larger maps are shown every n-th cell
MOST_STEPS = 100  # steps of a trace; longer ones are shown at as many, evenly spread
MOST_LOSSES = 1_800_000  # losses in the file; larger stores carry the traces of every n-th cell
OVER, NONE = 255, 0  # picture indices of a loss above the scale, and of a cell without one


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as base64 with its little-endian type, for typed arrays."""
    return {
        "dtype": array.dtype.str[1:],
        "bytes": base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode(),
    }


def axis_json(axis: Axis, values: np.ndarray) -> dict:
    """Name in words, values, and the drawn extent (log10 units for a log axis)."""
    low, high = extent(axis)
    return {
        "name": axis.long_name,
        "log": axis.scale == "log",
        "from": low,
        "to": high,
        "values": values.tolist(),
    }


def indexed(scaled: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as picture indices 1..254, above 1 as OVER, NaN as NONE; uint8."""
    index = np.where(scaled > 1, OVER, 1 + np.clip(np.nan_to_num(scaled), 0, 1) * 253)
    return np.where(np.isnan(scaled), NONE, index).round().astype(np.uint8)


def loss_layer(store: Replicate, codes: np.ndarray) -> tuple[np.ndarray, dict]:
    """Picture indices of the loss after training, and how the page colours them."""
    from matplotlib import colormaps

    held_out = "val_loss" in store
    loss = store.read("val_loss" if held_out else "last_loss").astype(float)
    known = measured(codes)
    start = "val_first" if held_out and "val_first" in store else "first_loss"
    first = float(np.median(store.read(start)[known])) if known.any() else 1.0
    finite = loss[known & np.isfinite(loss)]
    low = float(np.percentile(finite, 1)) if len(finite) else first / 2
    high = max(1.25 * first, low * (1 + 1e-6))
    if held_out:
        scaled = (np.where(np.isfinite(loss), loss, np.inf) - low) / (high - low)
    else:
        low = max(low, 1e-4 * first)
        with np.errstate(divide="ignore"):
            scaled = np.log(np.maximum(np.where(np.isfinite(loss), loss, np.inf), low) / low) / math.log(high / low)
    colours = (colormaps["cividis_r"](np.linspace(0, 1, 254))[:, :3] * 255).round().astype(int).tolist()
    layer = {
        "name": "held-out loss" if held_out else "loss",
        "array": "loss_index",
        "line": "#ffffff",
        "colours": [None, *colours, [29, 29, 31]],
        "legend": [["not finite, or above", "#1d1d1f"]],
        "ramp": {"from": f"{low:.3g}", "to": f"{high:.3g}", "colours": [hex_colour(c) for c in colours[::23]]},
    }
    return indexed(np.where(known, scaled, np.nan)), layer


def convergence_layer(value: np.ndarray) -> tuple[np.ndarray, dict]:
    """Picture indices of the equalised convergence map, and how the page colours them."""
    colours = colour_scale(CONVERGENCE_COLOURS, 254).tolist()
    layer = {
        "name": "convergence",
        "array": "convergence_index",
        "line": "#000000",
        "colours": [None, *colours, None],
        "legend": [],
        "ramp": {
            "from": "trains slowly",
            "to": "breaks late",
            "colours": [colour for _, colour in CONVERGENCE_COLOURS],
        },
    }
    return indexed((equalise(value) + 1) / 2), layer


def trained_layer(trained: Trained) -> dict:
    """How the page colours the share of seeds that train."""
    return {
        "name": f"P(train), {trained.seeds} seeds",
        "array": "trained_index",
        "line": "#000000",
        "colours": [None, *colour_scale(SHARE_COLOURS, 254).tolist(), None],
        "legend": [],
        "ramp": {"from": "none trains", "to": "all train", "colours": [colour for _, colour in SHARE_COLOURS]},
    }


def label_layer(codes: np.ndarray) -> dict:
    """How the page colours label codes."""
    present = [code for code in range(1, len(LABELS)) if (codes == code).any()]
    rgb = [[int(LABEL_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)] for name in LABELS]
    return {
        "name": "labels",
        "array": "codes",
        "line": "#000000",
        "colours": [None, *rgb[1:]],
        "legend": [[LABELS[code], LABEL_COLOURS[LABELS[code]]] for code in present],
    }


def hex_colour(rgb: list[int]) -> str:
    """#rrggbb."""
    return "#" + "".join(f"{channel:02x}" for channel in rgb)


def traces_json(store: Replicate, stride: int) -> dict | None:
    """Loss traces at up to MOST_STEPS steps, of as many shown cells as MOST_LOSSES allows; None if not stored."""
    if "losses" not in store:
        return None
    longest = int(store.planned_steps.max())
    steps = np.unique(np.linspace(0, longest - 1, MOST_STEPS).round().astype(np.int32))
    rows, cols = (-(-side // stride) for side in store.grid.shape)
    thin = math.ceil(math.sqrt(max(rows * cols * len(steps) / MOST_LOSSES, 1)))
    every = stride * thin
    losses = np.stack(
        [
            store.read("losses", rows=slice(row, row + 1))[0, ::every, :][:, steps]
            for row in range(0, store.grid.shape[0], every)
        ]
    )
    return {"step": packed(steps), "losses": packed(losses.astype(np.float32)), "row_stride": thin, "col_stride": thin}


def page_data(found: Map, live: bool = False, distance: np.ndarray | None = None) -> dict:
    """Everything the page's script draws, as JSON values; of a running sweep without traces and P(train).

    Args:
        distance: of the cells to the border of training, decades.
    """
    store, stride = found.store, -(-max(found.codes.shape) // MOST_CELLS)
    loss_index, loss = loss_layer(store, found.codes)
    convergence_index, convergence = convergence_layer(found.value)
    arrays = {
        "codes": found.codes,
        "side": np.where(measured(found.codes), trains(found.codes), 2).astype(np.uint8),
        "loss_index": loss_index,
        "convergence_index": convergence_index,
        "value": found.value.astype(np.float32),
    }
    layers, values = [label_layer(found.codes), loss, convergence], [["convergence value", "value"]]
    if (trained := found.trained) is not None and not live:
        layers.append(trained_layer(trained))
        arrays |= {"trained": trained.share.astype(np.float32), "trained_index": indexed(trained.share)}
        values.append(["share of seeds that train", "trained"])
    for name, spec in store.store.specs.items():
        if name != "status" and not spec.by_step and spec.dtype != "u8":  # digests are no numbers to look at
            arrays[name] = store.read(name)
            values.append([spec.long_name, name])
    if distance is not None:
        arrays["distance"] = distance.astype(np.float32)
        values.append(["decades inside the border", "distance"])
    for task in stored_tasks(store.store):
        arrays[f"score {task.task}"] = task.read(task.measure)[store.index].astype(np.float32)
        values.append([f"{task.task}: {task.measure}", f"score {task.task}"])
    thinned = {name: array[::stride, ::stride] for name, array in arrays.items()}
    return {
        "shape": thinned["codes"].shape,
        "stride": stride,
        "store": shlex.quote(str(store.path)),
        "replicate": f" --replicate {store.index}" if store.index else "",
        "labels": LABELS,
        "y": axis_json(store.grid.y, store.grid.y.values[::stride]),
        "x": axis_json(store.grid.x, store.grid.x.values[::stride]),
        "layers": layers,
        "values": values,
        "arrays": {name: packed(array) for name, array in thinned.items()},
        "traces": None if live else traces_json(store, stride),
        "live": live,
        "cells": [int((found.codes != MISSING).sum()), found.codes.size],
    }
