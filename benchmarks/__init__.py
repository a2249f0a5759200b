"""Measurements that take longer than tests; each writes what it found to ``benchmarks/results``."""
