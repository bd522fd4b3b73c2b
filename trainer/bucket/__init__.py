"""Touching a mounted bucket safely: a deadline for every call, retries, hashing, and what each kind of mount proves."""
