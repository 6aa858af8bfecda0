"""Experiments with several arms, tasks, formats and seeds: what is run, what came of it, and what follows."""
