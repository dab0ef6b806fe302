"""The launcher at its end, and where it cannot even begin."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import os, signal
from gpusvc.launcher import launch as launcher
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


_NO_PROCESS = """
import errno, os, sys
def fork():
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = fork
sys.argv = ["launcher", "qwen"]
from gpusvc.launcher import launch as launcher
launcher.main()
"""


def test_a_machine_without_a_process_to_spare_is_told_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", _NO_PROCESS], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "The launcher failed: [Errno 11] Resource temporarily unavailable." in done.stderr
    assert "Traceback" not in done.stderr
