"""The directory of model files, as it is changed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gpusvc.config import directory as model_directory
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.linux import access
from gpusvc.paths import Paths

GOOD = 'command = ["/bin/sh"]\nuser = "root"\n'


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "var")


def files(paths: Paths) -> set[str]:
    return {file.name for file in paths.models_directory.iterdir()}


def test_a_file_is_there_whole_and_for_all_to_read(paths: Paths) -> None:
    file = model_directory.install(paths, "qwen", GOOD, force=False)
    assert file.read_text() == GOOD
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert files(paths) == {"qwen.toml"}


def test_what_is_there_is_replaced_by_force_only(paths: Paths) -> None:
    model_directory.install(paths, "qwen", GOOD, force=False)
    with pytest.raises(UsageError, match="is there already"):
        model_directory.install(paths, "qwen", "other = 1\n", force=False)
    assert paths.model_file("qwen").read_text() == GOOD
    model_directory.install(paths, "qwen", "other = 1\n", force=True)
    assert paths.model_file("qwen").read_text() == "other = 1\n"
    assert files(paths) == {"qwen.toml"}


def test_several_files_are_written_or_none(paths: Paths) -> None:
    model_directory.install(paths, "old", GOOD, force=False)
    model_directory.install(paths, "last", GOOD, force=False)
    texts = {"first": "a = 1\n", "old": "b = 1\n", "last": "c = 1\n"}
    with pytest.raises(UsageError, match="is there already"):
        model_directory.install_all(paths, texts, replacing=["old"])
    assert files(paths) == {"old.toml", "last.toml"}
    assert paths.model_file("old").read_text() == GOOD
    model_directory.install_all(paths, texts, replacing=["old", "last"])
    assert {name: paths.model_file(name).read_text() for name in texts} == texts
    assert files(paths) == {"first.toml", "old.toml", "last.toml"}


def test_another_text_keeps_mode_and_link(paths: Paths, tmp_path: Path) -> None:
    real = tmp_path / "qwen.toml"
    real.write_text(GOOD)
    real.chmod(0o640)
    paths.models_directory.mkdir(parents=True)
    paths.model_file("qwen").symlink_to(real)
    model_directory.replace_text(paths, "qwen", GOOD + "port = 1\n")
    assert paths.model_file("qwen").is_symlink()
    assert (real.read_text(), stat.S_IMODE(real.stat().st_mode)) == (GOOD + "port = 1\n", 0o640)


def test_problems_name_the_file_where_it_would_be(paths: Paths) -> None:
    texts = {"a": GOOD + 'aliases = ["x"]\n', "b": GOOD + 'aliases = ["x"]\nports = 1\n'}
    problems = model_directory.check(paths, texts)
    assert {(problem.file, problem.key) for problem in problems} == {
        (paths.model_file("a"), "aliases[0]"),
        (paths.model_file("b"), "aliases[0]"),
        (paths.model_file("b"), "ports"),
    }
    assert model_directory.check(paths, {}) == []


def test_a_directory_that_cannot_be_is_said_in_a_sentence(paths: Paths) -> None:
    paths.config.write_text("a file")
    with pytest.raises(GpusvcError, match="cannot be changed"):
        model_directory.install(paths, "qwen", GOOD, force=False)


# ---- access ----


def test_who_may_read_a_file_is_told_by_modes(public: Path) -> None:
    directory = public / "home"
    directory.mkdir(0o700)
    file = directory / "x.gguf"
    file.write_text("")
    assert access.obstacle(file, "nobody") == directory
    directory.chmod(0o711)
    file.chmod(0o600)
    assert access.obstacle(file, "nobody") == file
    file.chmod(0o644)
    assert access.obstacle(file, "nobody") is None


def test_nobody_can_tell_about_who_is_not_there(public: Path) -> None:
    public.chmod(0o700)
    assert access.obstacle(public / "x", "no-such-user") is None
    assert access.obstacle(public / "x", "root") is None
