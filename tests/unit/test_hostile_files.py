"""Files that hold anything, or are anything: a clear error or nothing, never a surprise and never a wait."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpusvc import files as statefile
from gpusvc import names
from gpusvc.config import files as config
from gpusvc.config import keys, serving, toml
from gpusvc.config.host import HostConfig, read_host
from gpusvc.config.model import read_model
from gpusvc.config.table import InvalidFileError, Table
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.journal import eventlog
from gpusvc.paths import Paths
from gpusvc.placement import waitlist
from gpusvc.placement.request import Wish
from gpusvc.placement.waitlist import Ticket
from gpusvc.printable import escaped_json, printable
from gpusvc.record import replace
from gpusvc.state import counters
from gpusvc.state import footprints as footprint
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease
from gpusvc.watchdog import verdicts
from gpusvc.watchdog.judge import Finding, Source
from tests.unit.test_lease import LEASE

MODEL = 'command = ["/bin/sh"]\nuser = "root"\naliases = ["a/b"]\n[gpu]\ncount = 0\n[filter]\nset = { n = 1 }\n'
KEYS = f'["somebody"]\nsha256 = "{"0" * 64}"\nrights = ["use"]\n'

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TOML_VALUE = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30) | st.sampled_from(["1h", "9GiB"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def _no_wait() -> Iterator[None]:
    """What waits, or computes for ever, fails by an alarm, and shows where."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def directories() -> Iterator[Paths]:
    """Those of a machine of its own, for one example."""
    with tempfile.TemporaryDirectory() as name:
        paths = Paths(config=Path(name, "etc"), runtime=Path(name, "run"), state=Path(name, "lib"))
        made = (paths.models_directory, paths.lease_directory("qwen"), paths.waitlist_directory)
        for directory in (*made, paths.state / "footprints", paths.runtime / "watchdog", paths.runtime / "gateway"):
            directory.mkdir(parents=True)
        yield paths


def read_waitlist(paths: Paths) -> object:
    return waitlist.ahead(paths, None)


def read_keys(paths: Paths) -> object:
    try:
        return keys.read(keys.file_of(paths))
    except FileNotFoundError:
        return None


# Where each file is, how it is read, and what is right in it.
READERS: Mapping[str, tuple[Callable[[Paths], Path], Callable[[Paths], object], str]] = {
    "host": (lambda paths: paths.host_file, config.load_host, "[gateway]\nworkers = 2\n"),
    "model": (
        lambda paths: paths.model_file("qwen"),
        lambda paths: config.load_model(paths, "qwen", HostConfig()),
        MODEL,
    ),
    "all": (lambda paths: paths.model_file("qwen"), config.check, MODEL),
    "serving": (lambda paths: paths.model_file("qwen"), lambda paths: serving.load_serving(paths, "qwen"), MODEL),
    "keys": (keys.file_of, read_keys, KEYS),
    "lease": (
        lambda paths: paths.lease_file("qwen"),
        lambda paths: leases.read(paths, "qwen"),
        json.dumps(LEASE.to_json()),
    ),
    "footprint": (
        lambda paths: paths.state / "footprints/qwen.json",
        lambda paths: footprint.peaks(paths, "qwen", "0badcafe"),
        json.dumps(footprint.to_json({"0badcafe": {"NVIDIA": 9 << 30}})),
    ),
    "learnt": (
        lambda paths: paths.state / "footprints/qwen.json",
        lambda paths: footprint.learn(paths, "qwen", "0badcafe", "NVIDIA", 1 << 30),
        json.dumps(footprint.to_json({"0badcafe": {"NVIDIA": 9 << 30}})),
    ),
    "verdicts": (
        verdicts.file_of,
        verdicts.read,
        json.dumps({"version": 1, "models": {"qwen": {"kind": next(iter(Finding)), "source": next(iter(Source))}}}),
    ),
    "ticket": (
        lambda paths: paths.waitlist_directory / "00000000000000000001-qwen",
        read_waitlist,
        json.dumps({"model": "qwen", "bytes": {"GPU-1": 5}, "victims": ["b"]}),
    ),
    "counters": (
        lambda paths: counters.file_of(counters.directory(paths), 0),
        lambda paths: counters.read(counters.directory(paths)),
        "\0" * 4096,
    ),
}
EVERY = pytest.mark.parametrize("kind", READERS)


def look(kind: str, paths: Paths) -> object:
    """What is read, or the error that says why not; any other error is for the test to fail with."""
    try:
        return READERS[kind][1](paths)
    except GpusvcError as error:
        return error


def put(kind: str, paths: Paths, content: bytes) -> None:
    READERS[kind][0](paths).write_bytes(content)


# ---- what they may hold ----


@EVERY
@settings(max_examples=12)
@given(content=st.binary(max_size=300))
def test_bytes_of_any_kind(kind: str, content: bytes) -> None:
    with directories() as paths:
        put(kind, paths, content)
        look(kind, paths)


