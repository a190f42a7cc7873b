"""Benchmarks: fastconv and PyTorch side by side in one process, and the machine's own limits.

``python -m bench.layers``, ``bench.steps`` and ``bench.roofline``, run from the repository's root.
"""
