"""A checkpoint: the state that it holds, how it is written, committed, read, restored and pruned, and how often."""
