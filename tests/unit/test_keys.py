"""API keys: what is stored, who is let in, and what happens to the file."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from gpusvc import cli
from gpusvc.config import keys
from gpusvc.config.keys import Key, Keys, Right
from gpusvc.config.table import InvalidFileError
from gpusvc.errors import ConfigError, GpusvcError, UsageError
from gpusvc.paths import Paths

ALICE, ALICES_SECRET = keys.make("alice")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def write(file: Path, *kept: Key) -> None:
    with keys.editing(file, os.getgid()) as known:
        known.clear()
        known.update({key.name: key for key in kept})


def reports() -> tuple[list[str], Callable[[ConfigError], None]]:
    said: list[str] = []
    return said, lambda error: said.append(str(error))


def bearer(secret: str, scheme: str = "Bearer") -> bytes:
    return f"{scheme} {secret}".encode()


# -- Secrets


def test_a_secret_has_256_random_bits_and_a_prefix_that_scanners_know() -> None:
    _, secret = keys.make("bob")
    text = secret.removeprefix(keys.PREFIX)
    assert text != secret
    assert len(base64.urlsafe_b64decode(text + "=")) * 8 == 256
    assert secret != ALICES_SECRET


def test_nothing_that_is_stored_contains_the_secret(file: Path) -> None:
    write(file, ALICE)
    assert ALICES_SECRET.removeprefix(keys.PREFIX) not in file.read_text()
    assert hashlib.sha256(ALICES_SECRET.encode()).hexdigest() in file.read_text()


def test_a_key_is_not_shown_with_its_secret() -> None:
    assert ALICES_SECRET not in repr(ALICE)


@pytest.mark.parametrize("name", ["", "-x", "a b", 'a"b', "a\n", "ä", "x" * 65])
def test_a_name_that_needs_escapes_is_no_name(name: str) -> None:
    with pytest.raises(UsageError):
        keys.make(name)


# -- Who is let in


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (bearer(ALICES_SECRET), None),
        (bearer(ALICES_SECRET, "bearer"), None),
        (bearer(" " + ALICES_SECRET + " "), None),
        (None, ALICES_SECRET.encode()),
        (bearer("sk-not-needed"), ALICES_SECRET.encode()),
        (bearer(ALICES_SECRET), b"something else"),
        (bearer(base64.b64encode(f"anybody:{ALICES_SECRET}".encode()).decode(), "Basic"), None),
    ],
    ids=itertools.count(),  # a secret differs from one worker's collection to the other's
)
def test_a_key_may_come_in_either_header(authorization: bytes | None, x_api_key: bytes | None) -> None:
    assert Keys((), {Path("f"): (ALICE,)}).authenticate(authorization, x_api_key) is ALICE


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (None, None),
        (b"", b""),
        (b"Bearer", None),
        (b"Bearer ", None),
        (bearer(ALICES_SECRET[:-1]), None),
        (bearer(ALICES_SECRET + "x"), None),
        (bearer(ALICES_SECRET.upper()), None),
        (bearer(ALICE.digest), ALICE.digest.encode()),
        (ALICES_SECRET.encode(), None),
        (b"Basic !!!", None),
        (b"Basic " + base64.b64encode(b"no colon"), None),
        (b"\xff\xfe Bearer", b"\xff" * 100_000),
    ],
    ids=itertools.count(),  # a secret differs from one worker's collection to the other's
)
def test_nobody_else_is_let_in(authorization: bytes | None, x_api_key: bytes | None) -> None:
    assert Keys((), {Path("f"): (ALICE,)}).authenticate(authorization, x_api_key) is None


@pytest.mark.parametrize(
    ("key", "model", "may"),
    [
        (Key("k", ""), "qwen", True),
        (Key("k", "", models=("qwen",)), "qwen", True),
        (Key("k", "", models=("qwen",)), "llama", False),
        (Key("k", "", rights=(Right.METRICS,)), "qwen", False),
        (Key("k", "", rights=(Right.ADMIN,)), "qwen", True),
        (Key("k", "", models=("qwen",), rights=(Right.ADMIN,)), "llama", True),
        (Key("k", "", rights=()), "qwen", False),
    ],
)
def test_a_key_is_for_its_models(key: Key, model: str, *, may: bool) -> None:
    assert key.may_use(model) is may


def test_only_an_admin_has_rights_that_were_not_given() -> None:
    assert [Key("k", "", rights=(Right.USE,)).may(right) for right in Right] == [True, False, False]
    assert [Key("k", "", rights=(Right.METRICS,)).may(right) for right in Right] == [False, True, False]
    assert all(Key("k", "", rights=(Right.ADMIN,)).may(right) for right in Right)


# -- The file


def test_what_was_written_is_read(file: Path) -> None:
    kept = [
        ALICE,
        Key("bob.2", "b" * 64, models=("qwen", "llama:70b")),
        Key("prometheus", "c" * 64, rights=(Right.METRICS,)),
    ]
    write(file, *kept)
    assert keys.read(file) == kept


def test_nobody_but_root_and_the_gateway_may_read_it(file: Path) -> None:
    write(file, ALICE)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert file.stat().st_gid == os.getgid()


def test_a_change_that_fails_leaves_the_file_as_it_was(file: Path) -> None:
    write(file, ALICE)
    before = file.read_bytes()
    with pytest.raises(ZeroDivisionError), keys.editing(file, os.getgid()) as known:
        known["bob"] = replace(ALICE, name=str(1 // 0))
    assert file.read_bytes() == before
    assert {entry.name for entry in file.parent.iterdir()} == {file.name, f".{file.name}.lock"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[", "It is no TOML"),
        ("x = 1", "x: It must be a table"),
        ("[alice]", "alice.sha256: It must be 64 hexadecimal digits"),
        ('[alice]\nsha256 = "secret"', "alice.sha256: It must be 64 hexadecimal digits"),
        (f'["a b"]\nsha256 = "{"a" * 64}"', "That cannot be a key's name"),
        (f'[a]\nsha256 = "{"a" * 64}"\nmodels = ["a b"]', "a.models[0]: That is no model's name"),
        (f'[a]\nsha256 = "{"a" * 64}"\nmodels = []', "a.models: It is empty"),
        (f'[a]\nsha256 = "{"a" * 64}"\nrights = ["amin"]', "a.rights[0]: It is none of use, metrics, admin"),
        (f'[a]\nsha256 = "{"a" * 64}"\nmodel = ["q"]', "a.model: There is no such key"),
        (f'[a]\nsha256 = "{"a" * 64}"\n[b]\nsha256 = "{"a" * 64}"', "It is the same key as 'a'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(file: Path, text: str, wrong: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidFileError) as caught:
        Keys.read([file])
    assert wrong in str(caught.value)
    assert str(file) in str(caught.value)


def test_without_a_file_nobody_needs_a_key(file: Path) -> None:
    assert not Keys.read([file]).configured


def test_a_file_without_keys_lets_nobody_in(file: Path) -> None:
    write(file)
    assert Keys.read([file]).configured


def test_a_service_also_reads_the_credential_that_systemd_gives_it(tmp_path: Path) -> None:
    paths = Paths(config=tmp_path, runtime=Path("/run/gpusvc"), state=Path("/var/lib/gpusvc"))
    assert keys.files_of(paths, {}) == (tmp_path / "keys.toml",)
    credential = tmp_path / keys.CREDENTIAL
    write(credential, ALICE)
    read = Keys.read(keys.files_of(paths, {"CREDENTIALS_DIRECTORY": str(tmp_path)}))
    assert read.authenticate(bearer(ALICES_SECRET), None) == ALICE


# -- A file that changes under a server


def test_a_key_that_is_added_or_removed_counts_from_the_next_look(file: Path) -> None:
    said, report = reports()
    served = Keys.read([file])
    write(file, ALICE)
    served.refresh(report)
    assert served.configured
    assert served.authenticate(bearer(ALICES_SECRET), None) == ALICE
    write(file)
    served.refresh(report)
    assert served.authenticate(bearer(ALICES_SECRET), None) is None
    assert said == []


def test_a_file_that_turns_wrong_is_told_once_and_changes_nothing(file: Path) -> None:
    said, report = reports()
    write(file, ALICE)
    served = Keys.read([file])
    file.write_text("[")
    served.refresh(report)
    served.refresh(report)
    assert served.authenticate(bearer(ALICES_SECRET), None) == ALICE
    assert len(said) == 1


def test_a_file_that_comes_and_is_wrong_lets_nobody_in_until_it_is_right(file: Path) -> None:
    said, report = reports()
    served = Keys.read([file])
    file.write_text("[")
    served.refresh(report)
    assert (served.configured, len(said)) == (True, 1)
    assert served.authenticate(bearer(ALICES_SECRET), None) is None
    file.unlink()
    write(file, ALICE)
    served.refresh(report)
    assert served.authenticate(bearer(ALICES_SECRET), None) == ALICE


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, report = reports()
    write(file, ALICE)
    served = Keys.read([file])
    write(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_, **__: exhausted())
        served.refresh(report)
        served.refresh(report)
    assert len(said) == 1
    served.refresh(report)
    assert served.authenticate(bearer(ALICES_SECRET), None) is None
    assert len(said) == 1


def exhausted() -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_file_that_vanishes_does_not_open_the_door(file: Path) -> None:
    said, report = reports()
    write(file, ALICE)
    served = Keys.read([file])
    file.unlink()
    served.refresh(report)
    assert served.configured
    assert served.authenticate(bearer(ALICES_SECRET), None) == ALICE
    assert said == []


# -- The command


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setattr(keys, "group", os.getgid)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/qwen.toml").write_text('command = ["true"]\naliases = ["Qwen/Qwen3"]\n')
    return Paths(config=tmp_path, runtime=tmp_path / "run", state=tmp_path / "state")


def test_the_command_prints_a_new_key_and_nothing_else(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(paths, ["key", "add", "alice"]) == 0
    said = capsys.readouterr()
    found = Keys.read([keys.file_of(paths)]).authenticate(bearer(said.out.rstrip("\n")), None)
    assert found is not None
    assert found.name == "alice"
    assert "without a key" in said.err


def test_a_key_for_an_alias_is_one_for_its_model(paths: Paths) -> None:
    assert cli.run(paths, ["key", "add", "bob", "--model", "Qwen/Qwen3", "--model", "qwen"]) == 0
    assert [key.models for key in keys.read(keys.file_of(paths))] == [("qwen",)]


def test_a_key_for_a_model_that_is_not_there_is_refused(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(paths, ["key", "add", "bob", "--model", "qwem"]) == 3
    assert "qwen" in capsys.readouterr().err
    assert not keys.file_of(paths).exists()


def test_what_the_options_allow(paths: Paths) -> None:
    for name, options in {"a": [], "b": ["--metrics"], "c": ["--admin"]}.items():
        assert cli.run(paths, ["key", "add", name, *options]) == 0
    assert [key.rights for key in keys.read(keys.file_of(paths))] == [(Right.USE,), (Right.METRICS,), (Right.ADMIN,)]
    assert cli.run(paths, ["key", "add", "d", "--admin", "--metrics"]) == 2


def test_a_name_is_taken_once(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(paths, ["key", "add", "alice"]) == 0
    before = keys.file_of(paths).read_bytes()
    assert cli.run(paths, ["key", "add", "alice"]) == 1
    assert "gpusvc key rm alice" in capsys.readouterr().err
    assert keys.file_of(paths).read_bytes() == before


def test_the_list_has_everything_but_secrets_and_hashes(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(paths, ["key", "add", "alice", "--model", "qwen"])
    secret = capsys.readouterr().out.strip()
    assert cli.run(paths, ["key", "list"]) == 0
    assert cli.run(paths, ["key", "list", "--json"]) == 0
    said = capsys.readouterr().out
    assert "alice  use     qwen" in said
    assert secret not in said
    assert hashlib.sha256(secret.encode()).hexdigest() not in said


def test_removing_the_last_key_tells_that_nobody_is_let_in(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(paths, ["key", "add", "alice"])
    cli.run(paths, ["key", "add", "bob"])
    capsys.readouterr()
    assert cli.run(paths, ["key", "rm", "bob"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.run(paths, ["key", "rm", "alise"]) == 1
    assert "'alice'" in capsys.readouterr().err
    assert cli.run(paths, ["key", "rm", "alice"]) == 0
    assert "answers nobody" in capsys.readouterr().err
    assert keys.read(keys.file_of(paths)) == []
    assert cli.run(paths, ["key", "list"]) == 0
    assert "answers nobody" in capsys.readouterr().err


def test_before_the_package_made_its_group_no_key_is_made(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> int:
        raise GpusvcError("There is no group.", hint="Install the package.")

    monkeypatch.setattr(keys, "group", missing)
    assert cli.run(paths, ["key", "add", "alice"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "There is no group." in said.err
    assert not keys.file_of(paths).exists()


def test_the_missing_group_has_a_name_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "GROUP", "no-such-group")
    with pytest.raises(GpusvcError, match="no-such-group") as caught:
        keys.group()
    assert caught.value.hint is not None
