"""Drawings of README and docs, made of the contract and the results: ``python -m benchmarks.figures``."""
