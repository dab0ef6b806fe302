"""The environment that an engine gets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gpusvc.launcher.parked import environment
from gpusvc.linux.users import User

USER = User(name="gpusvc", uid=990, gid=990, groups=(990,), home="/var/lib/gpusvc/home", shell="/usr/sbin/nologin")


def made(
    inherited: Mapping[str, str] | None = None,
    model: Mapping[str, str] | None = None,
    *,
    visible_devices: str = "0,1",
) -> dict[str, str]:
    return environment(inherited or {}, model or {}, USER, visible_devices=visible_devices, port=20123, name="qwen")


def test_it_names_the_gpus_and_tells_port_and_model() -> None:
    assert made() == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/var/lib/gpusvc/home",
        "LOGNAME": "gpusvc",
        "USER": "gpusvc",
        "SHELL": "/usr/sbin/nologin",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PORT": "20123",
        "GPUSVC_MODEL": "qwen",
    }


def test_without_gpus_none_is_visible_where_unset_would_mean_all() -> None:
    assert made(visible_devices="")["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ["PATH", "LANG", "HF_HOME", "INVOCATION_ID", "TZ"])
def test_it_has_what_the_unit_sets(name: str) -> None:
    assert made({name: "of the unit"})[name] == "of the unit"


@pytest.mark.parametrize("name", ["PATH", "HOME", "USER", "SHELL", "LANG"])
def test_the_model_file_has_the_last_word(name: str) -> None:
    assert made({name: "of the unit"}, {name: "of the model"})[name] == "of the model"


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PORT", "GPUSVC_MODEL"])
def test_what_gpusvc_decides_nobody_else_does(name: str) -> None:
    assert made({name: "of the unit"}, {name: "of the model"})[name] == made()[name]


@pytest.mark.parametrize("name", ["HOME", "LOGNAME", "USER", "SHELL"])
def test_who_it_is_comes_from_its_user_and_not_from_the_unit(name: str) -> None:
    assert made({name: "root"})[name] == made()[name]


@pytest.mark.parametrize(
    "name",
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "LISTEN_FDS", "MAINPID", "RUNTIME_DIRECTORY"],
)
def test_what_systemd_tells_the_launcher_is_not_for_the_engine(name: str) -> None:
    assert name not in made({name: "/run/systemd/notify"})
