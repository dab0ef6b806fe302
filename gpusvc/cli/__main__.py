"""``python -m gpusvc.cli``: the command, where no script is installed for it."""

from gpusvc.cli import main

main()
