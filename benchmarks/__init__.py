"""Benchmarks: one module per workload; `python -m benchmarks.<workload>` runs it."""
