"""A model is a unit: it starts, serves, says how it is, stops, and leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest

from tests import fakegpu
from tests.machine.container import MachineError
from tests.machine.host import GPU_NAME, Host

GIB = fakegpu.GIB
UNIT = "model@qwen.service"
SCOPE = "model-qwen.scope"
ONE_GPU = "count = 1"
QUESTION = '{"model": "qwen", "messages": [{"role": "user", "content": "Well?"}]}'


# It starts and serves, and stops and leaves nothing.


def test_a_started_model_answers_at_once(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.start("qwen")
    assert "You said: Well?" in machine.curl(machine.url("qwen", "/v1/chat/completions"), "-d", QUESTION)


def test_a_stopped_model_has_left_nothing(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.start("qwen")
    assert machine.gpu_holders(0)
    machine.stop("qwen")
    assert machine.remains("qwen") == []
    assert machine.property(UNIT, "ActiveState") == "inactive"
    machine.wait_until(lambda: machine.property(SCOPE, "LoadState") == "not-found", "the scope is forgotten")


def test_a_model_that_was_stopped_while_it_loads_has_left_nothing(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 4GiB --load-seconds 60", gpu=ONE_GPU)
    machine.run("systemctl", "start", "--no-block", UNIT)
    machine.wait_until(lambda: machine.gpu_holders(0), "it takes VRAM", unit=UNIT)
    machine.stop("qwen")
    assert machine.remains("qwen") == []
    assert machine.property(UNIT, "Result") == "success"


def test_a_restart_makes_a_new_engine_after_the_old_one_is_proven_gone(machine: Host) -> None:
    # Two do not fit on one GPU.
    machine.write_model("qwen", arguments="--vram 20GiB", gpu='count = 1\ndevices = [0]\nvram = "20GiB"')
    machine.start("qwen")
    first = engine_pid(machine)
    machine.run("systemctl", "restart", UNIT)
    second = engine_pid(machine)
    assert first != second
    assert processes(machine) == [second]
    story = machine.journal(UNIT)
    assert 0 < story.index("qwen is released after") < story.rindex("Ready after")


@pytest.mark.parametrize("enabled", [False, True], ids=["not enabled", "enabled"])
def test_twenty_rapid_starts_and_stops_never_have_two_engines(machine: Host, *, enabled: bool) -> None:
    machine.write_model("qwen", arguments="--vram 20GiB", gpu='count = 1\ndevices = [0]\nvram = "20GiB"')
    if enabled:
        machine.run("systemctl", "enable", UNIT)
    # Every other start is cut short, a little later each time.
    script = """
        for turn in 1 2 3 4 5 6 7 8 9 10; do
            systemctl start "$1" && systemctl stop "$1" || exit 1
            systemctl start --no-block "$1" || exit 1
            for moment in $(seq 2 $turn); do systemctl is-active "$1"; done
            systemctl stop "$1" || exit 1
        done
        systemctl start "$1"
    """
    with watched_holders(machine) as most:
        done = machine.run("sh", "-c", script, "sh", UNIT, check=False, timeout=90)
    assert done.returncode == 0, done.stderr + machine.journal(UNIT, "-n", "40")
    assert most() == 1
    assert processes(machine) == [engine_pid(machine)]
    machine.stop("qwen")
    assert machine.remains("qwen") == []


def test_restarts_by_hand_are_not_counted_as_failures(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    for _ in range(7):
        machine.run("systemctl", "restart", UNIT)
    assert machine.is_active(UNIT)


def test_an_enabled_model_is_back_after_a_reboot(fresh_machine: Host) -> None:
    machine = fresh_machine
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.run("systemctl", "enable", "--now", UNIT)
    machine.reboot()
    machine.wait_for_state(UNIT, "active")
    assert "You said: Well?" in machine.curl(machine.url("qwen", "/v1/chat/completions"), "-d", QUESTION)
    assert sum(machine.gpu_holders(0).values()) == 2 * GIB
    machine.stop("qwen")
    assert machine.remains("qwen") == []


def test_a_stop_needs_no_message_bus(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB --children ignore-term", keys='stop_timeout = "1s"', gpu=ONE_GPU)
    machine.start("qwen")
    with no_message_bus(machine):
        machine.stop("qwen")
        assert machine.remains("qwen") == []


def test_a_start_without_message_bus_says_so_and_leaves_nothing(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.override("qwen", "Restart=no")
    with no_message_bus(machine):
        assert machine.run("systemctl", "start", UNIT, check=False).returncode != 0
        assert "D-Bus" in machine.journal(UNIT)
        assert machine.remains("qwen") == []


# What systemctl and the journal tell.


def test_systemctl_status_tells_what_goes_on_and_what_the_engine_says(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", keys='description = "Qwen of the tests"', gpu=ONE_GPU)
    machine.start("qwen")
    shown = machine.run("systemctl", "status", "--no-pager", "-l", UNIT).stdout
    port = ps(machine)["port"]
    assert f'Status: "Ready at http://127.0.0.1:{port} on GPU 0 ({GPU_NAME}) with 2.0 GiB of VRAM."' in shown
    assert "test-engine: serving qwen on 127.0.0.1" in shown


def test_the_units_journal_tells_the_whole_story(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.start("qwen")
    machine.stop("qwen")
    told = machine.journal(UNIT)
    port = r"http://127\.0\.0\.1:\d+"
    chapters = (
        r"test-engine: serving qwen on 127\.0\.0\.1:\d+, 1 GPUs visible",
        r"test-engine: loaded",
        rf"Ready after \d+\.\d\d s\. Ready at {port} on GPU 0 \(.*\) with 2\.0 GiB of VRAM\.",
        r"test-engine: stopping",
        r"qwen is released after \d+\.\d\d s: no process of it is left, 2\.0 GiB of VRAM on GPU 0 came back\.",
    )
    where = [match.start() if (match := re.search(chapter, told)) else -1 for chapter in chapters]
    assert -1 not in where, told
    # The engine's lines go another way than gpusvc's own: each of the two is in order.
    assert where[0] < where[1] < where[3]
    assert where[2] < where[4]


def test_the_status_of_a_loading_model_tells_how_far_it_is(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 4GiB --load-seconds 60 --load-steps 120", gpu=ONE_GPU)
    machine.run("systemctl", "start", "--no-block", UNIT)
    wait_for_status(machine, rf"Loading on GPU 0 \({re.escape(GPU_NAME)}\), [\d.]+ [MG]iB of VRAM so far, \d s\.")
    row = ps(machine)
    assert row["state"] == "starting"
    assert row["vram_bytes"] > 0


def test_the_status_of_a_stopping_model_tells_what_it_waits_for(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.start("qwen")
    machine.gpus.configure(release_delay_ms=fakegpu.NEVER)
    machine.run("systemctl", "stop", "--no-block", UNIT)
    wait_for_status(machine, r"Stopping: NVML lists PID \d+ on GPU 0 with 2\.0 GiB\.")
    assert ps(machine)["state"] == "stopping"
    machine.gpus.configure(release_delay_ms=0)
    machine.wait_for_state(UNIT, "inactive")
    assert machine.remains("qwen") == []


# What gpusvc tells of a running model.


def test_gpusvc_ps_tells_scripts_all_of_a_running_model(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu='count = 1\nvram = "3GiB"')
    machine.start("qwen")
    row = ps(machine)
    since = datetime.fromisoformat(row.pop("since"))
    port = row.pop("port")
    assert abs(since.timestamp() - time.time()) < 60
    assert row.pop("text").startswith(f"Ready at http://127.0.0.1:{port} on GPU 0")
    wanted = {
        "name": "qwen",
        "state": "ready",
        "gpus": [{"index": 0, "uuid": fakegpu.uuid_of(0)}],
        "vram_bytes": 2 * GIB,
        "reserved_bytes": 3 * GIB,
        "address": "127.0.0.1",
        "pid": engine_pid(machine),
        "scope": SCOPE,
    }
    assert row | wanted == row


def test_gpusvc_ps_tells_people_the_same(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    machine.start("qwen")
    head, line = machine.run("gpusvc", "ps").stdout.splitlines()
    row = ps(machine)
    assert head.split() == ["NAME", "STATE", "GPU", "VRAM", "PORT", "PID", "SINCE"]
    assert line.split()[:7] == ["qwen", "ready", "0", "2.0", "GiB", str(row["port"]), str(row["pid"])]


def test_gpusvc_status_tells_scripts_each_process_and_the_last_words(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB --children plain --child-vram 1GiB", gpu=ONE_GPU)
    machine.start("qwen")
    told = json.loads(machine.run("gpusvc", "status", "qwen", "--json").stdout)
    assert told["state"] == "ready"
    assert told["file"] == "/etc/gpusvc/models/qwen.toml"
    assert told["vram_bytes"] == 3 * GIB
    assert sorted(process["vram_bytes"] for process in told["processes"]) == [GIB, 2 * GIB]
    assert {process["pid"] for process in told["processes"]} == set(machine.pids(SCOPE))
    assert any("test-engine: loaded" in line for line in told["log"])


def test_gpusvc_status_is_a_card_for_people(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu='count = 1\nvram = "3GiB"')
    machine.start("qwen")
    card = machine.run("gpusvc", "status", "qwen").stdout
    row = ps(machine)
    for fact in (
        r"State +ready since ",
        r"Status +Ready at ",
        rf"GPU +0 \({fakegpu.uuid_of(0)}\)",
        r"VRAM +2\.0 GiB, 3\.0 GiB reserved",
        rf"Address +http://127\.0\.0\.1:{row['port']}",
        rf"PID +{row['pid']}",
        rf"Scope +{SCOPE}",
        r"File +/etc/gpusvc/models/qwen\.toml",
        rf"{row['pid']} +2\.0 GiB +.*test-engine",
    ):
        assert re.search(fact, card), card


def test_gpusvc_logs_shows_the_engines_words_and_gpusvcs(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    machine.run("journalctl", "--sync")
    shown = machine.run("gpusvc", "logs", "qwen").stdout
    assert "test-engine: serving qwen" in shown
    assert "Ready after" in shown


def test_a_flood_of_output_costs_no_line_of_gpusvc(machine: Host) -> None:
    machine.write_model("chatty", arguments="--vram 2GiB --flood 20000", gpu=ONE_GPU)
    machine.start("chatty")
    machine.wait_until(
        lambda: "slot update 4000" in machine.messages("chatty"), "it floods", unit="model@chatty.service"
    )
    machine.stop("chatty")
    said = machine.messages("chatty")
    assert "Ready after" in said
    assert "chatty is released after" in said
    assert re.search(r"gpusvc left out \d{3,} lines here", said)
    assert "Suppressed" not in machine.journal("systemd-journald.service")
    events = machine.run("gpusvc", "events", "chatty").stdout.split()
    assert [word for word in events if word in {"start", "ready", "release"}] == ["start", "ready", "release"]


def test_of_many_lines_the_last_ones_are_shown(machine: Host) -> None:
    command = '["/bin/sh", "-c", "seq -f line-%g 60; exit 3"]'
    machine.write("/etc/gpusvc/models/talker.toml", f"command = {command}\n[gpu]\ncount = 0\n")
    machine.override("talker", "Restart=no")
    failed = machine.run("gpusvc", "start", "talker", check=False)
    assert failed.returncode == 1
    assert "line-60" in failed.stderr
    assert "line-1\n" not in failed.stderr
    url = "http://localhost/gpusvc/models/talker"
    told = json.loads(machine.run("curl", "-s", "--unix-socket", "/run/gpusvc/api.sock", url).stdout)
    assert "line-60" in told["log"]
    assert "line-1" not in told["log"]
    for what in (("logs", "talker"), ("events", "talker")):
        everything = machine.run("gpusvc", *what).stdout.splitlines()
        newest = machine.run("gpusvc", *what, "--lines=1", "--since=-1h").stdout.splitlines()
        assert newest == everything[-len(newest) :], what
        assert newest != everything, what


def test_gpusvc_gpus_names_the_model_that_holds_one(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu='count = 1\nvram = "3GiB"')
    machine.start("qwen")
    first, second = json.loads(machine.run("gpusvc", "gpus", "--json").stdout)
    holder = {"model": "qwen", "pid": engine_pid(machine), "command": None}
    assert first["holders"] == [holder | {"vram_bytes": 2 * GIB, "reserved_bytes": 3 * GIB}]
    assert first["reserved_bytes"] == 3 * GIB
    assert first["total_bytes"] - first["used_bytes"] >= first["free_bytes"] > 0
    assert second["holders"] == []
    assert "qwen: 2.0 GiB" in machine.run("gpusvc", "gpus").stdout


def test_gpusvc_list_shows_stopped_models_too(machine: Host) -> None:
    machine.write_model("qwen")
    machine.write_model("idle")
    machine.start("qwen")
    rows = json.loads(machine.run("gpusvc", "list", "--json").stdout)
    assert {row["name"]: row["state"] for row in rows} == {"idle": "stopped", "qwen": "ready"}


def test_gpusvc_starts_and_stops_as_systemctl_does(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU)
    assert "qwen: Ready at http://127.0.0.1:" in machine.run("gpusvc", "start", "qwen").stdout
    assert machine.is_active(UNIT)
    assert machine.run("gpusvc", "stop", "qwen").stdout == "qwen is stopped, and nothing of it is left.\n"
    assert machine.remains("qwen") == []


# How long a start may take.


def test_a_slow_load_outlasts_every_timeout_while_vram_grows(machine: Host) -> None:
    machine.write_model(
        "qwen", arguments="--vram 2GiB --load-seconds 3 --load-steps 15", keys='start_timeout = "1.5s"', gpu=ONE_GPU
    )
    machine.override("qwen", "TimeoutStartSec=2s")
    machine.start("qwen")
    assert machine.property(UNIT, "NRestarts") == "0"


def test_a_slow_load_outlasts_every_timeout_while_it_computes(machine: Host) -> None:
    machine.write_model("qwen", arguments="--never-ready --burn cpu", keys='start_timeout = "1.5s"')
    machine.override("qwen", "TimeoutStartSec=2s")
    machine.run("systemctl", "start", "--no-block", UNIT)
    wait_for_status(machine, r"Loading on no GPU, [3-9] s\.")
    assert machine.property(UNIT, "ActiveState") == "activating"


def test_a_load_without_progress_fails_and_says_so(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB --never-ready", keys='start_timeout = "1s"', gpu=ONE_GPU)
    machine.override("qwen", "Restart=no")
    refused = machine.run("systemctl", "start", UNIT, check=False)
    assert refused.returncode != 0
    sentence = r"The engine made no progress for 1s, and /health does not answer on port \d+\."
    assert re.fullmatch(sentence, machine.property(UNIT, "StatusText"))
    assert re.search(sentence, machine.journal(UNIT))
    assert machine.property(UNIT, "Result") == "exit-code"
    assert machine.remains("qwen") == []


# How an engine's end shows.


@pytest.mark.parametrize(
    ("death", "result", "status", "manner"),
    [
        ("--exit-status 7", "exit-code", 7, "with exit status 7"),
        ("--kill-self SEGV", "signal", signal.SIGSEGV, "by SIGSEGV"),
        ("--kill-self KILL", "signal", signal.SIGKILL, "by SIGKILL"),
    ],
    ids=["exit status", "SIGSEGV", "SIGKILL"],
)
@pytest.mark.parametrize("ready", [False, True], ids=["before it is ready", "after"])
def test_the_end_of_the_engine_is_the_end_of_the_unit(
    machine: Host, death: str, result: str, status: int, manner: str, *, ready: bool
) -> None:
    when = "--die-after-health 2" if ready else "--die-after-load"
    machine.write_model("qwen", arguments=f"--vram 2GiB {when} {death}", gpu=ONE_GPU)
    machine.override("qwen", "Restart=no")
    if ready:
        machine.start("qwen")
        machine.curl(machine.url("qwen", "/health"))
        machine.wait_for_state(UNIT, "failed")
    else:
        assert machine.run("systemctl", "start", UNIT, check=False).returncode != 0
    before = "" if ready else " before it was ready"
    assert machine.properties(UNIT, "Result", "ExecMainStatus", "StatusText") == {
        "Result": result,
        "ExecMainStatus": str(int(status)),
        "StatusText": f"The engine ended {manner}{before}; its last words: test-engine: dying",
    }
    assert ps(machine)["state"] == "failed"
    assert machine.remains("qwen") == []


def test_an_engine_that_ends_well_ends_its_unit_well(machine: Host) -> None:
    machine.write_model("qwen", arguments="--die-after-health 2 --exit-status 0")
    machine.start("qwen")
    machine.curl(machine.url("qwen", "/health"))
    machine.wait_for_state(UNIT, "inactive")
    assert machine.properties(UNIT, "Result", "NRestarts") == {"Result": "success", "NRestarts": "0"}
    assert machine.remains("qwen") == []


def test_an_engine_that_ends_before_it_is_ready_has_failed_whatever_it_says(machine: Host) -> None:
    machine.write_model("qwen", arguments="--die-after-load --exit-status 0")
    machine.override("qwen", "Restart=no")
    assert machine.run("systemctl", "start", UNIT, check=False).returncode != 0
    assert machine.properties(UNIT, "Result", "ExecMainStatus") == {"Result": "exit-code", "ExecMainStatus": "1"}
    assert "ended with exit status 0 before it was ready" in machine.property(UNIT, "StatusText")


def test_an_engine_that_puts_itself_into_the_background_is_told_so(machine: Host) -> None:
    machine.write_model("qwen", arguments="--children daemonise --die-after-load --exit-status 0")
    machine.override("qwen", "Restart=no")
    assert machine.run("systemctl", "start", UNIT, check=False).returncode != 0
    said = machine.property(UNIT, "StatusText")
    assert "before it was ready, but 1 process of it runs on: it put itself into the background" in said
    assert machine.remains("qwen") == []


def test_an_engines_exit_status_is_not_taken_for_a_refusal(machine: Host) -> None:
    machine.write_model("qwen", arguments="--die-after-load --exit-status 75")
    machine.override("qwen", "RestartSec=100ms")
    machine.run("systemctl", "start", UNIT, check=False)
    machine.wait_until(lambda: int(machine.property(UNIT, "NRestarts")) >= 1, "systemd tries again", unit=UNIT)
    assert machine.property(UNIT, "ExecMainStatus") in {"0", "1"}
    assert "ended with exit status 75" in told(machine)


@pytest.mark.parametrize("way", ["--vram 25GiB", "--vram 1GiB --oom"], ids=["real", "told"])
def test_running_out_of_vram_is_called_that(machine: Host, way: str) -> None:
    machine.write_model("qwen", arguments=way, gpu=ONE_GPU)
    machine.override("qwen", "Restart=no")
    assert machine.run("systemctl", "start", UNIT, check=False).returncode != 0
    told = machine.property(UNIT, "StatusText")
    assert told.startswith("The engine ended with exit status 1 before it was ready: it ran out of VRAM")
    assert told.endswith("its last words: ggml_cuda: CUDA error: out of memory")
    assert machine.property(UNIT, "ExecMainStatus") == "1"
    assert machine.remains("qwen") == []


def test_gpusvc_start_tells_why_an_engine_did_not(machine: Host) -> None:
    machine.write_model("qwen", arguments="--die-after-load --exit-status 7")
    machine.override("qwen", "Restart=no")
    refused = machine.run("gpusvc", "start", "qwen", check=False)
    assert refused.returncode == 1
    assert "The engine ended with exit status 7 before it was ready" in refused.stderr
    assert "test-engine: dying" in refused.stderr


def test_a_hung_engine_is_restarted_by_systemd(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", keys='health_timeout = "1s"', gpu=ONE_GPU)
    machine.start("qwen")
    first = engine_pid(machine)
    machine.run("kill", "-USR1", str(first))
    machine.wait_until(lambda: machine.property(UNIT, "NRestarts") == "1", "systemd restarts it", unit=UNIT)
    machine.wait_for_state(UNIT, "active")
    assert processes(machine) == [engine_pid(machine)] != [first]
    assert "Watchdog request" in machine.journal(UNIT)
    assert re.search(r"/health has not answered for \d+s: the engine is ended, and systemd restarts it", told(machine))


def test_an_engine_whose_health_fails_is_restarted_with_an_event_that_tells_the_status(machine: Host) -> None:
    machine.write(
        "/etc/gpusvc/hooks.d/note", '#!/bin/sh\necho "$GPUSVC_EVENT $GPUSVC_REASON" >> /run/hooked\n', mode=0o755
    )
    machine.run("systemctl", "restart", "gpusvc-hooks.service")
    machine.write_model("qwen", arguments="--vram 2GiB", keys='health_timeout = "1s"', gpu=ONE_GPU)
    machine.start("qwen")
    machine.run("curl", "-s", machine.url("qwen", "/sicken"))
    machine.wait_until(lambda: machine.property(UNIT, "NRestarts") == "1", "systemd restarts it", unit=UNIT)
    assert re.search(r"/health has answered HTTP 500 for \d+s: the engine is ended", told(machine))
    hooked = ("grep", "-q", "fail health_timeout", "/run/hooked")
    machine.wait_until(lambda: machine.run(*hooked, check=False).returncode == 0, "the hook hears of it")


def test_a_hung_engine_is_said_to_hang(machine: Host) -> None:
    machine.write_model("qwen", keys='health_timeout = "8s"')
    machine.start("qwen")
    machine.run("kill", "-USR1", str(engine_pid(machine)))
    wait_for_status(machine, r"/health has not answered for \d+s\.")


def test_an_engine_may_hang_where_the_model_file_allows_it(machine: Host) -> None:
    machine.write_model("qwen", keys="health_timeout = 0")
    machine.start("qwen")
    assert machine.property(UNIT, "WatchdogUSec") in {"0", "infinity"}


def test_an_engine_at_an_address_of_the_network_is_reached_through_the_gateway(machine: Host) -> None:
    machine.run("ip", "address", "add", "192.168.77.5/32", "dev", "lo", check=False)
    machine.write_model("qwen", arguments="--listen 192.168.77.5")
    asking = ("-H", "Content-Type: application/json", "--data", QUESTION)
    assert "You said" in machine.curl("http://127.0.0.1:8484/v1/chat/completions", *asking)
    assert (ps(machine)["address"], machine.is_active("gpusvc-gateway.service")) == ("192.168.77.5", True)
    # Elsewhere the gateway still may not go.
    assert set(machine.property("gpusvc-gateway.service", "IPAddressDeny").split()) == {"::/0", "0.0.0.0/0"}


# What an engine gets.


def test_scope_limits_of_the_model_file_are_the_scopes(machine: Host) -> None:
    machine.write_model("qwen", scope='MemoryMax = "32G"\nTasksMax = 500\nCPUWeight = 50\nMemorySwapMax = 0')
    machine.start("qwen")
    assert machine.properties(SCOPE, "MemoryMax", "TasksMax", "CPUWeight", "MemorySwapMax") == {
        "MemoryMax": str(32 * GIB),
        "TasksMax": "500",
        "CPUWeight": "50",
        "MemorySwapMax": "0",
    }


def test_the_scope_lives_and_dies_with_the_unit_and_opens_one_gpu(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 1GiB", keys='stop_timeout = "7s"', gpu="count = 1\ndevices = [1]")
    machine.start("qwen")
    shown = machine.properties(
        SCOPE, "BindsTo", "Slice", "KillMode", "TimeoutStopUSec", "DevicePolicy", "NeedDaemonReload"
    )
    assert shown == {
        "BindsTo": UNIT,
        "Slice": "gpusvc-models.slice",
        "KillMode": "control-group",
        "TimeoutStopUSec": "7s",
        "DevicePolicy": "closed",
        "NeedDaemonReload": "no",
    }
    allowed = machine.property(SCOPE, "DeviceAllow")
    assert "/dev/nvidia1 rw" in allowed
    assert "/dev/nvidia0" not in allowed


def test_a_port_that_is_given_is_used(machine: Host) -> None:
    machine.write_model("qwen", keys="port = 8123")
    machine.start("qwen")
    assert json.loads(machine.curl("http://127.0.0.1:8123/self"))["environment"]["PORT"] == "8123"
    assert ps(machine)["port"] == 8123


def test_a_port_that_is_chosen_is_free_and_the_same_next_time(machine: Host) -> None:
    machine.write_model("qwen", keys="port = 0")
    machine.start("qwen")
    port = ps(machine)["port"]
    machine.run("systemctl", "restart", UNIT)
    assert ps(machine)["port"] == port
    machine.stop("qwen")
    with occupied(machine, port):
        machine.start("qwen")
        assert ps(machine)["port"] != port


def test_the_engine_is_its_user_and_has_no_privilege(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    itself = itself_of(machine)
    assert itself["uid"] == int(machine.run("id", "-u", "gpusvc").stdout)
    assert itself["gid"] == int(machine.run("id", "-g", "gpusvc").stdout)
    assert sorted(itself["groups"]) == sorted(map(int, machine.run("id", "-G", "gpusvc").stdout.split()))
    capabilities = machine.run("grep", "^Cap", f"/proc/{engine_pid(machine)}/status").stdout.split()[1::2]
    assert set(capabilities) == {"0" * 16}
    assert itself["no_new_privileges"] == "1"


def test_an_engine_that_would_run_as_root_is_refused_without_a_word_of_the_host(machine: Host) -> None:
    machine.write_model("qwen", keys='user = "root"')
    assert "allow_root_engines = true" in machine.fail_to_start("qwen")
    assert machine.property("model@qwen.service", "ExecMainStatus") == "78"


def test_the_engine_has_no_privilege_as_root_either(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "allow_root_engines = true\n")
    machine.write_model("qwen", keys='user = "root"')
    machine.start("qwen")
    assert itself_of(machine)["uid"] == 0
    capabilities = machine.run("grep", "^Cap", f"/proc/{engine_pid(machine)}/status").stdout.split()[1::2]
    assert set(capabilities) == {"0" * 16}


def test_the_engines_environment_is_the_model_files_and_what_gpusvc_decides(machine: Host) -> None:
    machine.write_model("qwen", keys='env = { HF_HOME = "/srv/hf" }', gpu="count = 1\ndevices = [1]")
    machine.start("qwen")
    environment = itself_of(machine)["environment"]
    wanted = {
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PORT": str(ps(machine)["port"]),
        "GPUSVC_MODEL": "qwen",
        "HF_HOME": "/srv/hf",
        "USER": "gpusvc",
    }
    assert environment | wanted == environment
    of_systemd = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "JOURNAL_STREAM", "MAINPID", "SYSTEMD_EXEC_PID")
    assert [name for name in environment if name.startswith(of_systemd)] == []


def test_a_model_without_gpus_is_shown_none(machine: Host) -> None:
    machine.write_model("qwen", gpu="count = 0")
    machine.start("qwen")
    assert itself_of(machine)["environment"]["CUDA_VISIBLE_DEVICES"] == ""


def test_the_engine_inherits_its_three_streams_and_no_other_file(machine: Host) -> None:
    # ls opens the directory itself as the fourth.
    script = "ls -x /proc/self/fd; exec test-engine"
    machine.write_model("qwen", f"command = ['sh', '-c', '{script}']\n[gpu]\ncount = 1")
    machine.start("qwen")
    assert re.search(r": 0 +1 +2 +3$", machine.journal(UNIT), re.MULTILINE)


def test_the_engine_inherits_no_blocked_or_ignored_signal(machine: Host) -> None:
    script = 'grep -E "^Sig(Blk|Ign)" /proc/self/status; exec test-engine'
    machine.write_model("qwen", f"command = ['sh', '-c', '{script}']\n[gpu]\ncount = 0")
    machine.start("qwen")
    assert re.findall(r"Sig(?:Blk|Ign):\s+(\w+)", machine.journal(UNIT)) == ["0" * 16] * 2


# Parts


def ps(machine: Host) -> dict[str, Any]:
    row = machine.ps("qwen")
    assert row is not None
    return row


def engine_pid(machine: Host) -> int:
    pid: int = ps(machine)["pid"]
    return pid


def processes(machine: Host) -> list[int]:
    """The engine's processes, wherever they are."""
    return sorted(machine.engine_pids())


