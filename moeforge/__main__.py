"""`python -m moeforge` is the same command."""

from .cli import main

main()
