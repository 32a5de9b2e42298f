"""What every test needs: Triton's interpreter where there is no GPU, and the `gpu` marker's meaning."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # read when a kernel is defined, so before any of ours is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests, saying how many, where there is no GPU."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
