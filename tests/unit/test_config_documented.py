"""The examples and the man pages of the configuration say what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gpusvc.config.host import HostConfig, read_host
from gpusvc.config.model import OWNED_VARIABLES, ModelConfig, read_model
from gpusvc.config.presets import PRESETS
from gpusvc.config.section import names
from gpusvc.config.table import Table

DOCS = Path(__file__).parents[2] / "docs"
HOST_EXAMPLE = DOCS / "examples" / "gpusvc.toml"
MODEL_EXAMPLE = DOCS / "examples" / "model.toml.example"
HOST_MAN = DOCS / "man" / "gpusvc.toml.5"
MODEL_MAN = DOCS / "man" / "gpusvc-model.5"
SECTIONS = ("gpu", "eviction", "watchdog", "gateway", "filter")  # the tables whose keys are ours


def known_keys(file: Path) -> set[str]:
    """The keys that the fields declare."""
    return set(names(HostConfig if file in (HOST_EXAMPLE, HOST_MAN) else ModelConfig))


def uncommented(file: Path) -> dict[str, object]:
    """An example with its commented keys in force: prose has a space behind the #, keys have none."""
    return tomllib.loads(re.sub(r"^#(?=[a-zA-Z])", "", file.read_text(), flags=re.MULTILINE))


def read_as_model(values: dict[str, object]) -> ModelConfig:
    return read_model(Table(MODEL_EXAMPLE, values), "example", HostConfig())


def flat(values: dict[str, object]) -> dict[str, object]:
    """The values of a file by their dotted keys."""
    found = {key: value for key, value in values.items() if key not in SECTIONS}
    for section in SECTIONS:
        table = values.get(section, {})
        assert isinstance(table, dict)
        found |= {f"{section}.{key}": value for key, value in table.items()}
    return found


def explained_keys(page: Path) -> dict[str, str | None]:
    """The keys that a man page has an entry for, and the default that it states."""
    keys: dict[str, str | None] = {}
    section = ""
    for line in page.read_text().splitlines():
        if line.startswith(".S"):
            heading = line.removeprefix(".SS [").removesuffix("]")
            section = f"{heading}." if heading in SECTIONS else ""
        elif entry := re.match(r"\\fB([a-z_]+)\\fR = .*?(?:, by default \\fB(.+)\\fR)?$", line):
            keys[section + entry[1]] = entry[2]
    return keys


@pytest.mark.parametrize("file", [HOST_MAN, MODEL_MAN], ids=lambda file: file.name)
def test_every_key_that_is_declared_is_read_and_no_other(file: Path) -> None:
    table = Table(file, {})
    if file == HOST_MAN:
        read_host(table)
    else:
        read_model(table, "example", HostConfig())
    assert sorted(table.known_keys()) == sorted(known_keys(file))


@pytest.mark.parametrize("example", [HOST_EXAMPLE, MODEL_EXAMPLE], ids=lambda file: file.name)
def test_the_example_shows_exactly_the_keys_that_there_are(example: Path) -> None:
    assert flat(uncommented(example)).keys() == known_keys(example)


@pytest.mark.parametrize("page", [HOST_MAN, MODEL_MAN], ids=lambda file: file.name)
def test_the_man_page_explains_exactly_the_keys_that_there_are(page: Path) -> None:
    assert explained_keys(page).keys() == known_keys(page)


@pytest.mark.parametrize("read", [tomllib.loads, lambda _: uncommented(HOST_EXAMPLE)])
def test_the_host_example_is_the_defaults_as_it_is_and_uncommented(read: object) -> None:
    assert callable(read)
    table = Table(HOST_EXAMPLE, read(HOST_EXAMPLE.read_text()))
    assert read_host(table) == HostConfig()
    table.finish()


def test_the_model_example_shows_the_defaults_where_it_does_not_say_example() -> None:
    examples = set()
    text = MODEL_EXAMPLE.read_text()
    for paragraph in text.split("\n\n"):
        if "An example:" in paragraph:
            examples |= set(re.findall(r"^#([a-z_]+) =", paragraph, flags=re.MULTILINE))
            examples |= set(re.findall(r"^\[(scope)\]", paragraph, flags=re.MULTILINE))
    assert {
        "description",
        "engine",
        "model",
        "args",
        "aliases",
        "env",
        "served_name",
        "vram",
        "ram",
        "scope",
        "probe",
        "probe_paths",
        "upstream_key",
    } == examples
    values = uncommented(MODEL_EXAMPLE)
    gpu = values["gpu"]
    assert isinstance(gpu, dict)
    defaults = {key: value for key, value in values.items() if key not in examples}
    defaults["gpu"] = {key: value for key, value in gpu.items() if key not in examples}
    assert read_as_model(defaults) == read_as_model({"command": values["command"]})


def test_the_model_example_is_right_once_uncommented_but_for_what_the_machine_lacks() -> None:
    values = uncommented(MODEL_EXAMPLE)
    del values["engine"], values["model"], values["args"]
    table = Table(MODEL_EXAMPLE, values)
    read_model(table, "example", HostConfig())
    assert {problem.key for problem in table.problems} <= {"command", "user"}


def test_the_man_page_names_every_preset_and_every_variable_that_cannot_be_set() -> None:
    text = MODEL_MAN.read_text().replace("\\-", "-")
    assert [word for word in (*PRESETS, *OWNED_VARIABLES) if word not in text] == []


def test_the_defaults_in_the_man_page_are_those_of_the_example() -> None:
    for page, example in ((HOST_MAN, HOST_EXAMPLE), (MODEL_MAN, MODEL_EXAMPLE)):
        values = flat(uncommented(example))
        for key, default in explained_keys(page).items():
            if default is not None and key not in ("args", "aliases", "env", "scope"):
                assert tomllib.loads(f"x = {default}")["x"] == values[key], key
