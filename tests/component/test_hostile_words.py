"""Whatever a driver, a client or a person says: a clear error or nothing, on a terminal that stays as it was."""

from __future__ import annotations

import json
import os
import random
import urllib.parse
from pathlib import Path
from typing import cast

import pytest

from gpusvc import cli
from gpusvc.api.backend import journal
from gpusvc.cli.commands.show import _gpu_lines
from gpusvc.cli.top import dashboard
from gpusvc.errors import NvmlError
from gpusvc.gpu.reading import Gpu
from gpusvc.paths import Paths
from gpusvc.status import inventory
from tests.component.conftest import Machine
from tests.component.test_api import Api, Run, api
from tests.fakegpu import GIB, FakeGpu, Return, Sample

__all__ = ["api"]

SEEDS = range(3)
STEERING = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"

NAMES = [
    "..",
    ".",
    "a/../../etc/passwd",
    "/etc/passwd",
    "-h",
    "--help",
    "--",
    "-",
    "",
    " ",
    "a b",
    "a\nREADY=1",
    "a\0b",
    "Ünïcödé",
    "\u202eabc",
    STEERING,
    "\udcff\udcfe",
    "x" * 10_000,
    "model@qwen.socket",
    "model@model@qwen.service",
    "%i%n%%",
    "$(reboot)",
    "qwen;reboot",
    "*",
    "qwen\\x2d",
    "qwen.service",
    "🦙" * 50,
]

# Those that never hand over to another program.
COMMANDS = [
    ("start",),
    ("stop",),
    ("restart",),
    ("status",),
    ("logs",),
    ("events",),
    ("config",),
    ("release",),
    ("evict",),
    ("pin",),
    ("unpin",),
    ("rm", "--yes"),
    ("edit",),
    ("use",),
]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv("PATH", "/nonexistent")
    made = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "var")
    made.models_directory.mkdir(parents=True)
    made.model_file("qwen").write_text('command = ["/bin/true"]\nuser = "root"\n[gpu]\ncount = 0\n')
    return made


