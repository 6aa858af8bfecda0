"""Reinforcement learning of language models in JAX when the policy that samples is not numerically the policy that trains."""

__version__ = "0.1.0"
