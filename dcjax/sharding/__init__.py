"""Where arrays live: a mesh, and one table from logical axes to its axes."""
