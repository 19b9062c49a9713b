"""Training runs: configuration, data, the loop, and what a run reads and writes."""
