"""When the engine's output is in the journal."""

from __future__ import annotations

import os
import subprocess

from gpusvc.journal import relay


def test_a_relay_that_runs_on_is_waited_for_no_longer_than_was_said() -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(["cat"], stdin=reading, stdout=subprocess.DEVNULL) as cat:
        assert not relay.has_ended(cat.pid, 0.01)
        os.close(writing)
        os.close(reading)
        assert relay.has_ended(cat.pid, 30)


def test_a_relay_that_is_long_gone_has_ended() -> None:
    with subprocess.Popen(["true"]) as done:
        done.wait()
    assert relay.has_ended(done.pid, 0)
