"""`python -m skyspot`."""

from skyspot.cli.main import main

main()
