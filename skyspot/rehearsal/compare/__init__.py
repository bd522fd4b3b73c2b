"""Comparing the results of two runs: byte for byte, by rules for known formats, or by the user's command."""
