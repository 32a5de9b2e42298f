"""Every command answers --help in the time of a glance: torch, which takes seconds to import, is not needed for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
