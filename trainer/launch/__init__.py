"""The parent process: it starts the ranks, passes signals and output on, and keeps exit codes."""
