"""How models are offered, read without judging whether they could start."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from gpusvc.config.serving import Serving, load_serving
from gpusvc.config.table import InvalidFileError
from gpusvc.errors import UnknownModelError
from gpusvc.paths import Paths


def test_what_the_machine_lacks_does_not_matter(paths: Paths) -> None:
    paths.model_file("qwen").write_text(
        'command = ["/nonexistent"]\nuser = "nobody-at-all"\nmisspelt = 1\naliases = ["Qwen/Qwen3"]\nconcurrency = 2\n'
    )
    assert load_serving(paths, "qwen") == Serving("qwen", "qwen", aliases=("Qwen/Qwen3",), concurrency=2)


@pytest.mark.parametrize("text", ['concurrency = "2"', "[filter]\nset = { model = 1 }", "="])
def test_what_counts_here_must_be_right(paths: Paths, text: str) -> None:
    paths.model_file("qwen").write_text(text)
    with pytest.raises(InvalidFileError):
        load_serving(paths, "qwen")


@pytest.mark.parametrize("name", ["qwen", "../gpusvc", "", "\ud800"])
def test_a_model_without_a_file_is_unknown(paths: Paths, name: str) -> None:
    with pytest.raises(UnknownModelError):
        load_serving(paths, name)


@pytest.mark.usefixtures("as_nobody")
def test_one_whose_file_may_not_be_read_has_the_defaults() -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is in a directory of root's own
        paths = Paths(config=Path(directory), runtime=Path(directory), state=Path(directory))
        paths.models_directory.mkdir()
        file = paths.model_file("qwen")
        file.write_text('aliases = ["secret"]')
        file.chmod(0)
        assert load_serving(paths, "qwen") == Serving("qwen", "qwen")
