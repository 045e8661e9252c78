"""`python -m llmpipe` is the llmpipe command."""

from llmpipe.cli import main

main()
