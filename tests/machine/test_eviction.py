"""A start makes its own room: who goes, who stays, who waits, and what is left behind when nobody can go."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import GIB
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.FORKY)

# A program in the machine that uses a model over and over, as a gateway does: through the door, for a moment each time.
CLIENT = """
import sys, time
from gpusvc.state import use
from gpusvc.paths import Paths
name, until = sys.argv[1], time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    with use.enter(Paths.system(), name, timeout_seconds=None) as one:
        one.touch()
        time.sleep(0.3)
"""

QUICK = '[eviction]\nretries = 3\ninterval = "200ms"\n'


def write(machine: Host, name: str, vram: str, *, declared: bool = True, keys: str = "", arguments: str = "") -> None:
    gpu = "devices = [0]\n" + (f'vram = "{vram}"' if declared else "")
    machine.write_model(name, arguments=f"--vram {vram} {arguments}", keys=keys, gpu=gpu)


def start(machine: Host, *names: str, check: bool = True) -> int:
    units = [f"model@{name}.service" for name in names]
    return machine.run("systemctl", "start", *units, check=check, timeout=90).returncode


def up(machine: Host) -> list[str]:
    rows = json.loads(machine.run("gpusvc", "ps", "--json").stdout)
    return sorted(row["name"] for row in rows if row["state"] == "ready")


def occupy(machine: Host, name: str, seconds: float) -> None:
    """Somebody uses the model with nothing but flock(1), as the protocol allows."""
    file = f"/run/gpusvc/models/{name}/use"
    machine.run("systemd-run", "--quiet", "--collect", f"--unit=use-{name}", "flock", "-s", file, "sleep", str(seconds))
    machine.wait_until(lambda: is_used(machine, name), f"{name} is in use")


def stop_using(machine: Host, name: str) -> None:
    machine.run("systemctl", "stop", f"use-{name}.service", check=False)


def is_used(machine: Host, name: str) -> bool:
    return machine.run("flock", "-n", "-x", f"/run/gpusvc/models/{name}/use", "true", check=False).returncode != 0


def door_is_open(machine: Host, name: str) -> bool:
    return machine.run("flock", "-n", "-s", f"/run/gpusvc/models/{name}/door", "true", check=False).returncode == 0


def test_a_start_evicts_what_was_used_least_recently(machine: Host) -> None:
    for name in ("old", "new", "next"):
        write(machine, name, "10GiB")
    start(machine, "old")
    start(machine, "new")
    start(machine, "next")
    assert up(machine) == ["new", "next"]
    assert sorted(machine.gpu_holders(0).values()) == [10 * GIB] * 2
    assert "old is evicted: room for next." in machine.journal("model@old.service")


def test_a_model_in_use_is_spared_and_another_goes(machine: Host) -> None:
    for name in ("used", "idle", "next"):
        write(machine, name, "10GiB")
    start(machine, "used")
    start(machine, "idle")
    occupy(machine, "used", 60)
    start(machine, "next")
    assert up(machine) == ["next", "used"]
    stop_using(machine, "used")


def test_a_start_waits_until_a_use_ends(machine: Host) -> None:
    for name in ("used", "next"):
        write(machine, name, "20GiB")
    start(machine, "used")
    occupy(machine, "used", 1.5)
    start(machine, "next")
    assert up(machine) == ["next"]
    assert door_is_open(machine, "used")


def test_a_start_gives_up_when_the_use_does_not_end_and_leaves_the_door_open(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", QUICK)
    for name in ("used", "next"):
        write(machine, name, "20GiB")
    start(machine, "used")
    occupy(machine, "used", 60)
    assert start(machine, "next", check=False) != 0
    status = machine.properties("model@next.service", "ExecMainStatus", "StatusText", "SubState")
    assert status["ExecMainStatus"] == "75"
    assert status["SubState"] == "failed"
    assert status["StatusText"] == "There is room for next only where used is in use."
    assert up(machine) == ["used"]
    assert door_is_open(machine, "used")
    assert not machine.run("ls", "/run/gpusvc/waiting").stdout
    stop_using(machine, "used")


def test_force_evicts_what_is_in_use_and_warns(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", QUICK + "force_when_busy = true\n")
    for name in ("used", "next"):
        write(machine, name, "20GiB")
    start(machine, "used")
    occupy(machine, "used", 60)
    start(machine, "next")
    assert up(machine) == ["next"]
    assert "although it is in use" in machine.journal("model@used.service", "--priority=warning")
    stop_using(machine, "used")


def test_a_pinned_model_stays(machine: Host) -> None:
    write(machine, "dear", "20GiB", keys="pinned = true\n")
    write(machine, "next", "20GiB")
    start(machine, "dear")
    assert start(machine, "next", check=False) != 0
    assert up(machine) == ["dear"]


def test_with_a_single_active_model_the_other_goes_although_there_is_room(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "max_active = 1\n")
    for name in ("one", "other"):
        write(machine, name, "1GiB")
    start(machine, "one")
    start(machine, "other")
    assert up(machine) == ["other"]


def test_of_one_exclusive_group_only_one_runs(machine: Host) -> None:
    for name in ("one", "other"):
        write(machine, name, "1GiB", keys='exclusive = ["big"]\n')
    start(machine, "one")
    start(machine, "other")
    assert up(machine) == ["other"]


def test_ten_starts_at_once_end_with_the_three_that_fit(machine: Host) -> None:
    names = [f"many-{number}" for number in range(10)]
    for name in names:
        write(machine, name, "7GiB", arguments="--load-seconds 0.1")
    assert start(machine, *names, check=False) == 0, machine.journal(None, "-t", "gpusvc", "-o", "cat")
    running = [name for name in names if machine.is_active(f"model@{name}.service")]
    assert len(running) == 3
    assert sorted(machine.gpu_holders(0).values()) == [7 * GIB] * 3
    # Whoever was let in over somebody's promise would have run out of memory.
    assert not [name for name in names if "out of memory" in machine.journal(f"model@{name}.service")]


def test_what_a_model_took_is_what_it_needs_the_next_time(machine: Host) -> None:
    write(machine, "shy", "20GiB", declared=False)
    write(machine, "other", "10GiB")
    start(machine, "shy")
    machine.stop("shy")
    start(machine, "other")
    start(machine, "shy")  # nothing in its file says that these two do not fit together
    assert up(machine) == ["shy"]
    assert json.loads(machine.read("/var/lib/gpusvc/footprints/shy.json"))["peaks"]


def test_a_model_that_grew_needs_more_the_next_time_than_its_file_says(machine: Host) -> None:
    write(machine, "growing", "4GiB", keys='health_timeout = "400ms"\n')  # looked at every 100 ms
    write(machine, "other", "10GiB")
    start(machine, "growing")
    machine.curl(machine.url("growing", "/grow"), "--data", '{"vram": "12GiB"}')
    peaks = "/var/lib/gpusvc/footprints/growing.json"
    machine.wait_until(lambda: str(16 * GIB) in machine.read(peaks), "the larger footprint is learned")
    machine.stop("growing")
    start(machine, "other")
    start(machine, "growing")
    assert up(machine) == ["growing"]


def test_an_unknown_that_runs_out_of_memory_is_tried_once_more_with_the_idle_gone(machine: Host) -> None:
    write(machine, "idle", "10GiB")
    write(machine, "shy", "20GiB", declared=False)
    start(machine, "idle")
    start(machine, "shy")
    assert up(machine) == ["shy"]
    assert "it ran out of VRAM" in machine.journal("model@shy.service")


def test_an_unknown_that_runs_out_of_memory_twice_fails_and_says_so(machine: Host) -> None:
    write(machine, "shy", "30GiB", declared=False)
    assert start(machine, "shy", check=False) != 0
    text = machine.property("model@shy.service", "StatusText")
    assert "it ran out of VRAM, although all idle models made room for it" in text


@pytest.mark.parametrize("clients", [3])
def test_a_start_gets_in_although_clients_overlap_on_the_other_for_ever(machine: Host, clients: int) -> None:
    for name in ("wanted", "next"):
        write(machine, name, "20GiB")
    start(machine, "wanted")
    for number in range(clients):
        machine.run(
            "systemd-run", "--quiet", "--collect", f"--unit=client-{number}", "python3", "-c", CLIENT, "wanted", "60"
        )
    machine.wait_until(lambda: is_used(machine, "wanted"), "clients are at it")
    start(machine, "next")
    assert up(machine) == ["next"]
    machine.run("systemctl", "stop", *(f"client-{number}.service" for number in range(clients)))


# ---- starts for requests ----


def request_start(machine: Host, name: str) -> subprocess.Popen[str]:
    """A request that waits for a model, as the gateway asks the API for it; it ends with 0 once the model is ready."""
    socket = "/run/gpusvc/api.sock"
    url = f"http://api/gpusvc/models/{name}/start?wait=request"
    return machine.popen("curl", "--silent", "--fail-with-body", "--unix-socket", socket, "--request", "POST", url)


def says_that_it_waits(machine: Host, name: str) -> bool:
    return machine.property(f"model@{name}.service", "StatusText").startswith(f"{name} waits")


@pytest.mark.parametrize(
    ("scarce", "vram", "keys", "host"),
    [
        ("memory", "20GiB", "", ""),
        ("max-active", "2GiB", "", "max_active = 1\n"),
        ("gpu-max-active", "2GiB", "", "[gpu]\nmax_active = 1\n"),
        ("exclusive", "2GiB", 'exclusive = ["big"]\n', ""),
    ],
)
def test_requests_wait_in_line_for_longer_than_an_operator(
    machine: Host, scarce: str, vram: str, keys: str, host: str
) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", host + QUICK)
    names = [f"{one}-{scarce}" for one in ("first", "second", "third")]
    for name in names:
        write(machine, name, vram, keys=keys)
    start(machine, names[0])
    occupy(machine, names[0], 60)
    waiting = []
    for name in names[1:]:
        waiting.append(request_start(machine, name))
        machine.wait_until(partial(says_that_it_waits, machine, name), f"{name} waits")
    # An operator's start is refused after its retries; those for requests have waited for longer by then.
    write(machine, f"fourth-{scarce}", vram, keys=keys)
    assert start(machine, f"fourth-{scarce}", check=False) != 0
    assert [one.poll() for one in waiting] == [None, None]
    stop_using(machine, names[0])
    answers = [one.communicate(timeout=60)[0] for one in waiting]
    assert [one.returncode for one in waiting] == [0, 0], answers
    assert up(machine) == [names[2]]


def test_everybody_sees_who_waits_for_what_and_behind_whom(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "[gateway]\nloading_events = true\n" + QUICK)
    names = ["seen-first", "seen-second", "seen-third"]
    for name in names:
        write(machine, name, "20GiB")
    start(machine, names[0])
    occupy(machine, names[0], 60)
    clients = []
    for name in names[1:]:
        body = json.dumps({"model": name, "stream": True, "messages": [{"role": "user", "content": "Hi"}]})
        url = "http://127.0.0.1:8484/v1/chat/completions"
        to = ("--no-buffer", "--output", f"/tmp/{name}", "--max-time", "60")
        clients.append(machine.popen("curl", "--silent", *to, url, "--data", body))
        machine.wait_until(partial(says_that_it_waits, machine, name), f"{name} waits")
    second = "for seen-first (in use). It is next."
    third = "in line behind seen-second. seen-second is next."
    told = machine.run("gpusvc", "ps").stdout
    assert re.search(rf"(?m)^  seen-second has waited .* {re.escape(second)}$", told)
    assert re.search(rf"(?m)^  seen-third has waited .* {re.escape(third)}$", told)
    assert second in machine.run("gpusvc", "ps", user="nobody").stdout
    rows = {row["name"]: row["waiting"] for row in json.loads(machine.run("gpusvc", "ps", "--json").stdout)}
    assert rows["seen-first"] is None
    assert (rows["seen-second"]["position"], rows["seen-third"]["position"]) == (1, 2)
    assert rows["seen-second"]["for"] == [{"model": "seen-first", "state": "in use"}]
    assert rows["seen-third"]["behind"] == ["seen-second"]
    assert third in machine.run("gpusvc", "top", "--count", "1").stdout
    page = machine.curl("http://127.0.0.1:8484/gpusvc/page")
    assert re.search(rf'data-name="seen-third">seen-third has waited <span[^>]*>[^<]*</span> {re.escape(third)}', page)
    metrics = machine.curl("http://127.0.0.1:8484/metrics")
    assert 'gpusvc_line_position{model="seen-third"} 2.0' in metrics
    assert 'gpusvc_line_blocked{by="seen-first",model="seen-second",state="in use"} 1.0' in metrics
    # A client is told from time to time.
    machine.wait_until(lambda: third in machine.read("/tmp/seen-third"), "the client of the third is told")
    stop_using(machine, names[0])
    for client in clients:
        client.communicate(timeout=60)
    said = [machine.read(f"/tmp/{name}") for name in names[1:]]
    assert all("answered with status 200" in one for one in said), said  # the engine has no streams
    assert "Waiting for seen-third to load. seen-third has waited" in said[1]
    assert third in said[1]
    assert "Waiting for room" not in machine.run("gpusvc", "ps").stdout


def test_a_broken_model_evicts_a_healthy_one_once_for_one_request(machine: Host) -> None:
    write(machine, "good", "20GiB")
    write(machine, "bad", "20GiB", arguments="--die-after-load")
    start(machine, "good")
    asked = request_start(machine, "bad")
    assert "bad did not start" in asked.communicate(timeout=60)[0]
    start(machine, "good")
    machine.wait_for_state("model@bad.service", "failed", timeout=60)
    assert up(machine) == ["good"]
    evicted = machine.journal("model@good.service").count("good is evicted")
    assert evicted == 1


@pytest.mark.parametrize(("kind", "host", "keys"), [("a", "max_active = 1\n", ""), ("b", "", 'exclusive = ["one"]\n')])
def test_models_with_one_port_run_one_after_the_other(machine: Host, kind: str, host: str, keys: str) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", host)
    for name in (f"one-{kind}", f"other-{kind}"):
        write(machine, name, "2GiB", keys=f"port = 9001\n{keys}")
        start(machine, name)
        assert up(machine) == [name]
