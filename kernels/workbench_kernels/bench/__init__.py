"""Benchmarks of the kernels, and what they take of a GPU."""
