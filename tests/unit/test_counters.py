"""What the gateway counts, and what others read of it."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc.errors import GpusvcError
from gpusvc.state.counters import BOUNDS, Answers, Counters, answers, file_of, read


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    made = Counters(file_of(tmp_path, 0))
    yield made
    made.close()


def test_nothing_is_counted_where_there_are_no_files(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    assert read(tmp_path / "absent") == {}


def test_a_reader_sees_at_once_what_a_worker_counts(counters: Counters, tmp_path: Path) -> None:
    qwen = counters.of("qwen")
    qwen.began()
    qwen.began()
    qwen.began()
    qwen.waiting(+1)
    qwen.first_byte(0.3)
    qwen.ended(200, 1.5)
    qwen.tokens(12, 34)
    qwen.received(100)
    qwen.sent(2000)

    totals = read(tmp_path)["qwen"]

    assert (totals.in_flight, totals.waiting) == (2, 1)
    assert totals.requests == {"none": 0, "1xx": 0, "2xx": 1, "3xx": 0, "4xx": 0, "5xx": 0}
    assert totals.first_byte_seconds.sum == 0.3
    assert totals.first_byte_seconds.counts[BOUNDS.index(0.5)] == 1
    assert totals.seconds.sum == 1.5
    assert totals.seconds.counts[BOUNDS.index(2.5)] == 1
    assert (totals.prompt_tokens, totals.completion_tokens) == (12, 34)
    assert (totals.received_bytes, totals.sent_bytes) == (100, 2000)


@pytest.mark.parametrize(
    ("status", "counted"),
    [(0, "none"), (101, "1xx"), (200, "2xx"), (304, "3xx"), (499, "4xx"), (503, "5xx"), (999, "5xx")],
)
def test_a_status_counts_in_its_class(counters: Counters, tmp_path: Path, status: int, counted: str) -> None:
    counters.of("qwen").ended(status, 0.1)
    assert [name for name, number in read(tmp_path)["qwen"].requests.items() if number] == [counted]


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.005, 0), (0.0051, 1), (600.0, 15), (601.0, 16)])
def test_a_bound_belongs_to_its_bucket(counters: Counters, tmp_path: Path, seconds: float, bucket: int) -> None:
    counters.of("qwen").first_byte(seconds)
    counts = read(tmp_path)["qwen"].first_byte_seconds.counts
    assert [index for index, number in enumerate(counts) if number] == [bucket]


def test_workers_are_added_up(counters: Counters, tmp_path: Path) -> None:
    other = Counters(file_of(tmp_path, 1))
    for worker in (counters, other):
        worker.of("qwen").began()
        worker.of("qwen").ended(200, 2.0)
        worker.of("qwen").began()
    totals = read(tmp_path)["qwen"]
    other.close()
    assert totals.in_flight == 2
    assert totals.requests["2xx"] == 2
    assert totals.seconds.sum == 4.0


def test_there_is_one_of_each_model(counters: Counters) -> None:
    assert counters.of("qwen") is counters.of("qwen")


def test_requests_of_no_model_are_counted_too(counters: Counters, tmp_path: Path) -> None:
    counters.of("").ended(404, 0.0)
    assert read(tmp_path)[""].requests["4xx"] == 1


def test_the_longest_name_is_read_back_whole(counters: Counters, tmp_path: Path) -> None:
    counters.of("n" * 200).began()
    assert read(tmp_path)["n" * 200].in_flight == 1


def test_models_beyond_the_first_chunk_are_counted(counters: Counters, tmp_path: Path) -> None:
    for index in range(150):
        counters.of(f"model-{index}").received(index)
    totals = read(tmp_path)
    assert len(totals) == 150
    assert all(totals[f"model-{index}"].received_bytes == index for index in range(150))


def test_totals_go_on_after_a_restart_and_what_was_in_flight_does_not(counters: Counters, tmp_path: Path) -> None:
    for index in range(70):
        counters.of(f"model-{index}").ended(200, 1.0)
    counters.of("model-69").began()
    counters.of("model-69").waiting(+1)
    counters.close()

    again = Counters(file_of(tmp_path, 0))
    again.of("model-69").began()
    again.of("model-69").ended(200, 1.0)
    again.of("model-69").began()
    again.of("new").began()
    totals = read(tmp_path)
    again.close()

    assert len(totals) == 71
    assert totals["model-69"].requests["2xx"] == 2
    assert (totals["model-69"].in_flight, totals["model-69"].waiting) == (1, 0)
    assert totals["new"].in_flight == 1


def test_what_is_in_flight_ends_with_its_worker(counters: Counters, tmp_path: Path) -> None:
    counters.of("qwen").ended(200, 1.0)
    counters.of("qwen").began()
    counters.of("qwen").began()
    counters.of("qwen").waiting(+1)
    counters.close()  # as the kernel does for one that was killed
    totals = read(tmp_path)["qwen"]
    assert (totals.in_flight, totals.waiting) == (0, 0)
    assert totals.requests["2xx"] == 1


def test_a_file_of_another_layout_makes_way(tmp_path: Path) -> None:
    file_of(tmp_path, 0).write_bytes(b"\1" * 65536)
    assert read(tmp_path) == {}
    again = Counters(file_of(tmp_path, 0))
    again.of("qwen").received(1)
    assert list(read(tmp_path)) == ["qwen"]
    again.close()


def test_a_file_that_was_cut_makes_way(counters: Counters, tmp_path: Path) -> None:
    counters.of("qwen").received(1)
    file_of(tmp_path, 1).write_bytes(file_of(tmp_path, 0).read_bytes()[:5000])
    assert read(tmp_path)["qwen"].received_bytes == 2
    again = Counters(file_of(tmp_path, 1))
    assert read(tmp_path)["qwen"].received_bytes == 1
    again.close()


def test_a_worker_that_died_before_its_first_model_leaves_a_file_that_serves(tmp_path: Path) -> None:
    file_of(tmp_path, 0).write_bytes(bytes(65536))
    again = Counters(file_of(tmp_path, 0))
    again.of("qwen").received(7)
    assert read(tmp_path)["qwen"].received_bytes == 7
    assert file_of(tmp_path, 0).stat().st_size == 65536
    again.close()


def test_counting_goes_on_where_there_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counters = Counters(tmp_path / "absent" / "counters-0")
    counters.of("qwen").began()
    counters.of("qwen").ended(200, 0.1)
    assert "counters are not shown" in capsys.readouterr().err


def test_counting_goes_on_where_there_is_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))  # Python ignores SIGXFSZ
    try:
        counters = Counters(file_of(tmp_path, 0))
        for index in range(200):
            counters.of(f"model-{index}").received(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read(tmp_path)) == 64
    assert capsys.readouterr().err.count("further models") == 1
    counters.close()


def test_only_the_group_may_read(counters: Counters, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        Counters(file_of(tmp_path, 1)).close()
    finally:
        os.umask(before)
    assert file_of(tmp_path, 1).stat().st_mode & 0o777 == 0o640


def test_a_stranger_who_holds_the_lock_keeps_no_worker_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Counters(file_of(tmp_path, 1)).close()
    with file_of(tmp_path, 1).open() as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        counters = Counters(file_of(tmp_path, 1))
        counters.of("qwen").received(7)
        assert read(tmp_path)["qwen"].received_bytes == 7
        counters.close()
    assert "stays locked" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    file_of(tmp_path, 0).symlink_to("/dev/null")  # not even root follows it
    with pytest.raises(GpusvcError, match="cannot be read"):
        read(tmp_path)


def test_the_answers_of_all_workers_are_added_up(counters: Counters, tmp_path: Path) -> None:
    other = Counters(file_of(tmp_path, 1))
    for worker in (counters, other):
        worker.of("qwen").response_began(200)
        worker.of("qwen").response_began(400)
        worker.of("qwen").response_began(500)
        worker.of("qwen").attached(+1)
    counters.of("qwen").response_ended(200)
    assert answers(tmp_path) == {"qwen": Answers(succeeded=2, failed=2, succeeding=1, attached=2)}
    other.close()
    assert answers(tmp_path) == {"qwen": Answers(succeeded=2, failed=2, succeeding=0, attached=1)}


def test_a_file_of_the_first_version_has_its_totals_and_no_answers(tmp_path: Path) -> None:
    """Version 0.1.0 wrote the same records, with zeros behind the bytes that were sent."""
    import struct  # noqa: PLC0415

    record = struct.pack("=Q248s48d", 0x67707573_76630001, b"qwen", *map(float, range(48)))
    file_of(tmp_path, 0).write_bytes(record.ljust(64 * 1024, b"\0"))
    assert read(tmp_path)["qwen"].sent_bytes == 47
    assert answers(tmp_path) == {"qwen": Answers(0, 0, 0, 0)}
    taken_over = Counters(file_of(tmp_path, 0))
    taken_over.of("qwen").response_began(503)
    assert read(tmp_path)["qwen"].sent_bytes == 47
    assert answers(tmp_path) == {"qwen": Answers(0, 1, 0, 0)}
    taken_over.close()
