"""What an operator does about policy by hand: evict, pin, use, and see what is in effect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import GIB
from tests.machine.tree import Generation

if TYPE_CHECKING:
    import subprocess

    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM)


def start(machine: Host, name: str, vram: str = "8GiB", gpu: int = 0, *, keys: str = "", arguments: str = "") -> None:
    write(machine, name, vram, gpu, keys=keys, arguments=arguments)
    machine.start(name)


def write(machine: Host, name: str, vram: str = "8GiB", gpu: int = 0, *, keys: str = "", arguments: str = "") -> None:
    """A model that says what it takes, and takes what it says."""
    machine.write_model(
        name, arguments=f"--vram {vram} {arguments}", keys=keys, gpu=f'vram = "{vram}"\ndevices = [{gpu}]'
    )


@contextmanager
def in_use(machine: Host, name: str) -> Iterator[subprocess.Popen[str]]:
    """A command that uses a model until its input ends."""
    process = machine.popen("gpusvc", "use", name, "--", "cat")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("begun\n")
    process.stdin.flush()
    assert process.stdout.readline() == "begun\n", process.communicate()
    yield process
    process.communicate()


def evict(machine: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    return machine.run("gpusvc", "evict", *arguments, check=False, timeout=60)


def is_up(machine: Host, name: str) -> bool:
    return machine.is_active(f"model@{name}.service")


# ---- evict ----


def test_an_evicted_model_is_gone_and_its_vram_is_back(machine: Host) -> None:
    start(machine, "gone")
    done = evict(machine, "gone")
    assert (done.returncode, done.stdout) == (0, "gone is evicted: 8.0 GiB of GPU 0 came back.\n")
    assert machine.remains("gone") == []
    assert evict(machine, "gone").stdout == "gone is not running.\n"


def test_a_model_in_use_is_refused_when_the_wait_is_over_and_its_door_is_open_again(machine: Host) -> None:
    start(machine, "busy")
    with in_use(machine, "busy"):
        done = evict(machine, "busy", "--wait", "300ms")
        assert (done.returncode, done.stdout) == (1, "")
        assert "gpusvc: busy is in use." in done.stderr
        assert machine.run("gpusvc", "use", "busy", "--", "echo", "in").stdout == "in\n"
    assert is_up(machine, "busy")


def test_the_host_says_how_long_an_eviction_waits(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", '[eviction]\nretries = 2\ninterval = "50ms"\n')
    start(machine, "hosted")
    with in_use(machine, "hosted"):
        assert "hosted is in use." in evict(machine, "hosted").stderr


def test_an_eviction_waits_for_who_is_inside_and_newcomers_wait_for_the_eviction(machine: Host) -> None:
    start(machine, "swapped")
    with in_use(machine, "swapped") as user:
        evictor = machine.popen("gpusvc", "evict", "swapped", "--wait", "1min")
        assert evictor.stderr is not None
        assert evictor.stderr.readline() == "swapped: It is in use; nobody new comes in.\n"
        newcomer = machine.popen("gpusvc", "use", "swapped", "--", "sh", "-c", "curl -s $GPUSVC_URL/health")
        assert newcomer.stderr is not None
        assert newcomer.stderr.readline().startswith("swapped: Waiting until its eviction is over")
        assert evictor.poll() is None
        user.communicate()
    assert evictor.communicate(timeout=30)[0] == "swapped is evicted: 8.0 GiB of GPU 0 came back.\n"
    # It was started again, for whom its eviction kept waiting.
    assert '"ok"' in newcomer.communicate(timeout=30)[0]
    assert is_up(machine, "swapped")


def test_force_evicts_what_is_in_use_with_a_warning(machine: Host) -> None:
    start(machine, "forced")
    with in_use(machine, "forced"):
        done = evict(machine, "forced", "--force", "--wait", "0")
        assert done.returncode == 0
        assert done.stderr.startswith("Warning: forced is in use, and evicted all the same.\n")
    assert machine.remains("forced") == []
    assert "forced is evicted although it is in use" in machine.journal(None, "--priority=warning")


def test_a_pinned_model_is_not_evicted_by_name_either(machine: Host) -> None:
    start(machine, "dear")
    machine.run("gpusvc", "pin", "dear")
    done = evict(machine, "dear", "--force")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpusvc: dear is pinned")
    machine.run("gpusvc", "unpin", "dear")
    assert evict(machine, "dear").returncode == 0


def test_of_several_models_those_that_are_idle_go(machine: Host) -> None:
    start(machine, "idle")
    start(machine, "used")
    with in_use(machine, "used"):
        done = evict(machine, "used", "idle", "--wait", "100ms")
    assert (done.returncode, done.stdout) == (1, "idle is evicted: 8.0 GiB of GPU 0 came back.\n")
    assert "used is in use." in done.stderr


def test_what_is_idle_on_a_gpu_is_evicted_and_the_rest_is_named(machine: Host) -> None:
    for name in ("calm", "used", "kept"):
        start(machine, name, "4GiB", keys="pinned = true" if name == "kept" else "")
    start(machine, "elsewhere", gpu=1)
    with in_use(machine, "used"):
        done = evict(machine, "--gpu", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "calm is evicted: 4.0 GiB of GPU 0 came back.",
        "kept stays: it is pinned.",
        "used stays: it is in use.",
    ]
    assert sorted(machine.gpu_holders(0).values()) == [4 * GIB] * 2
    assert is_up(machine, "elsewhere")


def test_for_vram_the_least_recently_used_goes_and_no_more_than_needed(machine: Host) -> None:
    for name in ("older", "newer"):
        start(machine, name)
    machine.run("gpusvc", "use", "older", "--", "true")
    done = evict(machine, "--vram", "12GiB", "--gpu", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "newer is evicted: 8.0 GiB of GPU 0 came back.",
        "GPU 0 (NVIDIA GeForce RTX 4090 (simulated)) has 15.8 GiB free, with the host's reserve of 512.0 MiB.",
    ]
    assert is_up(machine, "older")
    assert list(machine.run("ls", "/run/gpusvc/waiting").stdout) == []


def test_for_vram_priority_counts_before_last_use(machine: Host) -> None:
    start(machine, "precious", keys="priority = 5")
    start(machine, "cheap")
    assert evict(machine, "--vram", "12GiB", "--gpu", "0").stdout.startswith("cheap is evicted")


def test_for_vram_that_is_free_already_nobody_goes(machine: Host) -> None:
    start(machine, "undisturbed")
    done = evict(machine, "--vram", "20GiB")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("GPU 1 ")
    assert is_up(machine, "undisturbed")


def test_vram_that_only_a_model_in_use_could_give_is_refused(machine: Host) -> None:
    start(machine, "occupied")
    with in_use(machine, "occupied"):
        done = evict(machine, "--vram", "20GiB", "--gpu", "0", "--wait", "300ms")
        assert (done.returncode, done.stdout) == (1, "")
        assert "There is room for 20.0 GiB only where occupied is in use." in done.stderr
        assert machine.run("gpusvc", "use", "occupied", "--", "echo", "in").stdout == "in\n"


def test_vram_that_nobody_could_give_is_refused_with_who_holds_it(machine: Host) -> None:
    start(machine, "rock", keys="pinned = true")
    done = evict(machine, "--vram", "20GiB", "--gpu", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "held by rock 8.0 GiB" in done.stderr
    assert "GPU 1" not in done.stderr


# ---- pin ----


def test_a_pin_spares_a_model_and_is_shown_until_the_next_boot(fresh_machine: Host) -> None:
    machine = fresh_machine
    start(machine, "pinned", "16GiB")
    machine.run("gpusvc", "pin", "pinned")
    write(machine, "larger", "20GiB")
    assert "larger needs 20.0 GiB" in machine.fail_to_start("larger")
    row = machine.ps("pinned")
    assert row is not None
    assert (row["state"], row["pinned"]) == ("ready", True)
    lines = machine.run("gpusvc", "ps", "--wide").stdout.splitlines()
    assert [line.split()[0] for line in lines if "pinned" in line.split()[1:]] == ["pinned"]
    assert "Pinned   until the next boot" in machine.run("gpusvc", "status", "pinned").stdout
    machine.reboot()
    assert not json.loads(machine.run("gpusvc", "status", "pinned", "--json").stdout)["pinned"]


def test_only_root_pins(machine: Host) -> None:
    write(machine, "public")
    done = machine.run("gpusvc", "pin", "public", user="nobody", check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert "You may not change /run/gpusvc/pins/public" in done.stderr


# ---- use ----


def test_use_starts_the_model_and_keeps_it_while_the_command_runs(machine: Host) -> None:
    write(machine, "fetched", "16GiB")
    with in_use(machine, "fetched"):
        assert is_up(machine, "fetched")
        row = machine.ps("fetched")
        assert row is not None
        assert row["in_use"] is True
        machine.write("/etc/gpusvc/gpusvc.toml", '[eviction]\nretries = 2\ninterval = "50ms"\n')
        write(machine, "rival", "20GiB")
        assert "fetched is in use" in machine.fail_to_start("rival")
        assert is_up(machine, "fetched")
    machine.start("rival")
    assert not is_up(machine, "fetched")


def test_use_says_where_the_model_answers_and_ends_as_its_command_does(machine: Host) -> None:
    write(machine, "asked")
    script = "curl --silent --fail $GPUSVC_URL/health && exit 7"
    done = machine.run("gpusvc", "use", "asked", "--", "sh", "-c", script, check=False)
    assert (done.returncode, json.loads(done.stdout)) == (7, {"status": "ok"})


def test_a_start_that_fails_for_a_use_says_why_and_runs_nothing(machine: Host) -> None:
    write(machine, "huge", "100GiB")
    done = machine.run("gpusvc", "use", "huge", "--", "echo", "never", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "huge needs 100.0 GiB on a GPU" in done.stderr


def test_members_of_the_group_use_what_is_ready_and_are_told_if_it_is_not(machine: Host) -> None:
    def use_as(*options: str) -> subprocess.CompletedProcess[str]:
        command = ("gpusvc", "use", "shared", "--", "true")
        return machine.run("runuser", "-u", "nobody", *options, "--", *command, check=False)

    start(machine, "shared")
    assert use_as().returncode == 4
    assert use_as("-G", "gpusvc").returncode == 0
    machine.stop("shared")
    done = use_as("-G", "gpusvc")
    assert done.returncode == 4
    assert done.stderr.startswith("gpusvc: shared is not ready, and you may not start it.\n")


# ---- what is shown ----


def test_ps_shows_what_models_take_their_use_and_their_priority(machine: Host) -> None:
    start(machine, "watched", keys="priority = 3")
    machine.stop("watched")
    machine.start("watched")
    row = machine.ps("watched")
    assert row is not None
    shown = {key: row[key] for key in ("declared_bytes", "learned_bytes", "in_use", "pinned", "priority")}
    assert shown == {
        "declared_bytes": 8 * GIB,
        "learned_bytes": 8 * GIB,
        "in_use": False,
        "pinned": False,
        "priority": 3,
    }
    assert row["last_use"] >= row["since"][:10]
    head, line = machine.run("gpusvc", "ps", "--wide").stdout.splitlines()
    assert head.split()[3:8] == ["DECLARED", "LEARNED", "USED", "USE", "PRIORITY"]
    assert line.split()[3:10] == ["8.0", "GiB", "8.0", "GiB", "8.0", "GiB", "idle"]


def test_config_follows_the_files(machine: Host) -> None:
    write(machine, "tuned")

    def idle_timeout() -> tuple[str, str]:
        rows = json.loads(machine.run("gpusvc", "config", "tuned", "--json").stdout)
        return next((row["value"], row["source"]) for row in rows if row["key"] == "idle_timeout")

    assert idle_timeout() == ('"15min"', "default")
    machine.write("/etc/gpusvc/gpusvc.toml", '[watchdog]\nidle_timeout = "20min"\n')
    assert idle_timeout() == ('"20min"', "/etc/gpusvc/gpusvc.toml")
    write(machine, "tuned", keys='idle_timeout = "1h"')
    assert idle_timeout() == ('"1h"', "/etc/gpusvc/models/tuned.toml")


def test_an_eviction_is_an_event(machine: Host) -> None:
    start(machine, "noted")
    evict(machine, "noted")
    machine.run("journalctl", "--sync")
    events = json.loads(machine.run("gpusvc", "events", "noted", "--json").stdout)
    kinds = [event["event"] for event in events]
    assert kinds[kinds.index("start") :] == ["start", "ready", "evict", "release"]
