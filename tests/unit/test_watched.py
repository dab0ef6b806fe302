"""A daemon's view of the configuration while its files change."""

from __future__ import annotations

import os
import pwd
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpusvc.config.files import HostConfig, InvalidFileError, ModelConfig, load_host, load_model
from gpusvc.config.watched import RETRY_SECONDS, SETTLED_SECONDS, Watched
from gpusvc.paths import Paths

BARE = f'user = "{pwd.getpwuid(os.geteuid()).pw_name}"\ncommand = ["/bin/sh"]\n'


class Bench:
    """A configuration, its observer, and a clock that runs ahead of the files' by what a test wants."""

    def __init__(self, directory: Path) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "lib")
        self.paths.models_directory.mkdir(parents=True)
        self.ahead = 60.0
        self.reports: list[str] = []
        self.watched = Watched(self.paths, lambda e: self.reports.append(str(e)), now=lambda: time.time() + self.ahead)

    def write_host(self, text: str) -> None:
        self._replace(self.paths.host_file, text)

    def write_model(self, text: str) -> None:
        self._replace(self.paths.model_file("qwen"), BARE + text)

    def _replace(self, file: Path, text: str) -> None:
        """As editors and package managers do; each version is another inode, whatever the clock says."""
        new = file.with_name(f".new{file.name}")
        new.write_text(text)
        new.rename(file)

    def max_active(self) -> int:
        host = self.watched.host()
        assert host is not None
        return host.max_active

    def priority(self) -> int:
        model = self.watched.model("qwen")
        assert model is not None
        return model.priority


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which files were read."""
    done: list[str] = []

    def noted_host(paths: Paths) -> HostConfig:
        done.append("host")
        return load_host(paths)

    def noted_model(paths: Paths, name: str, host: HostConfig) -> ModelConfig:
        done.append(name)
        return load_model(paths, name, host)

    monkeypatch.setattr("gpusvc.config.watched.load_host", noted_host)
    monkeypatch.setattr("gpusvc.config.watched.load_model", noted_model)
    return done


def test_other_files_beside_those_of_ours_change_nothing(bench: Bench, reads: list[str]) -> None:
    bench.write_model("")
    assert bench.priority() == 0
    (bench.paths.config / "notes").write_text("")
    assert bench.priority() == 0
    assert reads.count("qwen") == 1


def test_without_a_host_file_the_defaults_hold_until_there_is_one(bench: Bench) -> None:
    assert bench.watched.host() == HostConfig()
    bench.write_host("max_active = 2")
    assert bench.max_active() == 2
    bench.paths.host_file.unlink()
    assert bench.max_active() == 0


def test_a_change_shows_at_the_next_question(bench: Bench) -> None:
    bench.write_model("priority = 1")
    assert bench.priority() == 1
    bench.write_model("priority = 2")
    assert bench.priority() == 2


def test_what_did_not_change_is_not_read_again(bench: Bench, reads: list[str]) -> None:
    bench.write_model("")
    for _ in range(3):
        assert bench.priority() == 0
    assert reads == ["host", "qwen"]


def test_a_change_of_the_host_is_a_change_of_every_model_that_takes_it_over(bench: Bench) -> None:
    bench.write_model("")
    bench.write_host("[watchdog]\nidle_timeout = 60")
    before = bench.watched.model("qwen")
    bench.write_host("[watchdog]\nidle_timeout = 0")
    after = bench.watched.model("qwen")
    assert before is not None
    assert after is not None
    assert (before.idle_timeout_seconds, after.idle_timeout_seconds) == (60, 0)


def test_a_file_that_became_wrong_leaves_the_last_good_one_in_effect_and_is_reported_once(bench: Bench) -> None:
    bench.write_host("max_active = 2")
    bench.write_model("priority = 1")
    assert (bench.max_active(), bench.priority()) == (2, 1)
    bench.write_host("max_active = -2")
    bench.write_model("priority = nan")
    for _ in range(3):
        assert (bench.max_active(), bench.priority()) == (2, 1)
    assert [report.partition(": ")[2] for report in bench.reports] == [
        "max_active: -2 is out of range: it must be 0 or more.",
        "priority: It must be an integer, not a number.",
    ]


def test_another_problem_is_reported_and_the_same_one_again_after_it_was_mended(bench: Bench) -> None:
    for text in ("max_active = -2", "max_active = -2 # the same", "max_active = -3", "", "max_active = -3"):
        bench.write_host(text)
        bench.watched.host()
    assert [report.split()[2] for report in bench.reports] == ["-2", "-3", "-3"]


def test_a_file_that_was_never_right_is_unknown(bench: Bench) -> None:
    bench.write_host("max_active = -2")
    bench.write_model("")
    assert bench.watched.host() is None
    assert bench.watched.model("qwen") is None
    bench.write_host("")
    bench.write_model("priority = -5000")
    assert bench.watched.model("qwen") is None
    bench.write_model("priority = 5")
    assert bench.priority() == 5


def test_a_model_without_a_file_is_unknown_and_nothing_is_kept_of_it(bench: Bench, reads: list[str]) -> None:
    bench.write_model("")
    assert bench.priority() == 0
    bench.paths.model_file("qwen").unlink()
    for name in ("qwen", "qwen", "other", "../qwen", ""):
        assert bench.watched.model(name) is None
    assert reads == ["host", "qwen", "qwen"]
    assert bench.watched._models == {}
    assert bench.reports == []


def test_a_file_that_is_being_written_is_left_until_the_next_question(bench: Bench) -> None:
    bench.write_host("max_active = 2")
    assert bench.max_active() == 2
    bench.ahead = 0
    now = time.time() + SETTLED_SECONDS / 2
    bench.watched._now = lambda: now
    for text in ("", "max_active = ", "max_active = 3"):
        bench.write_host(text)
        assert bench.max_active() == 2
    bench.paths.host_file.unlink()
    assert bench.max_active() == 2
    bench.write_host("max_active = 3")
    now += 60
    assert bench.max_active() == 3
    assert bench.reports == []


def test_a_file_that_was_read_while_it_was_young_is_read_once_more(bench: Bench, reads: list[str]) -> None:
    bench.write_host("max_active = 2")
    now = bench.paths.host_file.stat().st_ctime
    bench.watched._now = lambda: now
    assert bench.max_active() == 2
    now += 1
    assert bench.max_active() == 2
    assert bench.max_active() == 2
    assert reads == ["host", "host"]


def test_a_restored_modification_time_hides_no_change(bench: Bench) -> None:
    file = bench.paths.host_file
    file.write_text("max_active = 2")
    os.utime(file, ns=(0, 0))
    assert bench.max_active() == 2
    bench.write_host("max_active = 3")
    os.utime(file, ns=(0, 0))
    assert bench.max_active() == 3


def test_a_clock_that_was_set_back_stops_nothing(bench: Bench) -> None:
    bench.write_host("max_active = 2")
    assert bench.max_active() == 2
    bench.ahead = -86400
    bench.write_host("max_active = 3")
    assert bench.max_active() == 3


def test_what_this_machine_lacks_does_not_matter_to_a_daemon(bench: Bench) -> None:
    bench.paths.model_file("qwen").write_text('user = "nobody-at-all"\ncommand = ["/nonexistent"]\npriority = 3\n')
    assert bench.priority() == 3
    assert bench.reports == []


def test_what_was_wrong_outside_the_file_is_tried_again_after_a_while(bench: Bench, reads: list[str]) -> None:
    bench.write_model("")
    bench.watched.host()
    now = time.time() + 60
    bench.watched._now = lambda: now
    with no_descriptors_left():
        assert bench.watched.model("qwen") is None
    assert bench.watched.model("qwen") is None
    now += RETRY_SECONDS
    assert bench.priority() == 0
    now += 10 * RETRY_SECONDS
    assert bench.priority() == 0
    assert reads.count("qwen") == 2
    assert [report.partition(": ")[2] for report in bench.reports] == ["It cannot be read: Too many open files."]


def test_to_reread_is_to_read_and_report_all_once_more(bench: Bench, reads: list[str]) -> None:
    bench.write_model("pinned = 1")
    for _ in range(2):
        bench.watched.model("qwen")
    bench.watched.reread()
    for _ in range(2):
        bench.watched.model("qwen")
    assert reads == ["host", "qwen"] * 2
    assert len(bench.reports) == 2


def test_the_report_is_the_error_with_all_its_problems(tmp_path: Path) -> None:
    errors: list[InvalidFileError] = []
    bench = Bench(tmp_path)
    bench.write_host("a = 1\nb = 2")
    Watched(bench.paths, errors.append).host()
    assert [problem.key for error in errors for problem in error.problems] == ["a", "b"]
