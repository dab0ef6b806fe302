"""What the README and the guides name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc import names
from gpusvc.cli import app
from gpusvc.config import files as config
from gpusvc.hooks.cursor import cursor_file
from gpusvc.hooks.directory import hooks_directory
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state import counters, hung, upstream_key
from gpusvc.watchdog import verdicts
from tests.unit.test_layering import ROWS

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "docs/architecture.md",
    "docs/use-protocol.md",
    "docs/together.md",
    "docs/fleet.md",
    "docs/gateway.md",
    "docs/troubleshooting.md",
    "docs/security.md",
    "docs/reliability.md",
)
ARCHITECTURE = ROOT / "docs/architecture.md"

# Of systemd and others, and one that systemd makes of gpusvc-models.slice's name.
FOREIGN_UNITS = {"multi-user.target", "gpusvc.slice"}

document = pytest.mark.parametrize("document", DOCUMENTS)


def code(document: str) -> Iterator[str]:
    """Each piece of code in a document: what is between backticks, and the lines of blocks without their comments."""
    text = (ROOT / document).read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (re.sub(r"\s# .*|\s{3,}# .*", "", line) for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@document
def test_every_command_that_is_named_exists(document: str) -> None:
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    named = {match for piece in code(document) for match in re.findall(r"(?:^|[ (])gpusvc ([a-z]+)\b", piece)}
    assert named <= known
    if document == "README.md":
        assert "check" in named, "the pattern finds nothing any more"


@document
def test_every_unit_that_is_named_exists(document: str) -> None:
    units = {file.name for directory in ("units", "docs/examples") for file in (ROOT / directory).iterdir()}
    text = (ROOT / document).read_text()
    for unit in re.findall(r"[\w@-]+\.(?:service|path|scope|slice|socket|target|timer)\b", text):
        template = re.sub(r"@[\w-]+\.", "@.", unit)
        transient = re.fullmatch(re.escape(names.scope("X")).replace("X", r"[\w-]+"), unit)
        assert template in units or transient or unit in FOREIGN_UNITS, unit


@document
def test_every_file_of_the_tree_that_is_named_exists(document: str) -> None:
    found = 0
    for piece in code(document):
        for path in re.findall(r"(?:^|[ (])(?:\./)?((?:gpusvc|tests|units|packaging|docs)/[\w./@-]*)", piece):
            assert (ROOT / path).exists(), path
            found += 1
        for path in re.findall(r"(?:^|[ (])\./(\w+)(?= |$)", piece):
            assert (ROOT / path).exists(), path
    assert found or document not in {"README.md", "docs/architecture.md"}


@document
def test_every_path_that_gpusvc_has_is_spelt_as_it_is(document: str) -> None:
    paths = Paths.system()
    directory = paths.lease_directory("NAME")
    known = {paths.host_file, paths.models_directory, paths.model_file("NAME"), paths.lease_file("NAME")}
    known |= {directory, directory / "lock", directory / "door", directory / "use", paths.pin_file("NAME")}
    known |= {paths.readiness_file("NAME"), paths.demand_file("NAME"), paths.keep_file("NAME")}
    known |= {upstream_key.file_of(paths, "NAME", reader) for reader in upstream_key.READERS}
    known |= {
        paths.placement_lock,
        paths.config / ".keys.toml.lock",
        paths.waitlist_directory,
        paths.line_directory,
        paths.runtime,
        paths.state,
        verdicts.file_of(paths),
        hung.file_of(paths),
    }
    known |= {paths.leases_directory, paths.config, paths.runtime / "api.sock", paths.config / "keys.toml"}
    known |= {paths.runs_directory, counters.directory(paths) / "counters-N", paths.runtime / "gateway/slots/NAME"}
    known |= {paths.downloads_directory, paths.config / "hub-token"}
    known |= {hooks_directory(paths), cursor_file(paths), paths.state / "footprints" / "NAME.json"}
    # What the reader makes.
    known |= {paths.config / "tls" / file for file in ("fullchain.pem", "privkey.pem")} | {
        paths.runtime / "gateway.sock"
    }
    for piece in code(document):
        for path in re.findall(r"/(?:etc|run|var/lib)/gpusvc[\w./-]*", piece):
            assert Path(re.sub(r"\b(qwen|coder)\b", "NAME", path)) in known, path


@document
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text()):
        if not target.startswith("https://"):
            assert ((ROOT / document).parent / target).exists(), target


def test_the_layout_has_every_module_in_its_row() -> None:
    layout = ARCHITECTURE.read_text().partition("## Source layout")[2].partition("\n\n`units/`")[0]
    rows: dict[str, set[str]] = {}
    row: set[str] = set()
    for title, rooms in re.findall(r"^\| ([A-Za-z ,]*) ?\| (`[^|]*) \|", layout, re.MULTILINE):
        if title:
            row = rows[title.strip()] = set()
        row |= {room.rstrip("/") for room in re.findall(r"`(\w+/?)`", rooms)}
    assert rows == {title: rooms - {"_vendor"} for title, rooms in ROWS.items()}


def test_the_readmes_model_file_is_right(tmp_path: Path) -> None:
    text = re.search(r"<<'END'\n(.*?)^END$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert text is not None
    paths = replace(Paths.system(), config=tmp_path)
    file = paths.model_file("qwen")
    file.parent.mkdir()
    file.write_text(text.group(1))
    # Neither its engine nor its user need be on the machine that tests.
    assert [problem for problem in config.check(paths, [file]) if problem.key not in {"command", "user"}] == []
