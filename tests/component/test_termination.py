"""The end of the launcher's own process."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import os, signal
from gpusvc.launcher import termination
signal.signal(signal.SIGTERM, termination.on_sigterm)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass  # as the set-up of a module by Cython does
try:
    signal.pause()
except termination.TerminatedError:
    termination.end_quietly()
    print("heard")
"""


def test_a_sigterm_whose_exception_was_swallowed_is_repeated() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("heard\n", "", 0)


_IN_A_CALLBACK = """
import os, signal, weakref
from gpusvc.launcher import termination
signal.signal(signal.SIGTERM, termination.on_sigterm)
class Thing: pass
def gone(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
thing = Thing()
reference = weakref.ref(thing, gone)
del thing
try:
    signal.pause()
except termination.TerminatedError:
    termination.end_quietly()
    print("heard")
def wrong(_):
    raise ValueError("another error")
thing = Thing()
reference = weakref.ref(thing, wrong)
del thing
"""


def test_a_sigterm_in_a_callback_is_repeated_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_CALLBACK], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.stdout, done.returncode) == ("heard\n", 0)
    assert "TerminatedError" not in done.stderr
    assert "another error" in done.stderr


_NO_PROCESS = """
import errno, os, sys
def fork():
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = fork
sys.argv = ["launcher", "qwen"]
from gpusvc.launcher import launch
launch.main()
"""


def test_a_machine_without_a_process_to_spare_is_told_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", _NO_PROCESS], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "The launcher failed: [Errno 11] Resource temporarily unavailable." in done.stderr
    assert "Traceback" not in done.stderr
