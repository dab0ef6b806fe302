"""Which device nodes are a model's, and which ones are not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpusvc.gpu import nodes

NVIDIA = 195


def make_node(path: Path, major: int, minor: int) -> None:
    path.parent.mkdir(exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
    except PermissionError:
        pytest.skip("device nodes cannot be made here: that takes root with CAP_MKNOD")


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Two NVIDIA cards and one of another make, with all that belongs to them."""
    for name, minor in {"nvidia0": 0, "nvidia1": 1, "nvidiactl": 255, "nvidia-modeset": 254}.items():
        make_node(tmp_path / name, NVIDIA, minor)
    for name in ("nvidia-uvm", "nvidia-uvm-tools", "kfd", "null"):
        make_node(tmp_path / name, 1, 3)
    for name in ("card0", "card1", "renderD128", "renderD129"):
        make_node(tmp_path / "dri" / name, 226, 0)
    (tmp_path / "nvidia7").write_text("no node")
    return tmp_path


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel tells which render node is that of a card."""
    devices = tmp_path / "devices"
    (devices / "0000:0a:00.0" / "drm" / "renderD129").mkdir(parents=True)
    (devices / "0000:0a:00.0" / "drm" / "card1").mkdir()
    monkeypatch.setattr(nodes, "PCI_DEVICES", devices)
    return devices


def names(found: tuple[str, ...], dev: Path) -> list[str]:
    return [str(Path(node).relative_to(dev)) for node in found]


def test_a_model_may_open_its_cards_and_what_cuda_needs_besides(dev: Path) -> None:
    assert names(nodes.of_gpus([1], [], dev=dev), dev) == ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia1"]


def test_a_card_comes_with_its_own_render_node(dev: Path, pci: Path) -> None:
    found = names(nodes.of_gpus([0], ["00000000:0A:00.0"], dev=dev), dev)
    assert found[-2:] == ["nvidia0", "dri/renderD129"]
    assert "dri/card1" not in found


def test_a_card_that_the_kernel_does_not_know_has_no_render_node(dev: Path, pci: Path) -> None:
    assert "dri" not in str(names(nodes.of_gpus([0], ["00000000:0B:00.0", ""], dev=dev), dev))


def test_a_model_without_gpus_may_open_none_of_them(dev: Path) -> None:
    assert nodes.of_gpus([], [], dev=dev) == ()


def test_nodes_that_are_not_there_are_left_out(dev: Path) -> None:
    (dev / "nvidia-uvm-tools").unlink()
    assert names(nodes.of_gpus([0, 5], [], dev=dev), dev) == ["nvidiactl", "nvidia-uvm", "nvidia0"]


def test_all_other_cards_of_any_make_are_foreign(dev: Path) -> None:
    allowed = nodes.of_gpus([0], [], dev=dev)
    cards = ["dri/card0", "dri/card1", "dri/renderD128", "dri/renderD129", "kfd", "nvidia1"]
    assert names(nodes.foreign(allowed, dev=dev), dev) == cards


def test_for_a_model_without_gpus_all_cards_are_foreign(dev: Path) -> None:
    assert {"nvidia0", "nvidia1"} <= set(names(nodes.foreign((), dev=dev), dev))


def test_what_only_controls_or_is_no_device_is_not_foreign(dev: Path) -> None:
    found = names(nodes.foreign((), dev=dev), dev)
    assert not {"nvidiactl", "nvidia-uvm", "nvidia-modeset", "nvidia7", "null"} & set(found)


def test_its_own_render_node_is_not_foreign(dev: Path, pci: Path) -> None:
    allowed = nodes.of_gpus([0], ["00000000:0A:00.0"], dev=dev)
    found = names(nodes.foreign(allowed, dev=dev), dev)
    assert "dri/renderD129" not in found
    assert "dri/renderD128" in found


def test_a_machine_without_nodes_has_none(tmp_path: Path) -> None:
    assert nodes.of_gpus([0], ["00000000:01:00.0"], dev=tmp_path) == ()
    assert nodes.foreign((), dev=tmp_path) == ()


@pytest.mark.parametrize(
    ("bus_id", "address"),
    [
        ("00000000:0A:00.0", "0000:0a:00.0"),
        ("00010000:01:00.0", "10000:01:00.0"),  # a domain of Intel's VMD
        ("0000:01:00.0", "0000:01:00.0"),
        ("", ""),
    ],
)
def test_a_pci_address_is_spelt_as_the_kernel_does(bus_id: str, address: str) -> None:
    assert nodes.pci_address(bus_id) == address


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """What the kernel tells of major numbers."""
    file = tmp_path / "devices.txt"
    file.write_text("Character devices:\n  1 mem\n195 nvidia\n  1 nvidia-uvm\n\nBlock devices:\n259 blkext\n")
    return file


def test_nodes_that_exist_and_fit_the_module_are_right(dev: Path, devices: Path) -> None:
    assert nodes.problem([0, 1], dev=dev, devices=devices) is None


def test_a_node_of_an_older_module_is_stale(dev: Path, devices: Path) -> None:
    devices.write_text("507 nvidia-uvm\n")
    found = nodes.problem([0], dev=dev, devices=devices)
    assert found is not None
    assert found[0].endswith("nvidia-uvm is stale: its major number is 1, the module's is 507.")
    assert "gpusvc-devices.service" in found[1]


@pytest.mark.parametrize("name", ["nvidia0", "nvidia-uvm"])
def test_a_missing_node_is_named(dev: Path, devices: Path, name: str) -> None:
    (dev / name).unlink()
    found = nodes.problem([0], dev=dev, devices=devices)
    assert found is not None
    assert found[0] == f"The device node {dev}/{name} is missing."


def test_without_the_module_nothing_is_said_of_its_node(dev: Path, devices: Path) -> None:
    (dev / "nvidia-uvm").unlink()
    devices.write_text("195 nvidia\n")
    assert nodes.problem([0], dev=dev, devices=devices) is None


def test_a_gpu_without_a_node_is_not_supported(dev: Path, devices: Path) -> None:
    found = nodes.problem([None], dev=dev, devices=devices)
    assert found is not None
    assert "WSL2" in found[0]


@pytest.mark.parametrize(
    "node",
    [
        "/dev/nvidia0",
        "/dev/nvidia17",
        "/dev/dri/card0",
        "/dev/dri/renderD128",
        "/dev/dri/by-path/x",
        "/dev/kfd",
        "/dev/nvidia-caps/nvidia-cap1",
    ],
)
def test_nodes_of_gpus_are_told_from_others(node: str) -> None:
    assert nodes.is_of_a_gpu(node)


@pytest.mark.parametrize("node", ["/dev/infiniband/uverbs0", "/dev/gdrdrv", "/dev/nvidia-caps-imex-channels/channel0"])
def test_other_nodes_are_not_of_gpus(node: str) -> None:
    assert not nodes.is_of_a_gpu(node)
