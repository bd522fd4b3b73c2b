"""The ranks of an attempt: how they find each other, prove that they are alive, and agree."""
