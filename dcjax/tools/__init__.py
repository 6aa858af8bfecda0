"""What is done with a run, a checkpoint or a model afterwards."""
