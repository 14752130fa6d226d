"""`python -m vicuna`."""

from vicuna.cli import main

main()
