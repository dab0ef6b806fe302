"""SIGTERM reaches the launcher, whoever's code it happens to interrupt."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import os, signal
from gpusvc import launcher
signal.signal(signal.SIGTERM, launcher._terminate)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass  # as the set-up of a module by Cython does
try:
    signal.pause()
except launcher._TerminatedError:
    launcher._is_ending()
    print("heard")
"""


def test_a_word_to_end_that_was_swallowed_is_said_again() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("heard\n", "", 0)
