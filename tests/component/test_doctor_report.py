"""The report of `gpusvc doctor --report` has what a maintainer needs, and nothing that is secret."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from gpusvc.doctor import report
from gpusvc.doctor.finding import warning
from gpusvc.doctor.report import compose
from gpusvc.gpu.reading import Gpu, GpuProcess
from gpusvc.paths import Paths
from gpusvc.systemd.units import ActiveState, Unit

GIB = 1 << 30
SECRET = "hf_0123456789"

MODEL = f"""
command = ["/opt/engine/bin/serve", "--api-key", "{SECRET}", "--port", "{{port}}"]
description = "{SECRET}"
[env]
HF_TOKEN = "{SECRET}"
[gpu]
count = 1
vram = "9GiB"
"""

GPU = Gpu(
    index=0,
    uuid=f"GPU-{SECRET}",
    name="NVIDIA H200",
    minor=3,
    pci_bus_id="00000000:01:00.0",
    total_bytes=141 * GIB,
    used_bytes=9 * GIB,
    free_bytes=132 * GIB,
    processes=(GpuProcess(1, 9 * GIB),),
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "lib")
    made.models_directory.mkdir(parents=True)
    made.model_file("secret-project").write_text(MODEL)
    made.model_file("broken").write_text("comand = 1")
    (made.config / "keys.toml").write_text(f'laptop = "{SECRET}"')
    return made


def parts(report: str) -> dict[str, Any]:
    found = {}
    for part in report.split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        found[title] = json.loads(rest.split("```json\n")[1].split("\n```")[0])
    return found


def test_no_secret_and_no_name_is_in_it(paths: Paths) -> None:
    node = platform.node()
    found = [warning("files", f"{paths.config}/models/secret-project.toml on {node} is wrong.", "secret-project: x")]
    found += [warning("units", f"model@secret-project.service on {node} failed.", str(paths.config))]
    text = compose(paths, found, [GPU])
    for word in (SECRET, "secret-project", "HF_TOKEN", "--api-key", "laptop", str(paths.config), f" {node} "):
        assert word not in text, word


def test_it_has_the_gpus_the_findings_and_what_the_models_ask_for(paths: Paths) -> None:
    found = parts(compose(paths, [warning("gpus", "GPU 0 is wrong.", "evidence", "remedy")], [GPU]))
    assert set(found) == {"Machine", "Findings", "GPUs", "GPUs that hang", "Models", "Units"}
    assert found["Findings"] == [
        {"subject": "gpus", "level": "warning", "sentence": "GPU 0 is wrong.", "evidence": "evidence", "fix": "remedy"}
    ]
    (gpu,) = found["GPUs"]
    assert (gpu["name"], gpu["minor"], gpu["processes"]) == ("NVIDIA H200", 3, 1)
    broken, secret = found["Models"]
    assert broken == {"model": "model 1", "configuration": "cannot be read"}
    assert (secret["engine"], secret["count"], secret["env"]) == ("serve", 1, 1)


def test_a_unit_without_a_file_is_not_named(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def version(self) -> str:
            return "257"

        def units(self, *_: str) -> list[Unit]:
            names = ("model@secret-project.service", "model@hidden-project.service", "gpusvc-api.service")
            return [Unit(name, ActiveState.FAILED, "failed", "/unit") for name in names]

    monkeypatch.setattr(report, "Manager", Fake)
    units = parts(compose(paths, [], []))["Units"]
    assert [unit["unit"] for unit in units] == ["model 2", "model without a file", "gpusvc-api.service"]
