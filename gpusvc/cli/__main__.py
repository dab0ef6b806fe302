"""``python -m gpusvc.cli``: the command where its script is not installed."""

from gpusvc.cli import main

main()
