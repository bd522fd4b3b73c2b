"""This machine: its home folder and its temporary folders. Standard library only."""
