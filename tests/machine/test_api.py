"""The management API on a machine: the real service on its socket, with systemd, the journal and simulated GPUs."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakegpu import GIB
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.conftest import Layers
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM, Generation.FORKY)

SERVICE = "gpusvc-api.service"
SOCKET = "/run/gpusvc/api.sock"
QWEN = "model@qwen.service"


def ask(machine: Host, method: str, path: str, *options: str, user: str | None = None) -> tuple[int, Any]:
    """Status and JSON of what it answers."""
    done = machine.run(
        "curl", "--silent", "--show-error", "--unix-socket", SOCKET, "--request", method,
        "--write-out", "\n%{http_code}", *options, f"http://localhost{path}", user=user, timeout=60,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body) if body.strip().startswith(("{", "[")) else body


def post(machine: Host, path: str, *options: str) -> tuple[int, Any]:
    return ask(machine, "POST", path, *options)


def write(machine: Host, name: str = "qwen", *, arguments: str = "--vram 4GiB", keys: str = "", gpu: int = 0) -> None:
    machine.write_model(name, arguments=arguments, keys=keys, gpu=f'vram = "4GiB"\ndevices = [{gpu}]')


def words(machine: Host, path: str, *options: str) -> Iterator[str]:
    """The lines of a stream, as they come."""
    stream = machine.popen("curl", "--silent", "--no-buffer", "--unix-socket", SOCKET, *options, f"http://api{path}")
    assert stream.stdout is not None
    try:
        yield from stream.stdout
    finally:
        os.killpg(stream.pid, signal.SIGKILL)  # nsenter has a child
        stream.communicate()


@contextmanager
def in_use(machine: Host, name: str) -> Iterator[None]:
    user = machine.popen("flock", "--shared", f"/run/gpusvc/models/{name}/use", "sh", "-c", "echo in; read end")
    assert user.stdout is not None
    assert user.stdout.readline() == "in\n"
    try:
        yield
    finally:
        user.communicate()


# Starts and ends


def test_a_model_is_started_shown_and_stopped(machine: Host) -> None:
    write(machine)
    status, ready = post(machine, "/gpusvc/models/qwen/start")
    assert (status, ready["state"]) == (200, "ready")
    assert '"ok"' in machine.curl(f"http://{ready['address']}:{ready['port']}/health")
    (row,) = ask(machine, "GET", "/gpusvc/models")[1]
    assert row == json.loads(machine.run("gpusvc", "ps", "--json").stdout)[0]
    assert (row["vram_bytes"], row["in_use"]) == (4 * GIB, False)
    assert ask(machine, "GET", "/gpusvc/gpus")[1][0]["holders"][0]["model"] == "qwen"
    shown = ask(machine, "GET", "/gpusvc/models/qwen")[1]
    assert any("test-engine" in process["command"] for process in shown["processes"])
    assert shown["log"]
    assert post(machine, "/gpusvc/models/qwen/stop") == (200, {"name": "qwen", "state": "stopped", "was_running": True})
    assert machine.remains("qwen") == []


def test_members_of_the_group_may_and_others_may_not(machine: Host) -> None:
    write(machine)
    assert ask(machine, "GET", "/gpusvc/models", user="gpusvc-gateway")[0] == 200
    for user in ("gpusvc", "nobody"):
        refused = machine.run("curl", "--silent", "--unix-socket", SOCKET, "http://api/", user=user, check=False)
        assert refused.returncode == 7, refused


def test_a_failure_tells_the_reason_and_the_engines_last_lines(machine: Host) -> None:
    write(machine, arguments="--vram 4GiB --oom")
    status, value = post(machine, "/gpusvc/models/qwen/start?wait=request")
    assert status == 503
    assert value["error"]["message"].startswith("qwen did not start.")
    assert any("out of memory" in line for line in value["error"]["log"]), value


def test_after_a_failure_requests_wait_for_the_end_of_the_cooldown_and_people_do_not(machine: Host) -> None:
    machine.write_model("qwen", 'command = ["/bin/false"]')
    machine.override("qwen", "Restart=no")
    assert post(machine, "/gpusvc/models/qwen/start?wait=request")[0] == 503
    status, value = post(machine, "/gpusvc/models/qwen/start?wait=request")
    assert (status, value["error"]["code"]) == (503, "cooldown")
    assert post(machine, "/gpusvc/models/qwen/start")[1]["error"]["code"] == "start"
    write(machine)
    assert post(machine, "/gpusvc/models/qwen/start?wait=request")[0] == 200


def test_a_start_that_nobody_waits_for_any_more_is_stopped(machine: Host) -> None:
    write(machine, arguments="--vram 4GiB --load-seconds 300")
    gone = machine.run(
        "curl", "--silent", "--max-time", "1", "--unix-socket", SOCKET, "-XPOST",
        "http://api/gpusvc/models/qwen/start?wait=request", check=False,
    )  # fmt: skip
    assert gone.returncode == 28
    assert machine.property(QWEN, "ActiveState") == "activating"
    machine.wait_for_state(QWEN, "inactive", "failed", timeout=30)
    assert machine.remains("qwen") == []
    assert "no client has waited for it for" in machine.journal(SERVICE)


def test_a_start_by_a_person_goes_on_without_him(machine: Host) -> None:
    write(machine, arguments="--vram 4GiB --load-seconds 2")
    assert post(machine, "/gpusvc/models/qwen/start?wait=no")[1] == {"name": "qwen", "state": "starting"}
    machine.wait_for_state(QWEN, "active")


def test_a_start_during_a_stop_waits_for_its_end(machine: Host) -> None:
    write(machine, arguments="--vram 4GiB --children ignore-term", keys='stop_timeout = "1s"')
    machine.start("qwen")
    machine.run("systemctl", "stop", "--no-block", QWEN)
    assert machine.property(QWEN, "ActiveState") == "deactivating"
    assert post(machine, "/gpusvc/models/qwen/start?wait=request")[1]["state"] == "ready"
    assert "came back" in machine.messages("qwen")


def test_a_model_may_be_swapped_more_often_than_systemd_would_have_a_service_restarted(machine: Host) -> None:
    machine.write_model("qwen")
    machine.run("systemctl", "enable", QWEN)  # so that systemd never forgets how often it was started
    for _ in range(8):
        assert post(machine, "/gpusvc/models/qwen/start?wait=request")[0] == 200
        assert post(machine, "/gpusvc/models/qwen/stop")[0] == 200


def test_a_restart_is_a_new_engine(machine: Host) -> None:
    write(machine)
    machine.start("qwen")
    before = machine.engine_pids()
    assert post(machine, "/gpusvc/models/qwen/restart")[1]["state"] == "ready"
    assert not set(before) & set(machine.engine_pids())


def test_an_eviction_spares_who_is_in_use_and_names_the_user(machine: Host) -> None:
    write(machine)
    machine.start("qwen")
    with in_use(machine, "qwen"):
        status, value = post(machine, "/gpusvc/models/qwen/evict?wait=100ms")
        assert (status, value["error"]["code"]) == (409, "in_use")
        assert re.search(r"in use by flock --shared .* \(PID \d+\)", value["error"]["message"]), value
    assert post(machine, "/gpusvc/models/qwen/evict")[0] == 200
    assert machine.remains("qwen") == []
    assert "qwen is evicted: an operator wants it." in machine.run("gpusvc", "events").stdout


def test_a_pin_is_one_that_everybody_sees(machine: Host) -> None:
    write(machine)
    machine.start("qwen")
    assert post(machine, "/gpusvc/models/qwen/pin")[0] == 200
    assert machine.run("gpusvc", "evict", "qwen", check=False).stderr.startswith("gpusvc: qwen is pinned")
    machine.run("gpusvc", "unpin", "qwen")
    machine.run("gpusvc", "pin", "qwen")
    assert post(machine, "/gpusvc/models/qwen/unpin")[0] == 200
    assert post(machine, "/gpusvc/models/qwen/evict")[0] == 200


def test_the_routes_of_others_work(machine: Host) -> None:
    write(machine)
    machine.start("qwen")
    assert ask(machine, "GET", "/running")[1]["running"][0]["model"] == "qwen"
    assert post(machine, "/backend/shutdown", "--data", '{"model": "qwen"}') == (200, {})
    machine.start("qwen")
    assert ask(machine, "GET", "/unload")[0] == 405
    assert machine.is_active(QWEN)
    assert post(machine, "/unload") == (200, "OK")
    assert not machine.is_active(QWEN)


# What happened


def test_events_and_logs_come_as_they_happen(machine: Host) -> None:
    write(machine)
    post(machine, "/gpusvc/models/qwen/start?wait=no")
    seen = []
    for line in words(machine, "/gpusvc/events?lines=100"):
        seen.append(line.strip())
        if line == "event: ready\n":
            break
    assert "event: start" in seen
    machine.stop("qwen")
    for line in words(machine, "/gpusvc/models/qwen/log?lines=3"):
        if line.startswith("data:"):
            break
    rows = ask(machine, "GET", "/gpusvc/events?follow=0&lines=2")[1]
    assert rows == json.loads(machine.run("gpusvc", "events", "--json", "-n", "2").stdout)
    assert rows[-1]["event"] == "release"
    log = ask(machine, "GET", "/gpusvc/models/qwen/log?follow=0&lines=500")[1]
    assert any(row["from"] == "systemd" for row in log)


def test_a_follower_hears_of_what_happens_after_it_came(machine: Host) -> None:
    """On every generation: a sandbox can keep journalctl --follow from ever waking up."""
    write(machine)
    events = words(machine, "/gpusvc/events?lines=0")
    log = words(machine, "/gpusvc/models/qwen/log?lines=0")
    assert next(events).startswith(":")
    assert next(log).startswith(":")
    machine.start("qwen")
    assert any(line == "event: ready\n" for line in events)
    assert any("qwen" in line for line in log if line.startswith("data:"))


def test_metrics_count_what_happened(machine: Host) -> None:
    write(machine)
    ask(machine, "GET", "/gpusvc/models")  # it runs
    post(machine, "/gpusvc/models/qwen/start")

    def counted() -> bool:
        return 'model="qwen"' in str(ask(machine, "GET", "/metrics")[1])

    machine.wait_until(counted, "the model is in the metrics", unit=SERVICE)


def test_who_asked_is_in_the_journal(machine: Host) -> None:
    write(machine)
    ask(machine, "POST", "/gpusvc/models/qwen/pin", "--header", "X-Gpusvc-Key: alice", user="gpusvc-gateway")
    ask(machine, "POST", "/gpusvc/models/qwen/unpin", "--header", "X-Gpusvc-Key: mallory")
    said = machine.journal(SERVICE)
    assert "pin qwen: asked for by key 'alice'." in said
    assert "unpin qwen: asked for by user root." in said


# The service


def test_it_is_well_contained(machine: Host) -> None:
    for unit in (SERVICE, "gpusvc-preload.service"):
        said = machine.run("systemd-analyze", "security", "--no-pager", unit).stdout
        (exposure,) = re.findall(rf"exposure level for {unit}: ([\d.]+)", said)
        assert float(exposure) <= 2.0, said


def test_a_restart_of_it_interrupts_no_start_and_nobody_is_turned_away(machine: Host) -> None:
    write(machine, arguments="--vram 4GiB --load-seconds 1")
    post(machine, "/gpusvc/models/qwen/start?wait=no")
    machine.run("systemctl", "restart", SERVICE)
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    assert post(machine, "/gpusvc/models/qwen/start?wait=request")[1]["state"] == "ready"


def test_a_message_bus_that_comes_back_is_used_again(machine: Host) -> None:
    write(machine)
    assert ask(machine, "GET", "/gpusvc/models")[0] == 200
    machine.run("systemctl", "restart", "dbus.service")
    machine.wait_until(lambda: post(machine, "/gpusvc/models/qwen/start")[0] == 200, "it starts", unit=SERVICE)


def test_it_is_small(machine: Host) -> None:
    write(machine)
    for path in ("/gpusvc/models", "/gpusvc/gpus", "/metrics", "/"):
        assert ask(machine, "GET", path)[0] == 200
    process = machine.property(SERVICE, "MainPID")
    (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", machine.read(f"/proc/{process}/status"))
    assert int(resident) < 80 * 1024
    assert "uvloop" not in machine.read(f"/proc/{process}/maps")


def test_models_are_preloaded_after_boot(fresh_machine: Host) -> None:
    machine = fresh_machine
    machine.write_model("qwen", keys="preload = true")
    machine.write_model("other")
    machine.reboot()
    machine.wait_for_state(QWEN, "active")
    assert machine.property("gpusvc-preload.service", "ActiveState") == "active"
    assert not machine.is_active("model@other.service")


def test_the_package_enables_its_socket_and_an_upgrade_restarts_what_runs(fresh_machine: Host, layers: Layers) -> None:
    machine = fresh_machine
    assert machine.run("systemctl", "is-enabled", "gpusvc-api.socket", "gpusvc-preload.service").stdout.split() == [
        "enabled",
        "enabled",
    ]
    write(machine)
    post(machine, "/gpusvc/models/qwen/start")
    engine = machine.engine_pids()
    before = machine.property(SERVICE, "MainPID")
    machine.write("/root/gpusvc.deb", layers.package().read_bytes())
    machine.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--install", "/root/gpusvc.deb", timeout=120)
    assert ask(machine, "GET", "/gpusvc/models")[1][0]["state"] == "ready"
    assert machine.property(SERVICE, "MainPID") != before
    assert machine.engine_pids() == engine
