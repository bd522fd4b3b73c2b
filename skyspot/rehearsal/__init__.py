"""The rehearsal: it runs a task locally, preempts it in every way, and compares the results with an undisturbed run."""
