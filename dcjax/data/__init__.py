"""Tasks, prompts and tokenizers: everything a rollout starts from. NumPy on the host, no JAX."""
