"""The line of waiting starts as everybody sees it: its sentences, its order, and notices of processes that died."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.paths import Paths
from gpusvc.placement import waitlist
from gpusvc.placement.request import Wish
from gpusvc.placement.waitlist import Ticket
from gpusvc.state import line
from gpusvc.state.line import Blocker, Notice, Waiting

NOW = 1_700_000_000.0
CODER = Waiting("coder", NOW - 40, (Blocker("qwen", "in use"),))
GEMMA = Waiting("gemma", NOW - 125, (), ("coder",))
MINUTE_NS = 60 * 10**9


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "etc", tmp_path / "run", tmp_path / "lib")


@pytest.mark.parametrize(
    ("waiting", "sentence"),
    [
        (CODER, "coder has waited 40s for qwen (in use). It is next."),
        (GEMMA, "gemma has waited 2min 5s in line behind coder. coder is next."),
        (
            Waiting("phi", NOW, (Blocker("a", "loading"), Blocker("b", "stopping")), ("coder", "gemma")),
            "phi has waited 0s for a (loading) and b (stopping), behind coder and gemma. coder is next.",
        ),
        (Waiting("phi", NOW + 5), "phi has waited 0s for room. It is next."),
        (
            Waiting("phi", NOW, (), tuple("abcdefg")),
            "phi has waited 0s in line behind a, b, c and 4 more. a is next.",
        ),
    ],
)
def test_a_sentence_says_who_waits_for_whom_how_long_and_who_is_next(waiting: Waiting, sentence: str) -> None:
    assert waiting.sentence(NOW) == sentence
    before, after = waiting.parts()
    assert sentence.startswith(before)
    assert sentence.endswith(after)


def test_a_gist_has_no_time() -> None:
    assert CODER.gist() == "coder waits for qwen (in use). It is next."


def test_models_that_a_reader_may_not_know_of_are_only_counted() -> None:
    waiting = Waiting("phi", NOW, (Blocker("qwen", "in use"), Blocker("secret", "loading")), ("hidden", "gemma"))

    def shown(model: str) -> bool:
        return model in {"phi", "qwen"}

    assert (
        waiting.gist(shown) == "phi waits for qwen (in use) and 1 more, behind 2 other models. Another model is next."
    )
    assert GEMMA.gist(lambda _: False) == "Another model waits in line behind 1 other model. Another model is next."


def test_what_a_start_tells_is_read_by_all_until_it_is_over(paths: Paths) -> None:
    with waitlist.placement_lock(paths), Ticket(paths, "coder") as ticket:
        assert line.read(paths) == []
        told = ticket.tell([Blocker("qwen", "in use")], [])
        assert line.read(paths) == [told]
        (file,) = paths.line_directory.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        assert stat.S_IMODE(paths.line_directory.stat().st_mode) == 0o755
        later = ticket.tell([Blocker("gemma", "loading")], [])
        assert line.read(paths) == [later]
        assert later.since == told.since
    assert line.read(paths) == []
    assert list(paths.line_directory.iterdir()) == []


def test_a_notice_is_written_again_only_if_it_says_something_new(paths: Paths) -> None:
    notice = Notice(paths, "1-coder", "coder", 1, 0)
    notice.tell(CODER.blockers, ["a"])
    before = (paths.line_directory / "1-coder").stat().st_ino
    notice.tell(list(CODER.blockers), ["a", "b"])
    assert (paths.line_directory / "1-coder").stat().st_ino == before
    notice.close()
    notice.close()


def test_the_order_of_notices_is_that_of_the_tickets(paths: Paths) -> None:
    births = {"old": (0, -5), "plain": (MINUTE_NS + 1, 0), "urgent": (MINUTE_NS + 2, 3), "young": (2 * MINUTE_NS, 9)}
    notices = [Notice(paths, f"{born}-{name}", name, born, priority) for name, (born, priority) in births.items()]
    for notice in notices:
        notice.tell([], [])
    assert [(one.model, one.position, one.behind) for one in line.read(paths)] == [
        ("old", 1, ()),
        ("urgent", 2, ("old",)),
        ("plain", 3, ("old", "urgent")),
        ("young", 4, ("old", "urgent", "plain")),
    ]
    for notice in notices:
        notice.close()


def test_the_notice_of_a_dead_start_is_not_believed_and_goes_with_its_ticket(paths: Paths) -> None:
    pid = os.fork()
    if pid == 0:
        ticket = Ticket(paths, "dead")
        ticket.wish(Wish("dead", {}, ()))
        ticket.tell([Blocker("qwen", "in use")], [])
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(paths.line_directory.iterdir())) == 1
    assert line.read(paths) == []
    assert waitlist.ahead(paths, None) == []
    assert list(paths.line_directory.iterdir()) == []


def test_a_start_goes_on_where_its_notice_cannot_be_written(paths: Paths) -> None:
    paths.runtime.mkdir()
    paths.line_directory.write_text("a file in the place of the directory")
    notice = Notice(paths, "1-coder", "coder", 1, 0)
    assert notice.tell(CODER.blockers, []).gist() == CODER.gist()
    notice.close()
    assert line.read(paths) == []


def test_who_waits_for_a_model_is_found() -> None:
    assert line.of([CODER, GEMMA], "gemma") == GEMMA
    assert line.of([CODER, GEMMA], "qwen") is None
    assert line.that_needs([GEMMA, CODER], "qwen") == CODER
    assert line.that_needs([CODER], "coder") is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
_KEYS = ("model", "since", "born_ns", "priority", "for")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(_KEYS, _JSON)) | _JSON)
def test_whatever_a_notice_says_it_makes_a_sentence_or_none(value: object) -> None:
    read = line.parse(json.dumps(value))
    if read is not None:
        assert read[1].sentence(NOW)
