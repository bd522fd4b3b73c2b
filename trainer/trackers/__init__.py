"""Experiment trackers: the curve of a run, in each of them. The run's records are its source."""
