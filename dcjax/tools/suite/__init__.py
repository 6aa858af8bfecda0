"""Benchmarks as the papers report them: many samples per problem, for both policies, with intervals and comparisons."""