@EVERY
@settings(max_examples=20)
@given(data=st.data())
def test_what_was_right_until_something_happened_to_it(kind: str, data: st.DataObject) -> None:
    right = READERS[kind][2].encode()
    at = data.draw(st.integers(0, len(right)))
    end = data.draw(st.sampled_from([at, at + 1, at + 7, len(right)]))
    put_in = data.draw(
        st.sampled_from([b"", b"\0", b"\xff\xfe", b"[", b'"', b"-", b"9" * 30, b"1e999", b"null", b"\n"])
    )
    with directories() as paths:
        put(kind, paths, right[:at] + put_in + right[end:])
        look(kind, paths)


@pytest.mark.parametrize("kind", ["lease", "footprint", "learnt", "verdicts", "ticket"])
@settings(max_examples=25)
@given(data=st.data())
def test_json_of_any_shape(kind: str, data: st.DataObject) -> None:
    value = json.loads(READERS[kind][2])
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(value)), ANYTHING, min_size=1, max_size=3) | ANYTHING)
    with directories() as paths:
        put(kind, paths, json.dumps({**value, **changed} if isinstance(changed, dict) else changed).encode())
        with held_ticket(paths):
            look(kind, paths)


@contextmanager
def held_ticket(paths: Paths) -> Iterator[None]:
    """One that nobody holds would be taken away unread."""
    file = READERS["ticket"][0](paths)
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def known_keys(read: Callable[[Table], object]) -> list[str]:
    table = Table(Path("x.toml"), {})
    read(table)
    return table.known_keys()


HOST_KEYS = known_keys(read_host)
MODEL_KEYS = known_keys(lambda table: read_model(table, "qwen", HostConfig()))


@pytest.mark.parametrize("kind", ["host", "model", "serving"])
@settings(max_examples=30)
@given(data=st.data())
def test_values_of_any_type_for_every_key(kind: str, data: st.DataObject) -> None:
    wanted = data.draw(
        st.dictionaries(st.sampled_from(HOST_KEYS if kind == "host" else MODEL_KEYS), TOML_VALUE, max_size=6)
    )
    document: dict[str, Any] = {}
    for dotted, value in wanted.items():
        *tables, last = dotted.split(".")
        where = document
        for table in tables:
            inner = where.setdefault(table, {})
            where = inner if isinstance(inner, dict) else {}
        where[last] = value
    text = toml.document(document)
    tomllib.loads(text)
    with directories() as paths:
        put(kind, paths, text.encode())
        found = look(kind, paths)
    if isinstance(found, InvalidFileError):
        assert all(problem.message.endswith(".") for problem in found.problems)


@EVERY
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 100_000, id="nested lists"),
        pytest.param(b"a = " + b"[" * 100_000, id="nested TOML"),
        pytest.param(b'{"version": 1, "x": ' * 50_000, id="nested objects"),
        pytest.param(b"9" * 200_000, id="a long number"),
        pytest.param(b"a = " + b"9" * 200_000, id="a long number in TOML"),
        pytest.param(b"x" * 3_000_000, id="too large"),
        pytest.param(b"a.b." * 50_000 + b"c = 1", id="a long key"),
        pytest.param('a = "\u202e\u009b\ud7ff"'.encode(), id="steering characters"),
    ],
)
def test_what_is_deep_or_large(kind: str, content: bytes) -> None:
    with directories() as paths:
        put(kind, paths, content)
        with held_ticket(paths):
            look(kind, paths)


# ---- what they may be ----


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


@EVERY
@pytest.mark.parametrize(
    "make",
    [
        make_fifo,
        Path.mkdir,
        make_sparse,
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/nonexistent/file"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/proc/self/mem"),
        lambda path: path.symlink_to("/"),
    ],
    ids=["FIFO", "directory", "huge", "loop", "dangling", "endless", "memory", "root"],
)
def test_what_is_no_file_of_ours(kind: str, make: Callable[[Path], object]) -> None:
    with directories() as paths:
        file = READERS[kind][0](paths)
        make(file)
        found = look(kind, paths)
        assert not found or isinstance(found, GpusvcError | HostConfig | list), found
        assert not (kind == "lease" and not isinstance(found, BrokenLeaseError))


def test_a_lease_is_never_read_through_a_link() -> None:
    with directories() as paths:
        elsewhere = paths.runtime / "elsewhere"
        elsewhere.write_text(json.dumps(LEASE.to_json()))
        paths.lease_file("qwen").symlink_to(elsewhere)
        assert isinstance(look("lease", paths), BrokenLeaseError)


