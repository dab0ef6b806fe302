"""The modules that every start of a model imports before it asks for its scope: each one delays the start."""

from __future__ import annotations

import subprocess
import sys

# Heavy modules that a normal start does without, with what they are for.
ABSENT = {
    "argparse": "the command",
    "ast": "dataclasses",
    "asyncio": "servers",
    "copy": "dataclasses",
    "ctypes": "the parked process and NVML import it themselves",
    "dataclasses": "generated classes; gpusvc.record has the same in microseconds",
    "difflib": "hints for wrong names",
    "dis": "dataclasses",
    "email": "HTTP",
    "grp": "only the system's launcher asks for the group, after the import",
    "hashlib": "libcrypto",
    "http": "HTTP",
    "inspect": "dataclasses",
    "logging": "gpusvc.log",
    "psutil": "readings after the first second",
    "pystemd": "the bus, once the model has a place",
    "resource": "the end of an engine by a signal",
    "subprocess": "the last words of an engine",
    "tempfile": "drafts have fixed names",
    "threading": "there are none",
    "gpusvc.journal.lastwords": "the end of an engine",
    "gpusvc.launcher.caller": "gpusvc run",
    "gpusvc.launcher.confinement": "the parked process, while the launcher reads its configuration",
    "gpusvc.launcher.ending": "the end of an engine",
    "gpusvc.launcher.oom": "the end of an engine",
    "gpusvc.launcher.scope": "the bus, once the model has a place",
    "gpusvc._vendor": "NVML, for a model with GPUs",
}

# gpusvc's own; more of them is a decision, to be taken here.
MOST_MODULES = 72


def imported() -> set[str]:
    """The modules in memory after the import of the launcher, without those that Python itself starts with."""
    program = (
        "import sys; before = set(sys.modules); import gpusvc.launcher.launch; print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_a_start_imports_nothing_that_it_does_not_need() -> None:
    assert imported() & ABSENT.keys() == set()


def test_a_start_imports_few_modules_of_gpusvc() -> None:
    own = {module for module in imported() if module.startswith("gpusvc.")}
    assert len(own) <= MOST_MODULES, sorted(own)
