"""The house: which folder imports which, which folders there are, and names that shadow nothing."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
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


def imported(file: Path) -> set[str]:
    """The top-level packages a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
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


def tracked() -> list[Path]:
    """Files git tracks or would track, where this is a checkout; else every file."""
    shown = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if shown.returncode == 0:
        return [Path(line) for line in shown.stdout.splitlines()]
    return [file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file()]


def test_the_top_level_folders_are_these_five():
    folders = {file.parts[0] for file in tracked() if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    assert folders - {"results", "build", "dist"} == set(FOLDERS)


def test_no_module_bears_the_name_of_another_package():
    # a script's own folder comes first on sys.path, so engine/types.py would hide the standard library's
    others = sys.stdlib_module_names | {name for name in packages_distributions() if name not in FOLDERS}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert file.stem not in others or file.stem == "__init__", file.relative_to(ROOT)


def test_every_file_parses_on_the_oldest_python_and_says_what_it_is_for():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(), feature_version=(3, 11))
            empty = file.name == "__init__.py" and not tree.body
            assert empty or ast.get_docstring(tree), f"{file.relative_to(ROOT)} has no docstring"
