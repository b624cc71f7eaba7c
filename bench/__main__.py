"""`python -m bench` is `bench`."""

from bench.commands.cli import main

main()
