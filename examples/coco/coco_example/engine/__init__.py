"""The training loop, run folders, the metrics log and worker processes."""
