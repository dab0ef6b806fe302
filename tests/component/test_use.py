"""The locks of a model's users and evictors, between real processes."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpusvc.errors import GpusvcError, PermissionDeniedError
from gpusvc.paths import Paths
from gpusvc.state import use
from gpusvc.state.drain import Drain
from gpusvc.state.use import DoorClosedError, NoDoorError
from tests.component.conftest import ROOT, eventually, say

ROUNDS = 1000

# Evaluates one expression a line, and answers with its value or the name of its error.
_PARTY = """
import sys
from pathlib import Path
from gpusvc.state import drain, use
from gpusvc.paths import Paths
paths = Paths(*map(Path, sys.argv[1:]))
held = None
def hold(thing):
    global held
    held = thing
    return thing is not None
for line in sys.stdin:
    try:
        answer = eval(line)
    except Exception as error:
        answer = type(error).__name__
    print(answer, flush=True)
"""

ENTER = "hold(use.enter(paths, 'qwen', timeout_seconds=None))"
TRY = "hold(use.try_enter(paths, 'qwen'))"
CLOSE_DOOR = "hold(drain.Drain(paths, 'qwen')) and held.close_door(5)"
DRAIN = "hold(drain.Drain(paths, 'qwen')) and held.wait_idle(5)"
LEAVE = "held.close()"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """With the files of qwen."""
    paths = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state")
    use.prepare(paths, "qwen", os.getegid())
    return paths


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that end with the test."""
    running: list[subprocess.Popen[str]] = []

    def started(*command: str | Path, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def party(paths: Paths, start: Start) -> Callable[[], subprocess.Popen[str]]:
    """Another process, which may use and evict the model."""
    return lambda: start(sys.executable, "-c", _PARTY, paths.config, paths.runtime, paths.state)


Party = Callable[[], subprocess.Popen[str]]


def ask(process: subprocess.Popen[str], line: str) -> None:
    """As say(), with no answer awaited."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def is_waiting(process: subprocess.Popen[str]) -> bool:
    """Whether the kernel has it wait for a lock; proc_locks(5) marks those with an arrow."""
    return any(f" {process.pid} " in line for line in Path("/proc/locks").read_text().splitlines() if "->" in line)


def drains(paths: Paths, seconds: float = 0.0) -> bool:
    with Drain(paths, "qwen") as drain:
        return drain.wait_idle(seconds)


# --- Users


def test_users_do_not_keep_each_other_out(paths: Paths, party: Party) -> None:
    assert say(party(), ENTER) == "True"
    with use.enter(paths, "qwen", timeout_seconds=0):
        entered = use.try_enter(paths, "qwen")
        assert entered is not None
        entered.close()


def test_a_model_is_used_until_the_last_one_leaves(paths: Paths) -> None:
    assert use.is_used(paths, "qwen") is False
    first = use.enter(paths, "qwen", timeout_seconds=None)
    second = use.enter(paths, "qwen", timeout_seconds=None)
    first.close()
    first.close()
    assert use.is_used(paths, "qwen") is True
    second.close()
    assert use.is_used(paths, "qwen") is False


def test_flock_pins_a_model_for_as_long_as_its_command_runs(paths: Paths, start: Start) -> None:
    if shutil.which("flock") is None:
        pytest.skip("needs flock(1) of util-linux")
    pin = start("flock", "-s", paths.lease_directory("qwen") / "use", "cat")
    assert say(pin, "running") == "running"
    assert use.is_used(paths, "qwen") is True
    assert not drains(paths)
    pin.communicate()
    assert use.is_used(paths, "qwen") is False
    assert drains(paths)


def test_the_shell_of_the_manual_goes_through_the_door(paths: Paths, start: Start) -> None:
    if shutil.which("flock") is None:
        pytest.skip("needs flock(1) of util-linux")
    script = 'cd "$1"; exec 8<door 9<use; flock -s 8 && touch door && flock -s 9 && exec 8<&-; exec cat'
    with Drain(paths, "qwen") as drain:
        assert drain.close_door()
        shell = start("sh", "-c", script, "sh", paths.lease_directory("qwen"))
        ask(shell, "inside")
        assert drain.wait_idle()
    assert answer(shell) == "inside"
    assert use.is_used(paths, "qwen") is True


def test_a_use_that_a_child_inherited_outlives_the_kill_of_its_parent(paths: Paths, party: Party, start: Start) -> None:
    parent = party()
    assert say(parent, ENTER) == "True"
    child = "__import__('subprocess').Popen(['sleep', '1000'], pass_fds=[held.fileno()], stdin=-3, stdout=-3).pid"
    pid = int(say(parent, child))
    try:
        parent.kill()
        parent.wait()
        assert use.is_used(paths, "qwen") is True
    finally:
        os.kill(pid, 9)
    assert eventually(lambda: use.is_used(paths, "qwen") is False)


def test_a_use_that_ended_is_over_for_children_too(paths: Paths, start: Start) -> None:
    with use.enter(paths, "qwen", timeout_seconds=0) as entered:
        start("cat", pass_fds=(entered.fileno(),))
        assert use.is_used(paths, "qwen") is True
    assert use.is_used(paths, "qwen") is False


# --- The door


def test_newcomers_wait_at_the_door_until_it_opens(paths: Paths, party: Party) -> None:
    newcomer = party()
    with Drain(paths, "qwen") as drain:
        assert drain.close_door()
        ask(newcomer, ENTER)
        assert eventually(lambda: is_waiting(newcomer))
        assert use.try_enter(paths, "qwen") is None
        assert drain.wait_idle()
    assert answer(newcomer) == "True"
    assert use.is_used(paths, "qwen") is True


def test_waiting_at_the_door_ends_when_the_time_is_up(paths: Paths) -> None:
    with Drain(paths, "qwen") as drain:
        assert drain.close_door()
        before = time.monotonic()
        with pytest.raises(DoorClosedError, match=r"qwen is being evicted.* Try again later\."):
            use.enter(paths, "qwen", timeout_seconds=0.2)
        assert 0.2 <= time.monotonic() - before < 5


def test_who_waits_with_a_deadline_comes_in_when_the_door_opens(paths: Paths, party: Party) -> None:
    newcomer = party()
    with Drain(paths, "qwen") as drain:
        assert drain.wait_idle()
        ask(newcomer, "hold(use.enter(paths, 'qwen', timeout_seconds=30))")
    assert answer(newcomer) == "True"


def test_a_drain_lets_those_inside_finish_and_nobody_else_in(paths: Paths, party: Party) -> None:
    inside = party()
    assert say(inside, ENTER) == "True"
    with Drain(paths, "qwen") as drain:
        assert not drain.wait_idle(0.05)
        assert say(party(), TRY) == "False"
        say(inside, LEAVE)
        assert drain.wait_idle(5)
        assert say(party(), TRY) == "False"


def test_clients_that_overlap_for_ever_do_not_hold_up_a_drain(paths: Paths, party: Party) -> None:
    clients = [party() for _ in range(3)]
    work = f"[held.close() for _ in iter(int, 1) if {ENTER} if sum(range(50000))]"
    for client in clients:
        ask(client, work)
    with Drain(paths, "qwen") as drain:
        assert drain.wait_idle(30)
        assert eventually(lambda: all(map(is_waiting, clients)))
    assert eventually(lambda: use.is_used(paths, "qwen") is True)


def test_a_give_up_leaves_no_closed_door(paths: Paths, party: Party) -> None:
    assert say(party(), ENTER) == "True"
    with contextlib.suppress(KeyboardInterrupt), Drain(paths, "qwen") as drain:
        assert not drain.wait_idle(0.01)
        raise KeyboardInterrupt
    assert say(party(), TRY) == "True"


def test_a_door_can_be_opened_between_two_attempts(paths: Paths) -> None:
    with Drain(paths, "qwen") as drain:
        for _ in range(3):
            assert drain.wait_idle()
            assert use.try_enter(paths, "qwen") is None
            drain.open_door()
            entered = use.try_enter(paths, "qwen")
            assert entered is not None
            assert not drain.wait_idle()
            entered.close()
            drain.open_door()


def test_one_evicts_at_a_time(paths: Paths) -> None:
    with Drain(paths, "qwen") as first, Drain(paths, "qwen") as second:
        assert first.close_door()
        assert not second.close_door(0.01)
        assert not second.wait_idle(0.01)
        assert first.wait_idle()
        assert first.wait_idle()
        first.open_door()
        assert second.wait_idle()


@pytest.mark.parametrize("role", [ENTER, CLOSE_DOOR, DRAIN])
def test_killing_any_party_frees_all_that_it_held(paths: Paths, party: Party, role: str) -> None:
    victim = party()
    assert say(victim, role) == "True"
    assert not drains(paths)
    victim.kill()
    victim.wait()
    assert drains(paths)
    assert say(party(), TRY) == "True"


@pytest.mark.parametrize("inside", [True, False])
def test_killing_a_newcomer_at_the_door_changes_nothing(paths: Paths, party: Party, *, inside: bool) -> None:
    newcomer = party()
    with Drain(paths, "qwen") as drain:
        assert drain.wait_idle() if inside else drain.close_door()
        ask(newcomer, ENTER)
        assert eventually(lambda: is_waiting(newcomer))
        newcomer.kill()
        newcomer.wait()
        assert drain.wait_idle()
    assert say(party(), TRY) == "True"


# --- What the files say


def test_progress_and_entries_are_told_apart(paths: Paths) -> None:
    directory = paths.lease_directory("qwen")
    for file in ("door", "use"):
        os.utime(directory / file, (1000, 1000))
    with use.enter(paths, "qwen", timeout_seconds=None) as entered:
        assert use.last_progress(paths, "qwen") == 1000
        assert (use.last_use(paths, "qwen") or 0) > 1000
        entered.touch()
        assert (use.last_progress(paths, "qwen") or 0) > 1000
    os.utime(directory / "use", (1000, 1000))
    use.touch(paths, "qwen")
    assert time.time() - (use.last_progress(paths, "qwen") or 0) < 60


def test_a_new_start_counts_as_use_and_keeps_the_files_that_others_hold(paths: Paths) -> None:
    directory = paths.lease_directory("qwen")
    with use.enter(paths, "qwen", timeout_seconds=None):
        for file in ("door", "use"):
            os.utime(directory / file, (1000, 1000))
            (directory / file).chmod(0o600)
        before = [(directory / file).stat().st_ino for file in ("door", "use")]
        use.prepare(paths, "qwen", os.getegid())
        assert [(directory / file).stat().st_ino for file in ("door", "use")] == before
        assert use.is_used(paths, "qwen") is True
    assert time.time() - (use.last_progress(paths, "qwen") or 0) < 60
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o660}


@pytest.mark.parametrize("umask", [0o077, 0o027, 0])
def test_the_locks_are_open_to_users_from_the_first_moment_on(
    paths: Paths, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As they are while nobody has put anything right yet.
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    before = os.umask(umask)
    try:
        use.prepare(paths, "gemma", os.getegid())
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    directory = paths.lease_directory("gemma")
    assert directory.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o660}


def test_a_model_that_never_started_is_unused_and_has_no_door(paths: Paths) -> None:
    assert use.is_used(paths, "gemma") is False
    assert use.last_use(paths, "gemma") is None
    assert use.last_progress(paths, "gemma") is None
    for attempt in (
        lambda: use.enter(paths, "gemma", timeout_seconds=1),
        lambda: use.try_enter(paths, "gemma"),
        lambda: use.touch(paths, "gemma"),
        lambda: Drain(paths, "gemma"),
    ):
        with pytest.raises(NoDoorError, match="`gpusvc start gemma` starts it"):
            attempt()


def test_what_is_no_lock_is_not_followed(paths: Paths) -> None:
    file = paths.lease_directory("qwen") / "use"
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert use.is_used(paths, "qwen") is None
    with pytest.raises(GpusvcError, match="cannot be opened"):
        use.enter(paths, "qwen", timeout_seconds=0)
    with pytest.raises(GpusvcError, match="cannot be made"):
        use.prepare(paths, "qwen", os.getegid())


@pytest.mark.skipif(os.geteuid() != 0, reason="plays several users: needs root")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1) of util-linux")
class TestUsers:
    """Who may do what, with the rights that the launcher's unit leaves it."""

    GROUP = 12345

    @pytest.fixture
    def directory(self) -> Iterator[Path]:
        """Where other users may look."""
        directory = Path("/tmp") / f"gpusvc-test-use-{os.getpid()}"
        directory.mkdir(mode=0o755)
        yield directory
        shutil.rmtree(directory)

    @pytest.fixture
    def shared(self, directory: Path) -> Paths:
        paths = Paths(config=directory, runtime=directory, state=directory)
        expression = f"use.prepare(paths, 'qwen', {self.GROUP})"
        command: list[str | Path] = [
            *("setpriv", "--bounding-set=-all,+setuid,+setgid,+setpcap", "--inh-caps=-all", "--no-new-privs"),
            *(sys.executable, "-c", _PARTY, directory, directory, directory),
        ]
        done = subprocess.run(
            command,
            input=expression,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.stdout == "None\n", done.stderr
        return paths

    def asks(self, paths: Paths, expression: str, *, gid: int) -> str:
        """As nobody, in that group."""
        code = f"""
import os
os.setgroups([]), os.setgid({gid}), os.setuid(65534)
from pathlib import Path
from gpusvc.state import drain, use
from gpusvc.paths import Paths
paths = Paths(*[Path({str(paths.runtime)!r})] * 3)
try:
    print({expression})
except Exception as error:
    print(type(error).__name__)
"""
        # Imported before the rights are gone, as the tree may be root's alone.
        code = "import gpusvc.state.drain, gpusvc.state.use\n" + code
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            check=True,
        )
        return done.stdout.strip()

    def test_the_launcher_needs_no_right_to_give_files_away(self, shared: Paths) -> None:
        for file in ("door", "use"):
            found = (shared.lease_directory("qwen") / file).stat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (0, self.GROUP, 0o660)

    @pytest.mark.parametrize(
        "expression",
        [
            "use.enter(paths, 'qwen', timeout_seconds=5).touch() is None",
            "use.touch(paths, 'qwen') is None",
            "drain.Drain(paths, 'qwen').wait_idle(5)",
            "use.is_used(paths, 'qwen') is False",
        ],
    )
    def test_members_of_the_group_may_use_and_evict(self, shared: Paths, expression: str) -> None:
        assert self.asks(shared, expression, gid=self.GROUP) == "True"

    @pytest.mark.parametrize(
        ("expression", "said"),
        [
            ("use.enter(paths, 'qwen', timeout_seconds=5)", PermissionDeniedError.__name__),
            ("drain.Drain(paths, 'qwen')", PermissionDeniedError.__name__),
            ("use.is_used(paths, 'qwen')", "None"),
            ("use.last_use(paths, 'qwen') is None", "False"),
        ],
    )
    def test_others_may_see_when_it_was_used_and_no_more(self, shared: Paths, expression: str, said: str) -> None:
        assert self.asks(shared, expression, gid=65534) == said


# --- The race

# One byte for each user, 1 while it is inside, and a last one, 1 while the model stops. Who sees what must not be,
# exits with a sentence. Users come in each of the three ways; evictors also give up, and look on.
_RACER = """
import fcntl, mmap, os, sys
from pathlib import Path
from gpusvc.state import drain, use
from gpusvc.paths import Paths
role, number, users, rounds = sys.argv[4], *map(int, sys.argv[5:8])
paths = Paths(*map(Path, sys.argv[1:4]))
board = mmap.mmap(os.open(sys.argv[8], os.O_RDWR), 0)

def come_in(turn):
    if turn % 3 == 0:
        return use.enter(paths, 'qwen', timeout_seconds=None)
    if turn % 3 == 1:
        return use.enter(paths, 'qwen', timeout_seconds=60)
    while (entered := use.try_enter(paths, 'qwen')) is None:
        os.sched_yield()
    return entered

for turn in range(rounds):
    if role == 'user':
        with come_in(turn) as entered:
            board[number] = 1
            if board[users]:
                sys.exit('a use of a stopping model')
            entered.touch()
            if board[users]:
                sys.exit('a model that stops while it is used')
            board[number] = 0
    else:
        use.is_used(paths, 'qwen')
        with drain.Drain(paths, 'qwen') as draining:
            if not draining.wait_idle(0 if turn % 4 == 0 else 60):
                if turn % 4:
                    sys.exit('a drain that never ends')
                continue
            board[users] = 1
            if any(board[:users]):
                sys.exit('an eviction of a used model')
            os.sched_yield()
            if any(board[:users]):
                sys.exit('a use that began during an eviction')
            board[users] = 0
"""


def test_no_request_ever_meets_an_eviction(paths: Paths, tmp_path: Path, start: Start) -> None:
    users, evictors = 4, 2
    board = tmp_path / "board"
    board.write_bytes(bytes(max(users + 1, mmap.PAGESIZE)))
    roots = (paths.config, paths.runtime, paths.state)
    racers = [
        start(sys.executable, "-c", _RACER, *roots, role, str(number), str(users), str(ROUNDS), board)
        for role, count in (("user", users), ("evictor", evictors))
        for number in range(count)
    ]
    assert [racer.wait(timeout=120) for racer in racers] == [0] * len(racers)
    assert drains(paths)
