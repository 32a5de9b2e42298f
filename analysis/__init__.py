"""Reads stores: labels, boundaries, dimensions, zooms and reports."""
