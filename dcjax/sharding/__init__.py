"""Where arrays live: a mesh of devices, and one table that maps logical axes to its axes."""
