"""Where the files of an instance are: the system's, and a user's."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from gpusvc.config.files import load_host, load_model, load_startable_model
from gpusvc.config.host import HostConfig, Isolation
from gpusvc.errors import ConfigError
from gpusvc.paths import USER_INSTANCE, Paths, is_user_instance

UID = os.getuid()
OWN = pwd.getpwuid(UID).pw_name


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Paths:
    """A user's instance, with nothing configured."""
    monkeypatch.setenv(USER_INSTANCE, "1")
    for variable, directory in (("CONFIG_HOME", "config"), ("RUNTIME_DIR", "run"), ("STATE_HOME", "state")):
        monkeypatch.setenv(f"XDG_{variable}", str(tmp_path / directory))
    paths = Paths.here()
    paths.models_directory.mkdir(parents=True)
    return paths


def test_without_a_word_in_the_environment_it_is_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(USER_INSTANCE, raising=False)
    assert not is_user_instance()
    assert Paths.here() == Paths.system()


def test_a_users_instance_follows_the_xdg_variables(user: Paths, tmp_path: Path) -> None:
    assert is_user_instance()
    assert (user.config, user.runtime, user.state) == (
        tmp_path / "config/gpusvc",
        tmp_path / "run/gpusvc",
        tmp_path / "state/gpusvc",
    )
    assert user.unit_directory == tmp_path / "run/systemd/user"


def test_variables_that_are_missing_or_relative_leave_the_defaults() -> None:
    paths = Paths.user({"HOME": "/home/alice", "XDG_CONFIG_HOME": "relative", "XDG_STATE_HOME": ""})
    assert paths.host_file == Path("/home/alice/.config/gpusvc/gpusvc.toml")
    assert paths.state == Path("/home/alice/.local/state/gpusvc")
    assert paths.runtime == Path(f"/run/user/{UID}/gpusvc")


@pytest.mark.skipif(UID != 0, reason="gives a directory to another user: needs root")
def test_the_runtime_directory_of_another_user_is_not_used(tmp_path: Path) -> None:
    environment = {"HOME": "/root", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert Paths.user(environment).runtime == tmp_path / "gpusvc"
    os.chown(tmp_path, 65534, 65534)
    assert Paths.user(environment).runtime == Path("/run/user/0/gpusvc")


def test_the_control_group_is_below_the_users_manager(user: Paths) -> None:
    assert user.control_group == f"/user.slice/user-{UID}.slice/user@{UID}.service/gpusvc.slice"


def test_no_two_instances_share_a_directory(user: Paths) -> None:
    system = Paths.system()
    assert not {user.config, user.runtime, user.state} & {system.config, system.runtime, system.state}


def test_a_user_cannot_require_what_his_manager_cannot_do(user: Paths) -> None:
    assert HostConfig().isolation is load_host(user).isolation is Isolation.BEST_EFFORT
    user.host_file.write_text('isolation = "required"\n')
    with pytest.raises(ConfigError, match="systemd filters no devices"):
        load_host(user)


def test_a_users_model_runs_as_himself_and_as_nobody_else(user: Paths) -> None:
    user.model_file("qwen").write_text('command = ["/bin/true"]\n')
    assert load_model(user, "qwen", load_host(user)).user == OWN
    user.model_file("qwen").write_text('user = "nobody"\ncommand = ["/bin/true"]\n')
    with pytest.raises(ConfigError, match=f"A model of {OWN} runs as {OWN}"):
        load_startable_model(user, "qwen", load_host(user))