@pytest.mark.parametrize(
    "change",
    [
        {"port": 65536},
        {"port": -1},
        {"created": float("inf")},
        {"created": -1.0},
        {"created": 1e300},
        {"stop_timeout_seconds": float("nan")},
        {"release_timeout_seconds": float("inf")},
        {"pid": -1},
        {"processes": [[-1, 5]]},
        {"cgroup": "/gpusvc.slice/x\0/model-qwen.scope"},
        {"version": 2},
    ],
    ids=str,
)
def test_a_lease_with_a_number_that_none_of_ours_has_is_broken(change: dict[str, object]) -> None:
    with directories() as paths:
        put("lease", paths, json.dumps({**LEASE.to_json(), **change}).encode())
        assert isinstance(look("lease", paths), BrokenLeaseError)


def test_what_is_not_a_number_does_not_count() -> None:
    with directories() as paths:
        directory = counters.directory(paths)
        written = counters.Counters(counters.file_of(directory, 0))
        written.of("good").tokens(1, 2)
        written.of("bad").first_byte(float("nan"))
        written.of("endless").first_byte(float("inf"))
        assert counters.read(directory).keys() == {"good"}
        written.close()


def test_a_ticket_lives_on_beside_those_that_make_no_sense() -> None:
    with directories() as paths:
        make_fifo(paths.waitlist_directory / "0")
        (paths.waitlist_directory / "1").mkdir()
        (paths.waitlist_directory / "2").symlink_to("/dev/zero")
        with Ticket(paths, "qwen") as ticket:
            ticket.wish(Wish("qwen", {"GPU-1": 5}, ("b",)))
            assert [wish.model for wish in waitlist.ahead(paths, None)] == ["qwen"]


def test_a_state_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert statefile.read(file, limit_bytes=10) == b"x" * 10
    with pytest.raises(ValueError, match="too large"):
        statefile.read(file, limit_bytes=9)


# ---- names ----

ANY_NAME = st.one_of(
    st.text(max_size=300),
    st.from_regex(r"[A-Za-z0-9@:_.\-/\\ \n\0%]{0,40}", fullmatch=True),
    st.sampled_from(
        ["..", ".", "", "-h", "--help", "a/../b", "a" * 10_000, "model@", "model@model@x", "x.service", "\0"]
    ),
)


def is_name(text: str) -> bool:
    """Whether it is one, or the unit of one."""
    return names.is_name(text) or names.of_service(text) is not None or names.is_name(text.removeprefix("model@"))


@settings(max_examples=100)
@given(ANY_NAME)
def test_no_name_leads_out_of_a_directory_or_to_another_unit(text: str) -> None:
    if not is_name(text):
        with pytest.raises(UsageError) as caught:
            names.parse_name(text)
        assert len(caught.value.message) < 500
        assert caught.value.message.isprintable()
        return
    name = names.parse_name(text)
    with directories() as paths:
        files = (paths.model_file(name), paths.run_file(name), paths.lease_directory(name), paths.pin_file(name))
        assert [file.resolve().parent for file in files] == [file.parent.resolve() for file in files]
    assert names.of_service(names.service(name)) == name
    assert names.of_scope(names.scope(name)) == name
    assert not name.startswith("-")


@settings(max_examples=30)
@given(ANY_NAME)
def test_a_model_that_cannot_be_is_unknown_and_nothing_else(text: str) -> None:
    with directories() as paths:
        for find in (
            lambda: config.load_model(paths, text, HostConfig()),
            lambda: serving.load_serving(paths, text),
        ):
            with pytest.raises(GpusvcError) as caught:
                find()
            assert caught.value.exit_code == 3
            assert len(str(caught.value)) < 1000


# ---- the journal, and words of strangers ----


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(
            ["MESSAGE", "PRIORITY", "GPUSVC_EVENT", "GPUSVC_GPU", "GPUSVC_BYTES", "__CURSOR", "__REALTIME_TIMESTAMP"]
        ),
        ANYTHING | st.lists(st.integers(-300, 300)),
    )
    | ANYTHING
)
def test_an_entry_of_the_journal_is_an_event_or_none(entry: object) -> None:
    found = eventlog.parse(json.dumps(entry))
    if found is not None:
        json.dumps(found.to_json())


@given(st.text(), st.none() | st.integers(1, 50))
def test_printable_text_is_one_line_that_steers_nothing(text: str, width: int | None) -> None:
    shown = printable(text, width=width)
    assert shown.isprintable()
    assert width is None or len(shown) <= width
    assert width is not None or not text.isprintable() or shown == text


@given(ANYTHING, st.sampled_from([None, 2]))
def test_escaped_json_says_the_same_and_steers_nothing(value: object, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    shown = escaped_json(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert repr(json.loads(shown)) == repr(json.loads(text))
    shown.encode()


def test_a_lease_that_is_right_is_read() -> None:
    with directories() as paths:
        leases.write(paths, replace(LEASE, created=1.0))
        assert isinstance(look("lease", paths), Lease)
