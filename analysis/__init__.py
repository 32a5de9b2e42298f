"""Reads stores: labels, boundaries, dimensions, zooms and reports."""

import engine  # noqa: F401  keeps the current folder off the path
