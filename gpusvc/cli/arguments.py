"""Arguments of several commands: names of models, ``--json``, and what happens to existing model files."""

from __future__ import annotations

from typing import Any

import typer

from gpusvc.paths import Paths


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return the models that the shell offers: those that have a file or a lease."""
    paths = context.find_object(Paths) or Paths.here()
    files = (file.name.removesuffix(".toml") for file in paths.models_directory.glob("*.toml"))
    leases = (file.parent.name for file in paths.leases_directory.glob("*/lease.json"))
    return sorted({name for name in (*files, *leases) if name.startswith(incomplete)})


# Defaults of parameters, because typer 0.7 does not know Annotated.
NAME: Any = typer.Argument(..., metavar="NAME", help="The model, or an alias of it.", autocompletion=complete_model)
NAMES: Any = typer.Argument(None, help="Models.", autocompletion=complete_model)
SOME_NAMES: Any = typer.Argument(..., help="Models.", autocompletion=complete_model)
JSON: Any = typer.Option(False, "--json", help="Print JSON.")

# Of commands that write model files.
FORCE: Any = typer.Option(False, "--force", help="Replace files of models with these names, also edited ones.")
DRY_RUN: Any = typer.Option(False, "--dry-run", help="Show the files, but do not write them.")


def paths_of(context: typer.Context) -> Paths:
    """Return the paths that main() chose."""
    paths = context.find_object(Paths)
    assert paths is not None, "main() gives it"  # noqa: S101
    return paths
