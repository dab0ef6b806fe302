"""The guides for those who come from elsewhere: their commands exist, and their examples come out as they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from gpusvc.cli import app
from gpusvc.importing import llama_swap, localai, yamlfile

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("from-llama-swap.md", "from-ollama.md", "from-localai.md")

guide = pytest.mark.parametrize("guide", GUIDES)


def blocks(guide: str, language: str) -> list[str]:
    text = (DOCS / guide).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def options(command: str) -> set[str]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for parameter in found.params for name in parameter.opts}


@guide
def test_every_command_takes_the_options_that_it_is_given(guide: str) -> None:
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks(guide, "sh") for line in block.splitlines()]
    ours = [words for line in lines if (words := line.removeprefix("sudo ").split())[0] == "gpusvc"]
    assert len(ours) >= 3
    for _, command, *arguments in ours:
        assert {argument for argument in arguments if argument.startswith("-")} <= options(command), command


def test_the_example_of_llama_swap_becomes_what_the_guide_shows() -> None:
    (document,) = yamlfile.parse(blocks("from-llama-swap.md", "yaml")[0], "config.yaml")
    found = llama_swap.convert(document, "config.yaml", {})
    assert [draft.name for draft in found.drafts] == ["coder", "embed"]
    assert found.drafts[0].text() == blocks("from-llama-swap.md", "toml")[0]


def test_the_example_of_localai_becomes_what_the_guide_shows() -> None:
    documents = yamlfile.parse(blocks("from-localai.md", "yaml")[0], "chat.yaml")
    found = localai.convert([(Path("/srv/localai/models/chat.yaml"), document) for document in documents])
    shown = blocks("from-localai.md", "toml")[0].replace("from chat.yaml", "from /srv/localai/models/chat.yaml")
    assert found.drafts[0].text() == shown
    assert [note.key for note in found.notes] == ["stopwords"]


@pytest.mark.parametrize("command", ["add", "edit", "rm", "import"])
def test_the_manual_names_every_option(command: str) -> None:
    entries = (
        (DOCS / "man/gpusvc.1").read_text().partition(".SH COMMANDS")[2].partition(".BR start")[0].replace("\\-", "-")
    )
    assert {option for option in options(command) if option.startswith("--") and option not in entries} <= {"--help"}
