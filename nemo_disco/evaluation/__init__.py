"""Benchmarks: accuracy with confidence intervals, the before/after table, and the report over run directories."""
