"""`python -m gemma4q` is the command line."""

from gemma4q.cli import main

main()
