"""Guidance: pure functions of predictions, one algorithm a file."""
