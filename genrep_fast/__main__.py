"""`python -m genrep_fast` is the command `genrep`."""

from .cli import main

main()
