"""The smallest sweeps that still exercise everything: one layer, 16 wide, 8 tokens, a few steps, on the CPU."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from engine.api import prepare, run_sweep
from engine.config import SweepConfig, cells_of, make_config
from engine.options import RunOptions
from engine.outcome import NOT_COMPUTED
from engine.store import Store, Writer, open_store
from engine.workload import Setup

# tensors of a few hundred elements: a second thread only waits
torch.set_num_threads(1)

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "while", "rain", "fell", "over", "stones"]


def write_chat(path: Path, dialogues: int = 60) -> Path:
    """A .jsonl of short dialogues whose replies have different lengths, always the same ones."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(dialogues):
        question, reply = (" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


def tiny(folder: Path, y: str = "lr:log:1e-3:1e1:3", x: str = "tokens:linear:32:96:4", **changes) -> SweepConfig:
    """A sweep of 3 x 4 cells of 2 to 6 steps over a chat file in `folder`."""
    data = folder / "chat.jsonl"
    if not data.exists():
        write_chat(data)
    fixed = {"batch": 2, "tokens": 64, "width": 16, "heads": 1, "context": 8, "data_rows": 24, "validation_rows": 4}
    swept = {axis.split(":")[0] for axis in (y, x)}
    own = {name: value for name, value in fixed.items() if name not in swept}
    return make_config(**(own | {"y": y, "x": x, "data": str(data)} | changes))


def sweep(config: SweepConfig, path: Path, **options) -> Store:
    """The finished store of a sweep."""
    run_sweep(config, RunOptions(store=str(path), quiet=True, device="cpu", **options))
    return open_store(path)


def flags(config: SweepConfig, path: Path) -> list[str]:
    """The command line that gives a configuration and a store."""
    default = make_config(config.network).flat()
    words = ["--network", config.network, "--store", str(path), "--device", "cpu", "--quiet"]
    for name, value in config.flat().items():
        if value != default.get(name):
            words += ["--" + name, str(value)]
    return words


def setup(config: SweepConfig, **options) -> Setup:
    """What a sweep of this configuration would train with on the CPU."""
    return prepare(config, cells_of(config), RunOptions(device="cpu", **options), 1, None)


def arrays(store: Store) -> dict[str, np.ndarray]:
    """Every array of a store's cells."""
    return {name: store.read(name) for name in store.specs}


def assert_equal_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same arrays, NaN payloads and signs of zero included."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


def forget(path: Path, row: int) -> None:
    """Mark a launch's row as not computed, as a kill before its last write leaves it."""
    writer = Writer(path)
    writer.group["status"][:, row : row + 1] = NOT_COMPUTED
    writer.close()


def run_command(monkeypatch, capsys, module, *words: str) -> tuple[int, str, str]:
    """Exit code, output and complaints of a module's command on the CPU."""
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, "--device", "cpu", *words])
    code = 0
    try:
        module.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()
