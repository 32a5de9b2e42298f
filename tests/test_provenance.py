"""What a store says of the arithmetic that made its cells, and when another one is refused."""

import json
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from test_command import main_fails
from tiny import forget, sweep, tiny

from engine import provenance as module
from engine.provenance import other_arithmetic, provenance

CPU = torch.device("cpu")


@pytest.fixture
def here() -> dict:
    return provenance(CPU)


def test_it_is_json_and_equal_to_itself(here):
    assert json.loads(json.dumps(here)) == here
    assert other_arithmetic(here, provenance(CPU)) == ""
    assert here["cpu"]["model"] and here["packages"]["numpy"]


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("cpu", "model", "Another 9000", "on Another 9000, this is "),
        ("cpu", "numpy", "SSE2", "with numpy on vectors of SSE2, this is "),
        ("cpu", "torch", "DEFAULT", "with torch on vectors of DEFAULT, this is "),
        ("packages", "numpy", "1.0", "with numpy 1.0, this is "),
        ("packages", "torch", "1.0", "with torch 1.0, this is "),
    ],
)
def test_each_part_of_the_arithmetic_is_compared(here, part, name, value, says):
    then = deepcopy(here)
    then[part][name] = value
    assert other_arithmetic(then, here).startswith(says)


def test_on_a_gpu_the_processor_counts_for_what_numpy_draws_only(here):
    gpu = here | {"device": "NVIDIA H100"}
    other = gpu["cpu"] | {"model": "Another 9000", "torch": "DEFAULT"}
    assert other_arithmetic(gpu | {"cpu": other}, gpu) == ""
    assert "vectors of SSE2" in other_arithmetic(gpu | {"cpu": other | {"numpy": "SSE2"}}, gpu)
    assert other_arithmetic(gpu | {"device": "NVIDIA A100"}, gpu) == "on NVIDIA A100, this is NVIDIA H100"


def test_what_an_older_store_does_not_say_is_not_compared(here):
    older = deepcopy(here)
    del older["cpu"], older["packages"]["numpy"]
    assert other_arithmetic(older, here) == ""


def test_vectors_are_those_that_numpy_uses(here):
    if here["cpu"]["numpy"] not in ("AVX-512", "AVX2"):
        pytest.skip("this processor's narrower vectors cannot be turned off")
    code = "import torch; from engine.provenance import cpu; print(cpu()['numpy'], cpu()['torch'])"
    wider = " ".join(module.np._core._multiarray_umath.__cpu_dispatch__)
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": wider, "ATEN_CPU_CAPABILITY": "default"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == ["baseline", "DEFAULT"], ran.stderr


def test_a_sweep_begun_on_another_processor_is_not_resumed(tmp_path, monkeypatch, capsys):
    sweep(tiny(tmp_path), tmp_path / "s")
    forget(tmp_path / "s", 1)
    monkeypatch.setattr(module, "cpu_model", lambda: "Another 9000")
    assert "this is Another 9000: the cells to come would have other bits" in main_fails(
        capsys, tiny(tmp_path), tmp_path / "s"
    )


def test_a_copy_inside_another_projects_checkout_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    words = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    assert module.commit() == ""
