"""What the README tells a stranger to type: commands that exist, flags that they have, files that are there."""

import re
import shlex
from pathlib import Path

import pytest

from analysis.fractal import COMMANDS
from analysis.fractal import main as fractal
from engine.config import cells_of
from engine.options import read_arguments

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "benchmarks/README.md")


def commands(page: str) -> list[list[str]]:
    """Every line of the page's shell blocks, as words, and what stands in its text as `fractal …`."""
    text = (ROOT / page).read_text("utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    spoken = re.findall(r"`(fractal \w[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [shlex.split(line, comments=True) for line in [*blocks, *spoken] if line.strip()]


TYPED = {" ".join(words): words for page in PAGES for words in commands(page)}
OURS = {line: words for line, words in TYPED.items() if words[0] == "fractal"}


def test_the_page_begins_with_a_walk_from_data_to_the_answer():
    words = [words[1] for words in commands("README.md") if words[0] == "fractal"]
    assert words[:2] == ["sweep", "sweep"] and {"recommend", "report", "replay", "zoom"} <= set(words)
    assert set(words) - {"COMMAND"} <= {*COMMANDS, "--help"}


@pytest.mark.parametrize("line", [line for line, words in OURS.items() if words[1] in COMMANDS])
def test_every_flag_that_is_typed_is_one_the_command_has(line, capsys):
    _, word, *rest = OURS[line]
    chosen = [rest.index(each) for each in ("--network", "--model") if each in rest]
    network = rest[chosen[0] : chosen[0] + 2] if chosen else []
    with pytest.raises(SystemExit) as end:
        fractal([word, *network, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    for flag in (each for each in rest if each.startswith("--")):
        assert re.search(rf"(^|[ \[]){flag}\b", shown, re.M), f"{flag} is none of {word}'s"


@pytest.mark.parametrize(
    "line", [line for line, words in TYPED.items() if words[:2] == ["fractal", "sweep"] and "--help" not in words]
)
def test_every_sweep_that_is_typed_is_one_that_can_be_asked_for(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cells.csv").write_text("lr,batch\n1e-3,4\n1e-2,8\n")
    config, _ = read_arguments("", TYPED[line][2:])
    assert cells_of(config).shape


def test_what_else_is_typed_is_there():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line, (first, *rest) in TYPED.items():
        if first == "make":
            assert f"\n{rest[0]}:" in makefile, line
        elif first in ("python", "uv", "torchrun"):
            assert (ROOT / next(word for word in rest if word.endswith(".py"))).is_file(), line
        else:
            assert first in ("fractal", "."), line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target