def plain(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
def test_a_name_of_any_kind_is_refused_in_a_sentence(
    paths: Paths, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(paths.config.rglob("*"))
    for name in NAMES:
        if not name and command[0] in {"config", "events"}:
            continue  # that is all of them
        status = cli.run(paths, [*command, "--", name])
        said = capsys.readouterr()
        assert status in {1, 2, 3, 4}, (name, said)
        assert "bug of gpusvc" not in said.err, (name, said)
        assert "Traceback" not in said.err
        assert said.out == ""
        assert plain(said.err), (name, said.err)
        assert len(said.err) < 2000
    assert sorted(paths.config.rglob("*")) == before
    assert not list(paths.runtime.rglob("*passwd*"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_looks_like_an_option_is_one_or_an_error(
    paths: Paths, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.run(paths, ["status", name])
    said = capsys.readouterr()
    assert status in ({0} if name in {"-h", "--help"} else {1, 2, 3, 4}), said
    assert "bug of gpusvc" not in said.err


# ---- what a driver says ----


def gpu_of(dice: random.Random) -> FakeGpu:
    size = dice.choice([0, 1, GIB, 24 * GIB, 1 << 62])
    errors = [None, None, *Return]
    return FakeGpu(
        uuid=dice.choice([None, None, "GPU-0", "x" * 79, "GPU-\x1b[2J"]),
        name=dice.choice(["NVIDIA", STEERING.replace("\x1b]0;owned\x07", ""), "n" * 95, "\u00fc"]),
        minor=dice.choice([None, 0, 7, 255, 4095]),
        total=size,
        reserved=dice.choice([0, 256 << 20, 1 << 40]),
        uncounted=dice.choice([0, GIB, 1 << 62]),
        utilisation=dice.choice([None, 0, 100, 255, 1 << 31]),
        samples=[
            Sample(dice.choice([0, 1, 1 << 31]), dice.choice([0, 101, 1 << 31])) for _ in range(dice.choice([0, 3]))
        ],
        mig=dice.choice([None, None, False, True]),
        ghosts={
            dice.choice([1, 7, 1 << 22, (1 << 32) - 1]): dice.choice([0, GIB, 1 << 62])
            for _ in range(dice.choice([0, 4]))
        },
        graphics=dice.random() < 0.5,
        memory_unsupported=dice.random() < 0.2,
        process_bytes_unknown=dice.random() < 0.2,
        processes_error=dice.choice(errors),
        handle_error=dice.choice(errors),
        utilisation_error=dice.choice(errors),
        lost=dice.random() < 0.1,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_of_nvml_of_any_kind_are_readings_or_an_error(machine: Machine, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    paths = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "var")
    client = machine.client()
    seen = failed = 0
    for _ in range(40):
        machine.gpus.configure(
            [gpu_of(dice) for _ in range(dice.choice([0, 1, 2, 5]))],
            init_error=dice.choice([None] * 6 + [*Return]),
            insufficient_times=dice.choice([0, 0, 3, 50]),
        )
        try:
            client.ask("connect()")
            gpus = cast("tuple[Gpu, ...]", client.ask("client.snapshot(utilisation=True)"))
        except NvmlError as error:
            failed += 1
            said = error.message
            assert said.endswith(".")
            continue
        seen += 1
        for gpu in gpus:
            assert gpu.problem is None or gpu.problem.endswith(".")
        statuses = inventory.gpus(paths, gpus)
        json.dumps([status.to_json() for status in statuses])
        assert plain("\n".join(_gpu_lines(statuses)))
        assert dashboard.plain(dashboard.View(tuple(statuses), (), (), ""))
    assert seen > 5
    assert failed > 0


# ---- what clients of the API ask for, and what the journal tells it ----


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_of_any_kind_to_the_api_are_answered_in_json_and_harm_no_model(api: Run, seed: int) -> None:
    dice = random.Random(seed)
    verbs = [
        "",
        "/start",
        "/stop",
        "/restart",
        "/evict",
        "/pin",
        "/unpin",
        "/log?lines=1&follow=0",
        "/start?wait=request",
    ]
    queries = [
        "",
        "?lines=-1",
        "?lines=x&follow=0",
        "?lines=99999999999999999999&follow=0",
        "?wait=%00",
        "?" + "a" * 5000,
    ]

    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        for _ in range(60):
            name = dice.choice([name for name in NAMES if name not in {".", "..", ""}])
            quoted = urllib.parse.quote(name.encode(errors="surrogateescape"), safe="")[:6000]
            path = f"/gpusvc/models/{quoted}{dice.choice(verbs)}"
            path = path if "?" in path else path + dice.choice(queries)
            method = dice.choice(["GET", "POST", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "TRACE"])
            body = dice.choice([b"", b"{", os.urandom(16), b"[" * 5000, b'{"force": "x"}', b"null"])
            async with api.client.request(method, f"http://api{path}", data=body, allow_redirects=False) as response:
                text = await response.text()
                assert 400 <= response.status < 500 or method == "OPTIONS", (method, path, response.status, text)
                assert "Traceback" not in text
                assert method == "HEAD" or plain(text), text
        assert api.systemd.asked == []
        async with api.client.get("http://api/gpusvc/models/qwen") as response:
            assert (await response.json())["state"] == "ready"

    api(scenario)


@pytest.mark.parametrize("seed", SEEDS)
def test_entries_of_the_journal_of_any_kind_are_told_or_left_out(seed: int) -> None:
    dice = random.Random(seed)
    values: list[object] = [
        None,
        1,
        -1,
        1.5,
        "",
        "x",
        STEERING,
        [1, 255],
        [256],
        [-1],
        ["a"],
        [[1]],
        {},
        True,
        "9" * 5000,
    ]
    keys = ["MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "__CURSOR", "__REALTIME_TIMESTAMP"]
    for _ in range(500):
        entry = {key: dice.choice(values) for key in keys if dice.random() < 0.9}
        try:
            told = journal.told(entry)
        except (KeyError, TypeError, ValueError):
            continue
        json.dumps(told)


def test_an_error_that_quotes_a_stranger_steers_no_terminal(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.model_file("bad").write_text(f'description = "a"\nhealth = "{STEERING[-1]}"\n"\\u001b[2J" = 1\n')
    assert cli.run(paths, ["check"]) == 1
    said = capsys.readouterr()
    assert plain(said.out + said.err)
