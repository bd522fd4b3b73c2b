"""Notices that this machine will be taken: signals, and what each cloud's metadata service announces."""
