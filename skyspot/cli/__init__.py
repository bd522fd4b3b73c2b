"""The terminal: Click commands, tables, exit codes. The only wing that prints."""
