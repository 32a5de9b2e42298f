"""Speed and exactness on a GPU, as rows with their GPU, versions and commit."""

import engine  # noqa: F401  keeps the current folder off the path
