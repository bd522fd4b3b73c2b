"""The parent process: it starts the ranks, passes on signals and output, and leaves with their exit code."""
