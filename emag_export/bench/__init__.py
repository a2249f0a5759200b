"""Measurement: what a user would otherwise run and what we run, side by side in one process."""
