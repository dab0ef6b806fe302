"""The watchdog service: idle models give their VRAM back, stuck ones are dealt with, and nobody who works is disturbed.

The clock is not set here, as a container shares it with its host: what that does to verdicts is asked in
tests/component/test_watchdog.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests import fakegpu
from tests.fakegpu import GIB, MIB, Return, Sample
from tests.machine.test_start_stop import no_message_bus
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.conftest import Layers
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM, Generation.FORKY)

WATCHDOG = "gpusvc-watchdog.service"


@pytest.fixture(autouse=True)
def is_there_before_and_after(machine: Host) -> Iterator[None]:
    machine.wait_for_state(WATCHDOG, "active")
    yield
    assert machine.is_active(WATCHDOG)


def policy(machine: Host, *lines: str) -> None:
    """The host's file, with quick ticks, and nobody idle unless it is said."""
    keys = {"idle_timeout": "0", "busy_timeout": "0", "interval": '"200ms"'}
    for line in lines:
        key, _, value = line.partition(" = ")
        keys[key] = value
    text = "".join(f"{key} = {value}\n" for key, value in keys.items())
    machine.write("/etc/gpusvc/gpusvc.toml", f"[watchdog]\n{text}")


def start(machine: Host, name: str, keys: str = "", *, gpu: int | None = 0, vram: str = "1GiB", more: str = "") -> int:
    """A model on one GPU; the PID of its engine."""
    where = "count = 0" if gpu is None else f'vram = "{vram}"\ndevices = [{gpu}]'
    arguments = more if gpu is None else f"--vram {vram} {more}"
    machine.write_model(name, arguments=arguments, keys=keys, gpu=where)
    machine.start(name)
    return pid(machine, name)


def pid(machine: Host, name: str) -> int:
    row = machine.ps(name)
    assert row is not None, f"gpusvc ps does not show {name}"
    return int(row["pid"])


def is_up(machine: Host, name: str) -> bool:
    return machine.is_active(f"model@{name}.service")


def await_end(machine: Host, name: str) -> None:
    machine.wait_for_state(f"model@{name}.service", "inactive")


def events(machine: Host, kind: str, name: str | None = None) -> list[str]:
    """The messages of these events since boot, other tests' too: a test has a name of its own where it matters."""
    matches = [f"GPUSVC_EVENT={kind}", *([f"GPUSVC_MODEL={name}"] if name else [])]
    return machine.journal(None, *matches, "-o", "cat").splitlines()


def works(machine: Host, *pids: int) -> None:
    machine.gpus.change(0, samples=[Sample(pid, 50) for pid in pids])


@contextmanager
def used(machine: Host, name: str) -> Iterator[None]:
    """As anybody does it who wants to keep a model."""
    lock = f"/run/gpusvc/models/{name}/use"
    user = machine.popen("flock", "--shared", lock, "sh", "-c", "echo in; exec cat")
    assert user.stdout is not None
    assert user.stdout.readline() == "in\n"
    try:
        yield
    finally:
        user.communicate("", timeout=10)  # at the end of its input it lets go


@contextmanager
def foreign(machine: Host, vram: str) -> Iterator[None]:
    """Another program takes VRAM of GPU 0."""
    visible = f"--setenv=CUDA_VISIBLE_DEVICES={fakegpu.uuid_of(0)}"
    engine = ("test-engine", "--port", "8098", "--vram", vram)
    before = sum(machine.gpu_holders(0).values())
    machine.run("systemd-run", "--quiet", "--collect", "--unit=game", visible, *engine)
    machine.wait_until(lambda: sum(machine.gpu_holders(0).values()) > before + GIB, "the game has its memory")
    try:
        yield
    finally:
        machine.run("systemctl", "stop", "game.service")


# Idle


def test_an_idle_model_gives_its_vram_back(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "idle")
    await_end(machine, "idle")
    assert machine.remains("idle") == []
    (told,) = events(machine, "idle", "idle")
    assert re.fullmatch(r"idle was not used for \d+s, and its processes did no work, by their use of the GPU\.", told)
    assert len(events(machine, "evict", "idle")) == 1
    assert "came back" in events(machine, "release", "idle")[-1]


