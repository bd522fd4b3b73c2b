"""How the ranks of an attempt find each other, show that they live, and agree."""
