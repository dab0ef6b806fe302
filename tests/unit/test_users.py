"""The groups with which an engine runs."""

from __future__ import annotations

import grp

import pytest

from gpusvc.errors import ConfigError
from gpusvc.linux.users import User

GROUPS = {"users": 100, "gpusvc": 990, "video": 44}


@pytest.fixture(autouse=True)
def known_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", GROUPS[name], [])))


def user(primary: str, *others: str) -> User:
    groups = tuple(GROUPS[name] for name in (primary, *others))
    return User("me", 1000, GROUPS[primary], groups, "/home/me", "/bin/sh")


def test_an_engine_is_no_member_of_the_group_whoever_its_user_is() -> None:
    assert user("users", "gpusvc", "video").without_group("gpusvc") == user("users", "video")


def test_a_user_whose_primary_group_it_is_runs_no_engine() -> None:
    with pytest.raises(ConfigError, match="primary group of me is gpusvc") as caught:
        user("gpusvc", "video").without_group("gpusvc")
    assert "usermod --gid" in str(caught.value.hint)


def test_a_group_that_does_not_exist_has_no_members() -> None:
    assert user("users", "video").without_group("gone") == user("users", "video")
