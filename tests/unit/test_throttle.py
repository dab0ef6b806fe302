"""Which lines of an engine are recorded when it writes too many."""

from __future__ import annotations

from gpusvc.journal.throttle import BURST_LINES, LINES_PER_SECOND, Throttle

# What journald takes from a unit by default: journald.conf(5).
JOURNALD_LINES = 10_000
JOURNALD_SECONDS = 30


def lines(first: int, count: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(first, first + count))


def test_an_engine_that_writes_little_is_recorded_as_it_writes() -> None:
    throttle = Throttle(0)
    for second in range(1000):
        said = lines(second * 100, 100)
        assert throttle.feed(said, second) == said


def test_a_part_of_a_line_passes_at_once() -> None:
    throttle = Throttle(0)
    assert throttle.feed(b"loading 10 %", 0) == b"loading 10 %"
    assert throttle.feed(b" 20 %\n", 0) == b" 20 %\n"


def test_a_flood_leaves_journald_room_for_the_lines_of_others_in_any_half_minute() -> None:
    throttle = Throttle(0)
    passed = [throttle.feed(lines(tick * 2000, 2000), tick / 10).count(b"\n") for tick in range(1000)]
    windows = [sum(passed[at : at + JOURNALD_SECONDS * 10]) for at in range(700)]
    assert max(windows) < JOURNALD_LINES - 200
    assert sum(passed[300:]) > 0.9 * LINES_PER_SECOND * 70  # and yet it is heard


def test_a_flood_is_cut_between_lines_and_its_loss_is_counted() -> None:
    throttle = Throttle(0)
    first = throttle.feed(lines(0, 20_000), 0)
    assert first == lines(0, BURST_LINES)
    assert throttle.feed(lines(20_000, 20_000), 1) == b""
    report, _, kept = throttle.flush().partition(b"\n")
    lost = 40_000 - BURST_LINES - kept.count(b"\n")
    assert report.decode() == f"<4>gpusvc left out {lost} lines here: the engine writes more than 150 lines a second."
    assert kept == lines(40_000 - kept.count(b"\n"), kept.count(b"\n"))
    assert kept.count(b"\n") > 100


def test_the_last_words_of_a_flood_are_kept() -> None:
    throttle = Throttle(0)
    throttle.feed(lines(0, 100_000), 0)
    throttle.feed(b"CUDA error: out of memory\nAborted", 0.1)
    assert throttle.flush().endswith(b"\nCUDA error: out of memory\nAborted")
    assert throttle.flush() == b""


def test_what_is_held_back_for_a_moment_only_is_no_loss() -> None:
    throttle = Throttle(0)
    throttle.feed(lines(0, BURST_LINES), 0)
    assert throttle.feed(b"one more\n", 0) == b""
    assert throttle.flush() == b"one more\n"


def test_a_line_without_end_is_limited_too_and_what_follows_is_another_line() -> None:
    throttle = Throttle(0)
    passed = throttle.feed(b"x" * 1_000_000, 0)
    assert len(passed) == 1_000_000
    for _ in range(20):
        passed += throttle.feed(b"x" * 1_000_000, 0)
    assert passed.endswith(b"x\n")
    assert len(passed) < 7_000_000
    assert throttle.flush().startswith(b"<4>gpusvc left out 1 lines here")
