"""Benchmarks: check first, then time interleaved variants of one op in one process.

``robustgate bench`` is the command, :mod:`robustgate.bench.command` what it calls.

==============  ==================================================================================
module          holds
==============  ==================================================================================
``benchmark``   what a benchmark is: an op, other ways to write it, the work it cannot avoid
``ops``         the benchmarks, one for each public op
``plan``        which measurements an invocation makes
``case``        the inputs of one measurement and their float64 truth
``measure``     timing in turn, the machine's copy and GEMM rates, the contention canary
``memory``      peak memory beyond inputs and results
``run``         one measurement: gate, time, memory, ratios
``results``     a row, and CSV files of rows
``profile``     where the time of one op goes
==============  ==================================================================================
"""
