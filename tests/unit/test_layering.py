"""The source layout of docs/architecture.md, held by walking the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2] / "gpusvc"

# A room may import its own row and the rows above it in this list. A room is a folder, or a module beside the folders.
ROWS = {
    "words for all": {"backoff", "errors", "files", "log", "names", "paths", "printable", "quantity", "record"},
    "foreign things": {"_vendor", "gpu", "journal", "linux", "systemd", "weights"},
    "configured, written down": {"config", "state"},
    "what is made of it": {"hooks", "hub", "importing", "release", "status"},
    "who gets which GPU": {"placement"},
    "what acts": {"doctor", "launcher", "watchdog"},
    "what answers over HTTP": {"api", "gateway"},
    "the command": {"cli"},
}

# Who alone may import a foreign library, so that its exceptions and quirks stay in one file.
IMPORTERS = {
    "aiohttp": "api",
    "httptools": "gateway",
    "prometheus_client": "api",
    "psutil": "linux",
    "pynvml": "gpu",
    "pystemd": "systemd",
    "sdnotify": "systemd",
    "typer": "cli",
    "urllib.request": "hub",
    "click": "cli",
    "rich": "cli",
    "uvloop": "gateway",
    "yaml": "importing",
}

# So that a reader holds each of them in the head.
LONGEST_MODULE = 400
LONGEST_CLASS = 250
LONGEST_FUNCTION = 50

# Tables, written as functions: a metric or an option a line.
TABLES = {"api/backend/metrics.py:_of_requests", "api/backend/metrics.py:_of_gpus", "cli/commands/add.py:add"}


def row_of(module: str) -> int | None:
    return next((number for number, modules in enumerate(ROWS.values()) if module in modules), None)


def module_of(file: Path) -> str:
    """The name under gpusvc by which a file counts: cli for cli/ps.py, "" for the package itself."""
    first = file.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in the file that stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def edges() -> Iterator[tuple[str, str]]:
    """(importing module, imported dotted name) for the whole package."""
    for file in sorted(ROOT.rglob("*.py")):
        yield from ((module_of(file), name) for name in imports(file))


def inner_edges() -> Iterator[tuple[str, str]]:
    """(importing module, imported module of ours); constants of the package itself, as __version__, don't count."""
    modules = {module_of(file) for file in ROOT.rglob("*.py")} | {"_vendor"}
    for module, name in edges():
        package, _, rest = name.partition(".")
        imported = rest.partition(".")[0]
        if package == "gpusvc" and imported in modules and imported != module:
            yield module, imported


def test_every_module_has_its_row() -> None:
    homeless = {module_of(file) for file in ROOT.rglob("*.py")} - {""} - set[str]().union(*ROWS.values())
    assert not homeless, f"say in ROWS where these belong: {homeless}"


def test_imports_run_downwards_only() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, imported in inner_edges()
        if module == "" or (row_of(module) or 0) < (row_of(imported) or 0)
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in inner_edges():
        graph.setdefault(module, set()).add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_foreign_library_has_one_importer() -> None:
    strangers = [
        f"{module} imports {name}"
        for module, name in edges()
        for part in [name.removeprefix("gpusvc._vendor.").partition(".")[0]]
        if IMPORTERS.get(part, module) != module
    ]
    assert strangers == []


def test_no_module_class_or_function_is_too_long() -> None:
    long = []
    for file in sorted(ROOT.rglob("*.py")):
        path = str(file.relative_to(ROOT))
        if path.startswith("_vendor/"):
            continue
        text = file.read_text()
        if text.count("\n") > LONGEST_MODULE:
            long.append(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > most and f"{path}:{node.name}" not in TABLES:
                    long.append(f"{path}:{node.name} has {lines} lines")
    assert long == []
