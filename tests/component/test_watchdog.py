"""The watchdog's ticks: real pynvml on simulated GPUs, real locks and processes; systemd and the clock are played."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from gpusvc.config.files import InvalidFileError
from gpusvc.config.watched import Watched
from gpusvc.errors import PermissionDeniedError, SystemdError
from gpusvc.gpu import driver, reader_process
from gpusvc.gpu.driver import Driver
from gpusvc.gpu.meter import Meter
from gpusvc.journal import events
from gpusvc.linux import cgroup
from gpusvc.record import replace
from gpusvc.state import counters, keepalive, upstream_key, use
from gpusvc.state import lease as leases
from gpusvc.state.counters import Counters
from gpusvc.watchdog import verdicts
from gpusvc.watchdog.daemon import Watchdog
from gpusvc.watchdog.judge import Finding, Judgement, Source
from gpusvc.watchdog.observer import Observer
from tests.component.conftest import Machine, eventually
from tests.component.fleet import Clock, Fleet, Heard
from tests.fakegpu import GIB, MIB, FakeGpu, Return, Sample

STOP = ("Stop", "model@qwen.service")
RELEASE = ("Restart", "gpusvc-release@qwen.service")


class Ticker:
    """A watchdog whose ticks are the test's, on a machine of the test's."""

    def __init__(self, fleet: Fleet, journal: socket.socket) -> None:
        self.fleet = fleet
        self.clock = Clock()
        self.heard = Heard()
        self.problems: list[InvalidFileError] = []
        self.clients: list[Driver] = []
        self._journal = journal
        self._told: list[str] = []
        # A file that was written a moment ago would not be believed yet.
        self.watched = Watched(fleet.paths, self.problems.append, now=lambda: self.clock.wall + 60)
        self.watchdog = self.make()

    def make(self) -> Watchdog:
        """A new process of it, which knows nothing."""
        observer = Observer(
            self.fleet.paths,
            self.watched,
            Meter(self._connect),
            now=self.clock.now,
            wall=self.clock.time,
            group_of=self.fleet.group_of,
        )
        connect = self.fleet.systemd.connect
        return Watchdog(self.fleet.paths, self.watched, observer, connect, self.heard, now=self.clock.now)

    def tick(self, times: int = 1, *, every: float = 1.0) -> Judgement:
        for _ in range(times):
            self.clock.advance(every)
            judgement = self.watchdog.tick()
        return judgement

    @property
    def jobs(self) -> list[tuple[str, str]]:
        return self.fleet.systemd.jobs

    def told(self) -> list[str]:
        """The events so far, each as ``kind model: message``."""
        with suppress(BlockingIOError):
            while True:
                self._told.append(_in_words(self._journal.recv(1 << 18)))
        return self._told

    def kinds(self) -> list[str]:
        return [line.split(":")[0] for line in self.told()]

    def door_is_open(self, name: str = "qwen") -> bool:
        entered = use.try_enter(self.fleet.paths, name)
        if entered is None:
            return False
        entered.close()
        return True

    def _connect(self) -> Driver:
        self.clients.append(Driver(patience_seconds=10, step_seconds=None, begin=reader_process.execute))
        return self.clients[-1]


def _in_words(entry: bytes) -> str:
    fields: dict[str, str] = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(entry[:8], "little")
            value, entry = entry[8 : 8 + size], entry[9 + size :]
        fields[name.decode()] = value.decode()
    return f"{fields['GPUSVC_EVENT']} {fields.get('GPUSVC_MODEL', '-')}: {fields['MESSAGE']}"


@pytest.fixture
def ticker(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticker]:
    """One model may be idle for 10 s, and stuck for 20 s; one GPU."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(machine.libraries.directory))
    monkeypatch.setenv("FAKEGPU_DIR", str(machine.gpus.directory))
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    # Its words are what the journal has of an engine.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "journalctl").write_text("#!/bin/sh\necho 'first word'\necho 'last word'\n")
    (tools / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    # The path of a socket must be short.
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal,
    ):
        journal.bind(f"{short}/journal")
        journal.setblocking(False)
        monkeypatch.setattr(events, "_SOCKET", f"{short}/journal")
        fleet = Fleet(machine, tmp_path, tmp_path / "cgroup")
        fleet.host('[watchdog]\nidle_timeout = "10s"\nbusy_timeout = "20s"\n')
        made = Ticker(fleet, journal)
        yield made
        made.watchdog.close()


