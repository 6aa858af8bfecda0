"""Reinforcement learning of language models in JAX when the sampling policy is not numerically the training policy."""

__version__ = "0.1.0"