def itself_of(machine: Host) -> dict[str, Any]:
    """What the engine says of itself."""
    answer: dict[str, Any] = json.loads(machine.curl(machine.url("qwen", "/self")))
    return answer


def wait_for_status(machine: Host, pattern: str) -> None:
    said: list[str] = []

    def matches() -> bool:
        said[:] = [machine.property(UNIT, "StatusText")]
        return re.fullmatch(pattern, said[0]) is not None

    try:
        machine.wait_until(matches, f"it says {pattern}", unit=UNIT)
    except MachineError as error:
        raise MachineError(f"{error}\nIt says: {said}") from None


@contextmanager
def watched_holders(machine: Host) -> Iterator[Any]:
    """Watches, as fast as it can, how many processes hold VRAM of GPU 0 at a time; gives the most ever seen."""
    most = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, len(machine.gpu_holders(0)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most
    finally:
        over.set()
        watcher.join()


@contextmanager
def occupied(machine: Host, port: int) -> Iterator[None]:
    """Another program listens on a port."""
    machine.run("systemd-run", "--quiet", "--unit=occupant", "test-engine", "--port", str(port))
    try:
        machine.wait_until(lambda: machine.run("ss", "-Hltn", f"sport = :{port}").stdout, "the port is taken")
        yield
    finally:
        machine.run("systemctl", "stop", "occupant.service")


@contextmanager
def no_message_bus(machine: Host) -> Iterator[None]:
    """No D-Bus daemon, and nothing that starts it on demand."""
    units = ("dbus.service", "dbus.socket")
    machine.run("systemctl", "stop", *units)
    try:
        assert machine.run("busctl", "list", check=False).returncode != 0
        yield
    finally:
        machine.run("systemctl", "start", *units)
        machine.wait_until(lambda: machine.run("busctl", "list", check=False).returncode == 0, "the bus is back")


def told(machine: Host) -> str:
    return machine.messages("qwen")
