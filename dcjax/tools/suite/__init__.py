"""Benchmarks as the papers report them: many samples a problem, of both policies, with intervals and comparisons."""
