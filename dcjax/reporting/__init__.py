"""What people read of a run: its progress, its logs, its report, and the statistics of accuracies."""
