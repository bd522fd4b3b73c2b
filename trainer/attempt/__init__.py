"""One life of the machines: its records and history, what binds the run, what ends it, notices."""
