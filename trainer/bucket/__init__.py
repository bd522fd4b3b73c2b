"""Touching a mounted bucket safely: a deadline for every call, hashing, and what each kind of mount proves."""
