"""A launcher of version 0.1.0 has the old modules in memory, and imports the new gpusvc.systemd when it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What 0.1.0 defines in its root modules that still have the same name. No other name of them exists in its memory.
OLD = {
    "errors": (
        "GpusvcError UsageError ConfigError UnknownModelError PermissionDeniedError BusyError EngineError NvmlError "
        "IsolationError UnreleasedError SystemdError UnansweredError JobConflictError"
    ),
    "paths": "Paths is_user_instance",
    "names": "SLICE service proof scope of_service of_scope is_name parse_name",
    "log": "log",
    "printable": "printable",
    "backoff": "Backoff",
}

PROCESS = f"""
import importlib.abc, sys, types

OLD = {OLD!r}
package = types.ModuleType("gpusvc")
package.__path__ = [{str(ROOT / "gpusvc")!r}]
sys.modules["gpusvc"] = package
for name, defined in OLD.items():
    module = types.ModuleType("gpusvc." + name)
    for each in defined.split():
        kind = type(each, (Exception,), {{}}) if each.endswith("Error") else (lambda *_, **__: False)
        setattr(module, each, kind)
    sys.modules[module.__name__] = module
    setattr(package, name, module)


class OnlySystemd(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("gpusvc.") and not (name + ".").startswith("gpusvc.systemd."):
            raise ImportError(f"0.1.0 has no {{name}}")


sys.meta_path.insert(0, OnlySystemd())
from gpusvc.systemd import Manager

print(Manager.__module__)
"""


def test_a_launcher_of_the_first_version_can_import_the_manager_when_it_ends() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("gpusvc.systemd.manager", "")
