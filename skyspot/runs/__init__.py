"""A run's folder seen from a laptop: where it lies, its progress, its checkpoints."""
