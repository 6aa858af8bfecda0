"""Reward functions, which score one finished response on the host, and their verifiers. No JAX."""
