"""Training: one attempt from rendezvous to exit code, its steps, random numbers, metrics, evaluation and export."""
