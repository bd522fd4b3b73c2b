"""`python -m skyspot`."""

from skyspot.cli import main

main()
