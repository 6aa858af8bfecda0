"""What a run leaves to be read."""
