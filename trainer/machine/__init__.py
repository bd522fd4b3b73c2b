"""This machine: its token, its home folder and its temporary folders. Standard library only."""
