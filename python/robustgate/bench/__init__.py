"""Benchmarks: check first, then time interleaved variants of one op in one process.

``robustgate bench`` is the command; :func:`robustgate.bench.run.run` the function behind it.
"""
