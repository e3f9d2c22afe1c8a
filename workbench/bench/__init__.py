"""Benchmarks: our methods beside those of other libraries, on the same work in the same run."""
