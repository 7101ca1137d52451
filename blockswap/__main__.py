"""`python -m blockswap` is the `blockswap` command."""

from blockswap.cli import main

main()
