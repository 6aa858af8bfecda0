"""What a run is: its sections, and what they build."""
