"""The rehearsal: it runs a task here, takes its machine away in every way, and compares the results."""
