"""A shell in a booted container with the package of this tree and two simulated GPUs: ``./test shell trixie``.

``./test shell bookworm COMMAND ...`` runs one command there instead. The container is gone when the shell ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.machine import tree
from tests.machine.container import MachineError
from tests.machine.host import Host, build_package, prepare
from tests.machine.tree import Generation


def main(arguments: list[str]) -> int:
    """Returns the exit status of the shell or the command; 2 if the arguments are wrong, 1 if nothing boots."""
    names = [str(generation) for generation in Generation]
    name, command = (arguments[0], arguments[1:]) if arguments else (str(Generation.TRIXIE), [])
    if name not in names:
        print(f"shell: {name} is no generation: there are {', '.join(names)}.", file=sys.stderr)
        return 2
    generation = Generation(name)
    try:
        with tempfile.TemporaryDirectory() as directory:
            print("shell: builds the package and boots a machine; that takes a minute ...", file=sys.stderr)
            prepared = prepare(generation, build_package(Path(directory)))
            try:
                with Host(prepared.layer, tree.ensure(generation), name=f"{generation}-shell").boot() as host:
                    return subprocess.call(host.entry(command or ["bash", "-l"]))
            finally:
                prepared.close()
    except (MachineError, tree.TreeError) as error:
        print(f"shell: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
