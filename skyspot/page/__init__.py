"""A run's report as an HTML page: one file without scripts and requests, its plots drawn by matplotlib."""
