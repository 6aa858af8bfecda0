"""How devices share a forward and backward pass."""