@contextmanager
def used(ticker: Ticker, name: str = "qwen") -> Iterator[None]:
    """As `flock --shared use` does it."""
    with (ticker.fleet.paths.lease_directory(name) / "use").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def works(ticker: Ticker, *working: str, gpu: int = 0) -> None:
    """From now on the GPU works for these models."""
    pids = [ticker.fleet.holders[name].pid for name in working]
    ticker.fleet.machine.gpus.change(gpu, samples=[Sample(pid, 50) for pid in pids])


# Idle


def test_an_idle_model_is_evicted_and_its_door_is_closed_until_it_is_gone(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(10)
    assert ticker.jobs == []
    ticker.tick(3)
    assert ticker.jobs == [STOP]
    assert ticker.kinds() == ["idle qwen", "evict qwen"]
    assert not ticker.door_is_open()
    ticker.tick(5)
    assert ticker.jobs == [STOP]
    assert not ticker.door_is_open()
    ticker.fleet.end("qwen")
    ticker.tick()
    assert ticker.door_is_open()
    assert ticker.kinds() == ["idle qwen", "evict qwen"]


def test_a_model_that_somebody_uses_stays(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text="busy_timeout = 0")
    with used(ticker):
        ticker.tick(60)
    assert ticker.jobs == []
    ticker.tick(12)
    assert ticker.jobs == [STOP]


def test_a_model_that_works_unasked_stays_and_counts_as_used(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    os.utime(ticker.fleet.paths.lease_directory("qwen") / "use", (1, 1))
    works(ticker, "qwen")
    ticker.tick(60)
    assert ticker.jobs == []
    assert (use.last_progress(ticker.fleet.paths, "qwen") or 0) > 1


def test_the_work_of_another_model_keeps_none(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.add("other")
    works(ticker, "other")
    ticker.tick(15)
    assert ticker.jobs == [STOP]


def test_where_nvml_does_not_tell_cpu_time_does(ticker: Ticker) -> None:
    ticker.fleet.machine.gpus.change(0, mig=True)
    ticker.fleet.add("qwen")
    for second in range(30):
        ticker.fleet.burn("qwen", second * 0.5)
        ticker.tick()
    assert ticker.jobs == []
    assert verdicts.read(ticker.fleet.paths)["qwen"].source is Source.CPU
    ticker.tick(12)
    assert ticker.jobs == [STOP]


def test_where_nvml_tells_the_gpus_work_only_it_is_the_work_of_the_model_that_is_alone(ticker: Ticker) -> None:
    ticker.fleet.machine.gpus.change(0, samples_by=2, utilisation=60)
    ticker.fleet.add("qwen")
    ticker.tick(30)
    assert ticker.jobs == []
    assert verdicts.read(ticker.fleet.paths)["qwen"].source is Source.NVML
    # Its workers spin on the CPU, and the GPU has nothing to do.
    ticker.fleet.machine.gpus.change(0, utilisation=0)
    for second in range(15):
        ticker.fleet.burn("qwen", second * 1.0)
        ticker.tick()
    assert ticker.jobs == [STOP]


def test_where_nvml_tells_the_gpus_work_only_and_others_are_on_it_cpu_time_does(ticker: Ticker) -> None:
    ticker.fleet.machine.gpus.change(0, samples_by=2, utilisation=60)
    ticker.fleet.add("qwen")
    ticker.fleet.add("other")
    ticker.tick(15)
    assert ("Stop", "model@qwen.service") in ticker.jobs


def test_a_model_without_gpu_is_judged_without_nvml(ticker: Ticker) -> None:
    ticker.fleet.machine.gpus.remove_driver()
    ticker.fleet.add("qwen", gpus=())
    ticker.tick(15)
    assert ticker.jobs == [STOP]
    assert ticker.clients == []


def test_whoever_came_in_during_the_tick_is_not_turned_out(ticker: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    ticker.fleet.add("qwen")
    look = ticker.watchdog._observer.look

    def look_and_be_used(leaving: frozenset[str]) -> object:
        seen = look(leaving)
        with use.enter(ticker.fleet.paths, "qwen", timeout_seconds=1):
            pass  # in and out again, before anybody acts on what was seen
        return seen

    ticker.tick(9)
    monkeypatch.setattr(ticker.watchdog._observer, "look", look_and_be_used)
    assert ticker.tick(2).verdicts[0].kind is Finding.NONE  # the one of the tick before was seen by this one
    assert ticker.jobs == []
    assert ticker.told() == []
    assert ticker.door_is_open()


def test_a_model_that_is_stopping_already_is_left_alone(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.systemd.states["model@qwen.service"] = "deactivating"
    ticker.tick(20)
    assert ticker.jobs == []
    assert ticker.told() == []


def test_a_model_that_leaves_for_one_that_starts_is_left_alone(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.add("next", ready=False, evicting=("qwen",))
    ticker.tick(20)
    assert ticker.jobs == []


def test_a_pinned_model_stays(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.paths.pin_file("qwen").touch()
    ticker.tick(20)
    assert ticker.jobs == []
    ticker.fleet.paths.pin_file("qwen").unlink()
    ticker.tick()
    assert ticker.jobs == [STOP]


def test_a_client_may_keep_a_model_or_let_it_go_sooner(ticker: Ticker) -> None:
    lease = ticker.fleet.add("qwen")
    keepalive.write(ticker.fleet.paths, "qwen", lease.created, math.inf)
    ticker.tick(20)
    assert ticker.jobs == []
    keepalive.write(ticker.fleet.paths, "qwen", lease.created + 1, 0.0)
    ticker.fleet.model("qwen", 'idle_timeout = "1h"')
    ticker.tick(20)
    assert ticker.jobs == []
    keepalive.write(ticker.fleet.paths, "qwen", lease.created, 0.0)
    ticker.tick(2)
    assert ticker.jobs == [STOP]


def test_a_model_whose_file_keeps_it_stays_whatever_clients_want(ticker: Ticker) -> None:
    lease = ticker.fleet.add("qwen", text="keep = true")
    keepalive.write(ticker.fleet.paths, "qwen", lease.created, 0.0)
    ticker.tick(20)
    assert ticker.jobs == []


def test_a_model_that_is_kept_is_not_idle(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text="keep = true")
    ticker.tick(20)
    assert ticker.jobs == []
    ticker.fleet.model("qwen", "")
    ticker.tick()
    assert ticker.jobs == [STOP]


def test_one_that_somebody_starts_again_meanwhile_is_let_go_of(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(13)
    assert not ticker.door_is_open()
    ticker.fleet.systemd.states["model@qwen.service"] = "active"
    ticker.tick(7)
    assert ticker.door_is_open()


def test_a_door_opens_again_at_last_even_if_the_model_never_goes(ticker: Ticker) -> None:
    ticker.fleet.change(ticker.fleet.add("qwen"), release_timeout_seconds=5.0, stop_timeout_seconds=5.0)
    ticker.tick(13)
    assert ticker.jobs == [STOP]
    ticker.clock.advance(110)
    ticker.fleet.systemd.states["model@qwen.service"] = "deactivating"
    ticker.watchdog._evictions.follow()
    assert ticker.door_is_open()


def test_a_new_watchdog_goes_on_where_the_locks_are(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(8)
    ticker.watchdog.close()
    # How long the model was unused stands in its files, and is believed as far as its engine is that old.
    engine = ticker.fleet.holders["qwen"].pid
    assert eventually(lambda: Path(f"/proc/{engine}").exists())
    ticker.watchdog = ticker.make()
    ticker.tick(5)
    assert ticker.jobs == [STOP]


# Evidence that is missing


@pytest.mark.parametrize(
    "fault", [{"lost": True}, {"processes_error": Return.UNKNOWN}, {"utilisation_error": Return.UNKNOWN}]
)
def test_a_gpu_that_cannot_be_read_proves_nobody_idle(ticker: Ticker, fault: dict[str, object]) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(5)
    ticker.fleet.machine.gpus.change(0, **fault)
    assert "There is no verdict on qwen" in ticker.tick(60).verdicts[0].reason
    assert ticker.jobs == []


def test_without_nvml_nobody_is_idle_and_it_is_not_asked_for_all_the_time(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
    judgement = ticker.tick(60)
    assert judgement.verdicts[0].reason == "There is no verdict on qwen: The NVIDIA driver is not loaded."
    assert ticker.jobs == []
    ticker.fleet.machine.gpus.configure(init_error=None)
    ticker.tick(80)
    assert ticker.jobs == [STOP]


def test_a_lost_gpu_costs_few_new_clients_and_its_neighbour_is_judged_on(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticker.fleet.machine.gpus.configure([FakeGpu(), FakeGpu()])
    ticker.fleet.add("lost", gpus=[0])
    ticker.fleet.add("qwen", gpus=[1])
    ticker.tick()
    renewals = []
    measure = Driver.measure

    def counted(self: Driver, since_us: Mapping[str, int], *, renew: bool = True) -> object:
        if renew:
            renewals.append(self)
        return measure(self, since_us, renew=renew)

    monkeypatch.setattr(Driver, "measure", counted)
    ticker.fleet.machine.gpus.change(0, lost=True)
    ticker.tick(60)
    assert ticker.jobs == [STOP]
    assert 1 <= len(renewals) <= 7
    ticker.fleet.machine.gpus.change(0, lost=False)
    ticker.tick(12)
    assert ("Stop", "model@lost.service") in ticker.jobs


def test_a_gpu_that_hangs_keeps_its_model_and_its_neighbour_is_judged_on(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_STEP_SECONDS", 0.5)
    ticker.fleet.machine.gpus.configure([FakeGpu(), FakeGpu()])
    ticker.fleet.add("hung", gpus=[0])
    ticker.fleet.add("qwen", gpus=[1])
    ticker.tick()
    ticker.clients[0]._patience_seconds = 0.1
    ticker.fleet.machine.gpus.change(0, hangs=True)
    assert eventually(lambda: ticker.tick().verdicts[0].reason.startswith("There is no verdict on hung: GPU 0 cannot"))
    judgement = ticker.tick(20)
    assert ticker.jobs == [STOP]
    assert "The GPU hangs" in judgement.verdicts[0].reason
    ticker.fleet.machine.gpus.change(0, hangs=False)
    monkeypatch.setattr(driver._Hang, "is_left_alone", lambda self, now: False)
    assert eventually(lambda: bool(ticker.tick()) and ("Stop", "model@hung.service") in ticker.jobs)


def test_a_driver_that_hangs_keeps_every_model_and_no_tick_waiting(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_STEP_SECONDS", 0.5)
    ticker.fleet.add("qwen")
    ticker.tick()
    ticker.clients[0]._patience_seconds = 0.1
    ticker.fleet.machine.gpus.configure(hangs=True)
    judgement = ticker.tick(40)
    assert judgement.verdicts[0].reason.startswith("There is no verdict on qwen: NVIDIA's driver has not answered for")
    assert ticker.jobs == []
    ticker.fleet.machine.gpus.configure(hangs=False)
    monkeypatch.setattr(driver._Hang, "is_left_alone", lambda self, now: False)
    assert eventually(lambda: bool(ticker.tick()) and ticker.jobs == [STOP])


def test_a_step_of_the_clock_makes_nobody_idle(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(5)
    ticker.clock.wall += 86400
    ticker.tick(2)
    ticker.clock.wall -= 2 * 86400
    ticker.tick(2)
    assert ticker.jobs == []


def test_a_clock_that_was_set_while_no_watchdog_ran_makes_nobody_idle(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.clock.wall += 86400
    ticker.tick(8)
    assert ticker.jobs == []


def test_a_sleep_of_the_machine_makes_nobody_idle(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(8)
    ticker.clock.advance(3600)
    ticker.tick(8)
    assert ticker.jobs == []
    ticker.tick(5)
    assert ticker.jobs == [STOP]


@pytest.mark.parametrize("which", ["host", "model"])
def test_a_file_that_was_never_right_makes_nobody_idle(ticker: Ticker, which: str) -> None:
    ticker.fleet.add("qwen", text="idle_timeout = 5" if which == "host" else "pinned = perhaps")
    if which == "host":
        ticker.fleet.host("nonsense")
        ticker.watched.reread()
        ticker.watched._host.value = None
    ticker.tick(30)
    assert ticker.jobs == []
    assert len(ticker.problems) == 1


def test_a_model_without_a_file_is_judged_by_the_hosts_policy(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.paths.model_file("qwen").unlink()
    ticker.tick(13)
    assert ticker.jobs == [STOP]


# Configuration


def test_a_changed_file_holds_at_the_next_tick(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text='idle_timeout = "1h"')
    ticker.tick(20)
    assert ticker.jobs == []
    ticker.fleet.model("qwen", 'idle_timeout = "5s"')
    ticker.tick()
    assert ticker.jobs == [STOP]


# Stuck


@pytest.mark.parametrize(("action", "job"), [("restart", "Restart"), ("stop", "Stop")])
def test_a_stuck_model_is_dealt_with_and_its_last_words_are_told(ticker: Ticker, action: str, job: str) -> None:
    ticker.fleet.add("qwen", text=f'busy_action = "{action}"')
    with used(ticker):
        ticker.tick(25)
        assert eventually(lambda: bool(ticker.tick() and ticker.jobs))
    assert ticker.jobs == [(job, "model@qwen.service")]
    (told,) = ticker.told()
    assert told.startswith("stuck qwen: qwen is in use, and for 20s made no progress")
    assert told.endswith("Its last words:\nfirst word\nlast word")
    assert not ticker.door_is_open()


def test_a_stuck_model_may_be_left_alone(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text='busy_action = "none"')
    with used(ticker):
        ticker.tick(25)
        assert eventually(lambda: bool(ticker.tick() and ticker.told()))
    assert ticker.jobs == []
    assert ticker.door_is_open()


def test_an_answer_that_streams_is_not_stuck(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    with used(ticker):
        for second in range(60):
            os.utime(ticker.fleet.paths.lease_directory("qwen") / "use", (second, second))
            ticker.tick()
    assert ticker.told() == []


def test_one_that_moves_while_its_last_words_are_looked_for_is_left_alone(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    with used(ticker):
        while ticker.tick().verdicts[0].kind is not Finding.STUCK:
            pass
        use.touch(ticker.fleet.paths, "qwen")
        assert eventually(lambda: bool(ticker.tick() and not ticker.watchdog._evictions.models))
    assert ticker.jobs == []
    assert ticker.told() == []


# Failing


class Engine(BaseHTTPRequestHandler):
    """An engine that answers each POST with the same status."""

    status = 500
    asked: ClassVar[list[tuple[str, object]]] = []
    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.keys.append(self.headers["Authorization"])
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[HTTPServer]:
    Engine.asked.clear()
    Engine.keys.clear()
    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PROBE = 'probe = {path = "/v1/completions", body = {max_tokens = 1}}'


def fails(ticker: Ticker, engine: HTTPServer, text: str = PROBE) -> None:
    """The engine of qwen answers three requests with 500, and then its failing_time passes."""
    paths = ticker.fleet.paths
    lease = ticker.fleet.add("qwen", text=text)
    leases.write(paths, replace(lease, port=engine.server_port))
    counters.directory(paths).mkdir(parents=True)
    counted = Counters(counters.file_of(counters.directory(paths), 0))
    ticker.tick()
    for _ in range(3):
        counted.of("qwen").response_began(500)
    with used(ticker):
        for _ in range(40):
            if ticker.tick().verdicts[0].kind is Finding.FAILING:
                break
        assert eventually(lambda: bool(ticker.tick() and not ticker.watchdog._evictions._stuck))
    counted.close()


def test_a_failing_model_whose_probe_fails_is_restarted(
    ticker: Ticker, engine: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "status", 500)
    ticker.fleet.host("[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\n")
    fails(ticker, engine)
    assert Engine.asked == [("/v1/completions", {"max_tokens": 1})]
    assert ticker.jobs == [("Restart", "model@qwen.service")]
    (told,) = ticker.told()
    assert told == (
        "failing qwen: qwen answered 3 requests in a row with a server error, in 30s. "
        "The watchdog's own request was answered with status 500. It is restarted.\n"
        "Its last words:\nfirst word\nlast word"
    )


def test_a_probe_has_the_key_that_the_engine_asks_for(ticker: Ticker, engine: HTTPServer) -> None:
    ticker.fleet.host("[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\n")
    file = upstream_key.file_of(ticker.fleet.paths, "qwen", upstream_key.WATCHDOG)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("of-the-engine")
    fails(ticker, engine)
    assert Engine.keys == ["Bearer of-the-engine"]


@pytest.mark.parametrize("status", [200, 404])
def test_a_model_that_answers_the_probe_is_left_alone(
    ticker: Ticker, engine: HTTPServer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(Engine, "status", status)
    ticker.fleet.host("[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\n")
    fails(ticker, engine)
    assert len(Engine.asked) == 1
    assert (ticker.jobs, ticker.told()) == ([], [])


def test_a_failing_model_without_a_probe_is_only_named(ticker: Ticker, engine: HTTPServer) -> None:
    ticker.fleet.host("[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\n")
    fails(ticker, engine, text="")
    assert (Engine.asked, ticker.jobs, ticker.kinds()) == ([], [], ["failing qwen"])


def test_busy_action_decides_on_a_failing_model_too(ticker: Ticker, engine: HTTPServer) -> None:
    ticker.fleet.host("[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\n")
    fails(ticker, engine, text=f'{PROBE}\nbusy_action = "stop"')
    assert ticker.jobs == [STOP]


# Pressure


def three_models(ticker: Ticker) -> None:
    """Used longest ago: first; GPU 0 is full to its reserve once a stranger has 21 GiB."""
    ticker.fleet.host('[watchdog]\nidle_timeout = 0\nbusy_timeout = 0\npressure_time = "5s"\n')
    for number, name in enumerate(("first", "second", "third")):
        ticker.fleet.add(name)
        for file in ("door", "use"):
            os.utime(ticker.fleet.paths.lease_directory(name) / file, (number, number))


def test_under_pressure_the_models_that_were_used_longest_ago_leave_one_at_a_time(ticker: Ticker) -> None:
    three_models(ticker)
    ticker.fleet.machine.holder("20.5GiB")
    ticker.tick(8)
    assert ticker.jobs == [("Stop", "model@first.service")]
    assert ticker.kinds() == ["pressure first", "evict first"]
    ticker.tick(20)
    assert len(ticker.jobs) == 1
    ticker.fleet.end("first")
    ticker.tick(8)
    assert ticker.jobs == [("Stop", "model@first.service")]  # that was enough
    ticker.fleet.machine.holder("900MiB")
    ticker.tick(8)
    assert ticker.jobs[1:] == [("Stop", "model@second.service")]


def test_under_pressure_the_busy_and_the_pinned_stay_and_that_is_said_once(ticker: Ticker) -> None:
    three_models(ticker)
    ticker.fleet.paths.pin_file("second").touch()
    works(ticker, "third")
    ticker.fleet.machine.holder("20.5GiB")
    with used(ticker, "first"):
        ticker.tick(30)
        assert ticker.jobs == []
        assert ticker.kinds() == ["pressure -"]
    ticker.tick(5)
    assert ticker.jobs == [("Stop", "model@first.service")]


def test_pressure_on_one_gpu_is_nothing_to_the_models_of_another(ticker: Ticker) -> None:
    ticker.fleet.machine.gpus.configure([FakeGpu(), FakeGpu(uncounted=24 * GIB - 300 * MIB)])
    three_models(ticker)
    ticker.tick(20)
    assert ticker.jobs == []


# systemd


def test_what_systemd_refuses_is_not_asked_for_at_every_tick(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    refusals = 0

    def enqueue(verb: str, unit: str) -> str:
        nonlocal refusals
        refusals += 1
        raise PermissionDeniedError("You may not stop model@qwen.service.")

    ticker.fleet.systemd.enqueue = enqueue  # type: ignore[method-assign]
    ticker.tick(60)
    assert 2 <= refusals <= 4
    assert ticker.door_is_open()


def test_a_connection_that_was_lost_is_made_again_at_once(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick(10)
    ticker.fleet.systemd.errors = [SystemdError("Could not list units: Connection reset by peer.")]
    ticker.watchdog._systemd.ask(lambda manager: None)  # there is one already
    ticker.tick(3)
    assert ticker.jobs == [STOP]
    assert ticker.fleet.systemd.connections == 2


def test_while_systemd_does_not_answer_nobody_is_evicted(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.systemd.errors = [SystemdError("Could not reach the service manager.")] * 4
    ticker.tick(12)
    assert ticker.jobs == []
    ticker.tick(5)
    assert ticker.jobs == [STOP]


def test_without_models_nothing_is_asked(ticker: Ticker) -> None:
    ticker.tick(5)
    assert (ticker.clients, ticker.fleet.systemd.connections) == ([], 0)


# Left behind


def test_a_lease_that_nobody_attends_to_has_its_release_proven(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick()
    ticker.fleet.end("qwen", release=False)
    ticker.tick(6)
    assert ticker.jobs == [RELEASE]
    assert ticker.told() == ["leak qwen: qwen does not run, and its lease is left: its release is proven now."]
    ticker.tick(15)
    assert ticker.jobs == [RELEASE]
    ticker.tick(10)
    assert ticker.jobs == [RELEASE, RELEASE]
    assert len(ticker.told()) == 1


def test_a_lease_that_cannot_be_read_is_proven_too(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.fleet.end("qwen", release=False)
    ticker.fleet.paths.lease_file("qwen").write_text("{")
    ticker.tick(6)
    assert ticker.jobs == [RELEASE]


def test_a_proof_that_has_just_failed_is_tried_again_a_while_later(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick()
    pid = ticker.fleet.holders["qwen"].pid
    ticker.fleet.machine.gpus.change(0, ghosts={pid: GIB})
    ticker.fleet.end("qwen", state="failed", release=False)
    ticker.tick(15)
    assert ticker.jobs == []
    ticker.tick(15)
    assert ticker.jobs == [RELEASE]


def test_a_proof_that_failed_with_nothing_in_its_way_is_made_up_for_at_once(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    ticker.tick()
    ticker.fleet.end("qwen", state="failed", release=False)
    ticker.tick(6)
    assert ticker.jobs == [RELEASE]


def test_a_scope_that_lives_without_its_service_is_cleared_away(ticker: Ticker) -> None:
    ticker.fleet.add("qwen")
    leases.remove(ticker.fleet.paths, "qwen")
    (cgroup.ROOT / "gpusvc.slice/model@qwen.service").rmdir()
    ticker.fleet.systemd.states["model@qwen.service"] = "inactive"
    ticker.tick(6)
    assert ticker.jobs == [RELEASE]


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_whom_systemd_knows_to_be_attended_to_is_left_alone(ticker: Ticker, state: str) -> None:
    ticker.fleet.add("qwen", text="idle_timeout = 0")
    (cgroup.ROOT / "gpusvc.slice/model@qwen.service").rmdir()  # an administrator's Slice=
    ticker.fleet.systemd.states["model@qwen.service"] = state
    ticker.tick(100)
    assert ticker.jobs == []


def test_a_process_that_left_its_scope_is_named_once(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text="idle_timeout = 0")
    ticker.fleet.escape("qwen")
    ticker.tick(20)
    pid = ticker.fleet.holders["qwen"].pid
    assert ticker.told() == [f"leak qwen: PID {pid} of qwen holds 1.0 GiB of GPU 0 outside of its scope."]


def test_a_ghost_in_the_driver_is_named_once(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text="idle_timeout = 0")
    pid = ticker.fleet.holders["qwen"].pid
    ticker.fleet.machine.gpus.change(0, ghosts={pid: GIB})
    ticker.fleet.holders["qwen"].kill()
    ticker.fleet.holders["qwen"].wait()
    ticker.tick(20)
    said = f"PID {pid} of qwen has ended, but the driver counts 1.0 GiB of GPU 0 as its memory."
    assert ticker.told() == [f"leak qwen: {said}"]


def test_a_stranger_is_nobodys_leak(ticker: Ticker) -> None:
    ticker.fleet.add("qwen", text="idle_timeout = 0")
    ticker.fleet.machine.holder("2GiB")
    ticker.tick(20)
    assert ticker.told() == []


# A process of it


def test_it_ends_at_once_when_told_to_and_rereads_when_told_to(machine: Machine, tmp_path: Path) -> None:
    script = """
import sys, time
from gpusvc.record import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar
from gpusvc.gpu.meter import Meter
from gpusvc.systemd.notify import Notifier
from gpusvc.watchdog.observer import Observer
from gpusvc.paths import Paths
from gpusvc.watchdog.daemon import Watchdog, boottime
from gpusvc.config.watched import Watched
paths = Paths(*[Path(sys.argv[1])] * 3)
watched = Watched(paths, lambda error: None)
observer = Observer(paths, watched, Meter(), now=boottime, wall=time.time)
class Loud(Notifier):
    def ready(self, sentence): print("ready", flush=True)
    def stopping(self): print("stopping", flush=True)
Watchdog(paths, watched, observer, None, Loud(), now=boottime).run()
"""
    process = machine.start(sys.executable, "-c", script, str(tmp_path))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    while "read again" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 0
    assert process.stdout.readline() == "stopping\n"