def test_a_model_without_a_gpu_is_idle_by_its_cpu_time(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "small", gpu=None)
    await_end(machine, "small")
    assert "by their CPU time" in events(machine, "idle", "small")[-1]


@pytest.mark.parametrize(("gpu", "evidence"), [(0, "NVML"), (None, "CPU time")])
def test_status_says_by_what_evidence_a_model_is_judged(machine: Host, gpu: int | None, evidence: str) -> None:
    start(machine, "judged", gpu=gpu)

    def told() -> str | None:
        status = json.loads(machine.run("gpusvc", "status", "judged", "--json").stdout)
        return str(status["evidence"])

    machine.wait_until(lambda: told() == evidence, f"{evidence} is named as evidence")


def test_a_model_stays_as_long_as_somebody_uses_it(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "qwen", "idle_timeout = 0")
    with used(machine, "qwen"):
        machine.write_model("qwen", arguments="--vram 1GiB", gpu='vram = "1GiB"\ndevices = [0]')
        start(machine, "decoy")
        await_end(machine, "decoy")
        assert is_up(machine, "qwen")
    await_end(machine, "qwen")


def test_a_model_stays_as_long_as_its_gpu_works(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    engine = start(machine, "qwen", "idle_timeout = 0")
    works(machine, engine)
    machine.write_model("qwen", arguments="--vram 1GiB", gpu='vram = "1GiB"\ndevices = [0]')
    start(machine, "decoy")
    await_end(machine, "decoy")
    assert is_up(machine, "qwen")
    works(machine)
    await_end(machine, "qwen")


@pytest.mark.parametrize("when", ["2 days ago", "in 2 days"])
def test_marks_from_another_time_make_nobody_idle(machine: Host, when: str) -> None:
    """As after the clock was set."""
    policy(machine, 'idle_timeout = "1h"')
    start(machine, "qwen")
    machine.run("sh", "-c", f"touch -d '{when.removeprefix('in ')}' /run/gpusvc/models/qwen/use")
    start(machine, "decoy", 'idle_timeout = "1s"')
    await_end(machine, "decoy")
    assert is_up(machine, "qwen")


def test_a_gpu_that_cannot_be_read_proves_nobody_idle(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "qwen", "idle_timeout = 0", gpu=1)
    machine.gpus.change(1, processes_error=Return.UNKNOWN)
    machine.write_model("qwen", arguments="--vram 1GiB", gpu='vram = "1GiB"\ndevices = [1]')
    start(machine, "decoy")
    await_end(machine, "decoy")
    assert is_up(machine, "qwen")
    status = machine.run("systemctl", "show", "--value", "-p", "StatusText", WATCHDOG).stdout
    assert "There is no verdict on qwen: GPU 1 cannot be read" in status
    machine.gpus.change(1, processes_error=None)
    await_end(machine, "qwen")


def test_without_a_driver_nobody_with_a_gpu_is_idle(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "qwen", "idle_timeout = 0")
    machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
    machine.gpus.lose(0)
    machine.write_model("qwen", arguments="--vram 1GiB", gpu='vram = "1GiB"\ndevices = [0]')
    start(machine, "decoy", gpu=None)
    await_end(machine, "decoy")
    assert is_up(machine, "qwen")
    machine.gpus.configure(init_error=None)
    await_end(machine, "qwen")


# Stuck


@pytest.mark.parametrize("action", ["restart", "stop"])
def test_a_stuck_model_is_dealt_with_and_its_last_words_are_in_the_journal(machine: Host, action: str) -> None:
    name = f"stuck-{action}"
    policy(machine, f'busy_action = "{action}"')
    first = start(machine, name)
    with used(machine, name):
        policy(machine, f'busy_action = "{action}"', 'busy_timeout = "1s"')
        machine.wait_until(lambda: events(machine, "stuck", name), "it is stuck", unit=WATCHDOG)
        policy(machine)
        if action == "stop":
            await_end(machine, name)
            assert machine.remains(name) == []
    if action == "restart":
        machine.wait_until(lambda: is_up(machine, name) and pid(machine, name) != first, "it is up again")
    said = events(machine, "stuck", name)
    assert said[0].startswith(f"{name} is in use, and for 1s made no progress")
    assert said[1] == "Its last words:"
    assert "test-engine: loaded" in said


def test_a_failing_model_is_restarted_with_an_event_and_a_metric(machine: Host) -> None:
    policy(machine, 'failing_time = "1s"')
    probe = 'probe = {path = "/v1/chat/completions", body = {model = "sick", messages = [{content = "Hi"}]}}'
    first = start(machine, "sick", probe)
    machine.run("kill", "-USR2", str(first))
    question = '{"model": "sick", "messages": [{"role": "user", "content": "Well?"}]}'
    asking = ("curl", "-s", "-o", "/dev/null", "--data", question, "http://127.0.0.1:8484/v1/chat/completions")

    def is_said() -> list[str]:
        machine.run(*asking, check=False)
        return events(machine, "failing", "sick")

    said = machine.wait_until(is_said, "it is failing", unit=WATCHDOG)
    machine.wait_until(lambda: is_up(machine, "sick") and pid(machine, "sick") != first, "it is up again")
    assert "The watchdog's own request" in said[0]
    assert said[0].endswith("It is restarted.")
    metrics = ("curl", "-s", "--unix-socket", "/run/gpusvc/api.sock", "http://api/metrics")
    counted = 'gpusvc_model_events_total{event="failing",model="sick"} 1.0'
    machine.wait_until(lambda: counted in machine.run(*metrics).stdout, "it is counted")


def test_a_model_whose_gpu_works_is_not_stuck(machine: Host) -> None:
    policy(machine, 'busy_timeout = "1s"')
    works(machine, start(machine, "qwen"))
    start(machine, "decoy", 'busy_action = "stop"')
    with used(machine, "qwen"), used(machine, "decoy"):
        await_end(machine, "decoy")
        assert is_up(machine, "qwen")


# Pressure


def test_under_pressure_idle_models_leave_their_gpu_and_no_other(machine: Host) -> None:
    policy(machine, 'pressure_time = "1s"')
    for name in ("first", "second"):  # used longest ago: the first
        start(machine, name, vram="2GiB")
    start(machine, "elsewhere", gpu=1)
    with foreign(machine, "19.5GiB"):
        await_end(machine, "first")
        machine.wait_until(lambda: sum(machine.gpu_holders(0).values()) < 22 * GIB, "its memory is back")
        start(machine, "decoy", 'idle_timeout = "1s"', gpu=None)
        await_end(machine, "decoy")
        assert is_up(machine, "second")  # the one was enough
        assert is_up(machine, "elsewhere")
    assert "of its idle models first was used least recently" in events(machine, "pressure", "first")[-1]


def test_under_pressure_the_busy_and_the_pinned_stay(machine: Host) -> None:
    policy(machine, 'pressure_time = "1s"')
    start(machine, "pinned", "pinned = true", vram="2GiB")
    start(machine, "busy", vram="2GiB")
    with used(machine, "busy"), foreign(machine, "19.5GiB"):
        felt = "there is no idle model on it that can be evicted"
        machine.wait_until(lambda: felt in "".join(events(machine, "pressure")), "pressure is felt", unit=WATCHDOG)
        start(machine, "decoy", 'idle_timeout = "1s"', gpu=None)
        await_end(machine, "decoy")
        assert is_up(machine, "pinned")
        assert is_up(machine, "busy")


# Left behind


def test_a_lease_that_was_left_is_cleared_away(machine: Host) -> None:
    policy(machine)
    start(machine, "left")
    machine.run("cp", "-a", "/run/gpusvc/models/left/lease.json", "/run/lease")
    machine.stop("left")
    machine.run("mv", "/run/lease", "/run/gpusvc/models/left/lease.json")
    machine.wait_until(lambda: not machine.remains("left"), "its lease is gone", unit=WATCHDOG)
    assert events(machine, "leak", "left") == ["left does not run, and its lease is left: its release is proven now."]


def test_a_process_that_left_its_scope_is_named(machine: Host) -> None:
    policy(machine)
    engine = start(machine, "fugitive")
    machine.run("sh", "-c", f"mkdir -p /sys/fs/cgroup/away && echo {engine} > /sys/fs/cgroup/away/cgroup.procs")
    try:
        named = machine.wait_until(lambda: events(machine, "leak", "fugitive"), "it is named", unit=WATCHDOG)
    finally:
        machine.run("kill", "-KILL", str(engine))
    assert named == [f"PID {engine} of fugitive holds 1.0 GiB of GPU 0 outside of its scope."]
    machine.wait_for_state("model@fugitive.service", "inactive", "failed", "activating")
    machine.wait_until(lambda: machine.run("rmdir", "/sys/fs/cgroup/away", check=False).returncode == 0, "it is gone")


# Itself


def test_killed_in_the_middle_of_an_eviction_it_loses_nothing(machine: Host) -> None:
    policy(machine, 'idle_timeout = "1s"')
    start(machine, "slow", 'stop_timeout = "20s"', more="--stop-seconds 2")
    machine.wait_for_state("model@slow.service", "deactivating")
    closed = ("flock", "--nonblock", "--shared", "/run/gpusvc/models/slow/door", "true")
    assert machine.run(*closed, check=False).returncode == 1
    machine.run("systemctl", "kill", "--signal=KILL", WATCHDOG)
    await_end(machine, "slow")
    assert machine.remains("slow") == []
    assert "came back" in events(machine, "release", "slow")[-1]
    machine.wait_for_state(WATCHDOG, "active")
    assert machine.run(*closed).returncode == 0
    start(machine, "slow", 'idle_timeout = "1s"')
    await_end(machine, "slow")  # the next one goes on


def test_a_reload_reads_the_files_again_and_restarts_nothing(machine: Host) -> None:
    policy(machine)
    engine = start(machine, "reread")
    before = machine.property(WATCHDOG, "MainPID")
    machine.write("/etc/gpusvc/models/reread.toml", "nonsense")
    complaint = "/etc/gpusvc/models/reread.toml"
    machine.wait_until(lambda: complaint in machine.journal(WATCHDOG), "it complains")
    machine.run("systemctl", "reload", WATCHDOG)
    machine.wait_until(lambda: machine.journal(WATCHDOG).count(complaint) == 2, "it complains again")
    assert (machine.property(WATCHDOG, "MainPID"), pid(machine, "reread")) == (before, engine)


def test_a_changed_file_holds_within_a_tick(machine: Host) -> None:
    policy(machine)
    start(machine, "qwen")
    start(machine, "decoy", 'idle_timeout = "1s"')
    await_end(machine, "decoy")
    assert is_up(machine, "qwen")
    policy(machine, 'idle_timeout = "1s"')
    await_end(machine, "qwen")


def test_a_message_bus_that_comes_back_is_used_again(machine: Host) -> None:
    policy(machine, 'idle_timeout = "2s"')
    start(machine, "qwen")
    with no_message_bus(machine):
        machine.wait_until(lambda: "D-Bus" in machine.journal(WATCHDOG), "it is missed", unit=WATCHDOG)
        assert machine.gpu_holders(0)
    await_end(machine, "qwen")


def test_it_is_small_and_says_what_it_thinks(machine: Host) -> None:
    policy(machine)
    start(machine, "qwen")
    verdicts = "/run/gpusvc/watchdog/verdicts.json"
    machine.wait_until(lambda: '"source": "NVML"' in machine.read(verdicts), "a verdict is there", unit=WATCHDOG)
    assert json.loads(machine.read(verdicts))["models"] == {"qwen": {"kind": "none", "source": "NVML"}}
    assert "Watching 1 model. qwen was not used for" in machine.property(WATCHDOG, "StatusText")
    process = machine.property(WATCHDOG, "MainPID")
    (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", machine.read(f"/proc/{process}/status"))
    assert int(resident) * 1024 < 40 * MIB


def test_it_is_well_contained(machine: Host) -> None:
    said = machine.run("systemd-analyze", "security", "--no-pager", WATCHDOG).stdout
    (exposure,) = re.findall(r"exposure level for gpusvc-watchdog.service: ([\d.]+)", said)
    assert float(exposure) <= 2.0


# What its user may do


def ask_manager(machine: Host, *call: str) -> str:
    """A call of systemd's as the watchdog's user; what it answers."""
    systemd = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    done = machine.run("busctl", "call", *systemd, *call, check=False, user="gpusvc-watchdog")
    return done.stdout + done.stderr


def test_its_user_may_stop_and_restart_models_and_have_them_proven(machine: Host) -> None:
    policy(machine)
    start(machine, "qwen", gpu=None)
    for verb in ("RestartUnit", "StopUnit"):
        assert "/job/" in ask_manager(machine, verb, "ss", "model@qwen.service", "replace")
    assert "/job/" in ask_manager(machine, "RestartUnit", "ss", "gpusvc-release@nobody.service", "replace")


@pytest.mark.parametrize(
    "call",
    [
        ("StopUnit", "ss", "dbus.service", "replace"),
        ("StopUnit", "ss", "gpusvc-models.slice", "replace"),
        ("StopUnit", "ss", "gpusvc-release@qwen.service", "replace"),
        ("RestartUnit", "ss", "gpusvc-watchdog.service", "replace"),
        ("StartUnit", "ss", "model@qwen.service", "replace"),
        ("KillUnit", "ssi", "model@qwen.service", "main", "9"),
        ("SetUnitProperties", "sba(sv)", "model@qwen.service", "true", "1", "CPUWeight", "t", "1"),
        ("StartTransientUnit", "ssa(sv)a(sa(sv))", "evil.service", "fail", "0", "0"),
        ("StartTransientUnit", "ssa(sv)a(sa(sv))", "model@evil.service", "fail", "0", "0"),
        ("Reload", ""),
    ],
    ids=lambda call: f"{call[0]}-{call[2]}" if len(call) > 2 else call[0],
)
def test_its_user_may_do_nothing_else(machine: Host, call: tuple[str, ...]) -> None:
    policy(machine)
    start(machine, "qwen", gpu=None)
    said = ask_manager(machine, *call)
    assert re.search(r"Access denied|authentication required", said), said


def test_engines_have_no_way_to_the_locks_of_models(machine: Host) -> None:
    policy(machine)
    start(machine, "qwen", gpu=None)
    locked = machine.run("flock", "-s", "/run/gpusvc/models/qwen/use", "true", check=False, user="gpusvc")
    assert locked.returncode != 0
    assert "Permission denied" in locked.stderr
    machine.run("flock", "-s", "/run/gpusvc/models/qwen/use", "true", user="gpusvc-watchdog")


# Its package


def upgrade(machine: Host, layers: Layers) -> None:
    machine.write("/root/gpusvc.deb", layers.package().read_bytes())
    machine.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--install", "/root/gpusvc.deb", timeout=120)


def test_the_package_enables_and_starts_it_and_an_upgrade_restarts_it_alone(
    fresh_machine: Host, layers: Layers
) -> None:
    machine = fresh_machine
    assert machine.run("systemctl", "is-enabled", WATCHDOG).stdout.strip() == "enabled"
    engine = start(machine, "qwen")
    watchdog = machine.property(WATCHDOG, "MainPID")
    upgrade(machine, layers)
    machine.wait_for_state(WATCHDOG, "active")
    assert machine.property(WATCHDOG, "MainPID") != watchdog
    assert pid(machine, "qwen") == engine
    assert machine.run("id", "-gn", "gpusvc").stdout.strip() == "gpusvc-engine"
    assert machine.run("stat", "-c", "%U:%G", "/var/lib/gpusvc/home").stdout.strip() == "gpusvc:gpusvc-engine"
    machine.run("systemctl", "restart", "model@qwen.service")
    assert is_up(machine, "qwen")


def test_one_that_was_disabled_stays_so_over_an_upgrade(fresh_machine: Host, layers: Layers) -> None:
    machine = fresh_machine
    machine.run("systemctl", "disable", "--now", WATCHDOG)
    upgrade(machine, layers)
    assert not machine.is_active(WATCHDOG)
    assert machine.run("systemctl", "is-enabled", WATCHDOG, check=False).stdout.strip() == "disabled"
