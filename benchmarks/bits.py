"""Do two versions of this project train the same bits? `uv run benchmarks/bits.py --before CHECKOUT`.

Every case is one sweep, trained by both with the same flags; compared are each cell's losses and the digest of its
final weights. Exit code 0 if all are equal. The machine's Python must serve both.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from rich.table import Table

from engine.command import parse, screen, user_errors

HERE = Path(__file__).parent.parent
SMALL = "--depth 2 --width 128 --heads 2 --context 32 --data-rows 256 --validation-rows 16 --rows-per-launch 16"
CASES = {
    "default": "--y lr:log:1e-3:1e1:8 --x tokens:log:1e3:2e4:8 --rows-per-launch 16",
    "horizon": f"{SMALL} --y lr:log:1e-3:1e1:4 --x tokens:log:512:4096:4 --schedule cosine",
    "clipped": f"{SMALL} --y lr:log:1e-3:1e1:4 --x clip:log:0.1:10:4 --tokens 2048 --warmup 0.1 --schedule wsd",
    "accumulated": f"{SMALL} --y lr:log:1e-3:1e1:4 --x batch:linear:1:7:4 --tokens 2048 --micro-batch 2",
    "seeds": f"{SMALL} --y lr:log:1e-3:1e1:4 --x seed:linear:0:3:4 --tokens 2048 --weight_decay 0.1",
    "sgd": f"{SMALL} --y lr.attention:log:1e-3:1e1:4 --x lr.mlp:log:1e-3:1e1:4 --tokens 2048 --optimizer sgd",
    "smollm2": "--preset smollm2-sft --y lr:log:1e-5:1e-3:2 --x tokens:log:128:384:2 --context 32 --batch 2 "
    "--data-rows 64 --validation-rows 2",
    "two_layer": "--network mlp --y lr.0:log:1e-3:1e6:32 --x lr.1:log:1e-3:1e6:32 --steps 50 --trace on",
    "two_layer fp64": "--network mlp --y offset:linear:-4:4:16 --x lr:log:1e-3:1e6:16 --steps 50 --precision fp64",
}
ARRAYS = ("first_loss", "losses", "weights_digest")


@dataclass(frozen=True)
class Options:
    """Which versions."""

    before: str  # folder of the other version's checkout
    cases: str = ""  # names of cases, with commas between (default: all)
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def trained(checkout: Path, flags: str, device: str, folder: Path) -> dict[str, np.ndarray]:
    """What a version stores of a sweep, [row, col(, step)] by name."""
    store = folder / checkout.name / "store"
    command = [sys.executable, str(checkout / "engine" / "sweep.py"), *flags.split()]
    command += ["--store", str(store), "--device", device, "--nofigures", "--quiet"]
    paths = str(checkout), os.environ.get("PYTHONPATH", "")
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    group = zarr.open_group(store, mode="r")
    arrays = {name: np.asarray(group[name]) for name in ARRAYS if name in group}
    # stores of the second format have a replicate dimension
    return {name: array.squeeze(0) if "replicate" in group else array for name, array in arrays.items()}


def difference(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> str:
    """'' if all arrays have the same bits, else how many cells do not."""
    for name, array in before.items():
        if name not in now or array.shape != now[name].shape:
            return f"{name} is not there, or of another shape"
        same = (array == now[name]) | (np.isnan(array) & np.isnan(now[name]))
        cells = same.reshape(*array.shape[:2], -1).all(2)
        if not cells.all():
            return f"{name}: {(~cells).sum()} of {cells.size} cells differ"
    return ""


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        before = Path(options.before).resolve()
        if not (before / "engine" / "sweep.py").is_file():
            raise ValueError(f"before is {options.before!r}; expected the folder of another checkout")
        chosen = options.cases.split(",") if options.cases else list(CASES)
        for name in chosen:
            if name not in CASES:
                raise ValueError(f"cases has {name!r}; expected some of {', '.join(CASES)}")
    table, wrong = Table("case", "arrays", "cells", "difference"), 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            old = trained(before, CASES[name], options.device, Path(folder, "before"))
            new = trained(HERE, CASES[name], options.device, Path(folder, "now"))
        found = difference(old, new)
        wrong += bool(found)
        table.add_row(name, ", ".join(old), str(old["weights_digest"].size), found or "none")
    screen().print(table)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
