"""What people call models on a hub, which files that means, and what a removal may take along."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.cli.commands.pull import bar, where_it_fits
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.gpu.reading import Gpu
from gpusvc.hub import usage
from gpusvc.hub.reference import HubReference, UrlReference, parse, safe_path
from gpusvc.hub.selection import RemoteFile, select
from gpusvc.quantity import GIB

DIGEST = "a" * 64

# ---- references ----


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("hf:o/r", HubReference("o", "r")),
        ("hf://o/r", HubReference("o", "r")),
        ("hf:o/r:Q4_K_M", HubReference("o", "r", tag="Q4_K_M")),
        ("hf:o/r@v2:Q8_0", HubReference("o", "r", revision="v2", tag="Q8_0")),
        ("hf:o/r/a/b.gguf", HubReference("o", "r", path="a/b.gguf")),
        ("huggingface://o/r/b.gguf", HubReference("o", "r", path="b.gguf")),
        ("https://huggingface.co/o/r", HubReference("o", "r")),
        ("https://huggingface.co/o/r/tree/v2", HubReference("o", "r", revision="v2")),
        ("https://huggingface.co/o/r/resolve/main/a/b.gguf?download=true", HubReference("o", "r", path="a/b.gguf")),
        ("https://example.org/x/m.gguf?a=b", UrlReference("https://example.org/x/m.gguf?a=b", "example.org", "m.gguf")),
    ],
)
def test_a_reference_is_understood(text: str, meaning: object) -> None:
    assert parse(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qwen",
        "hf:",
        "hf:o",
        "hf:o/",
        "hf:../r",
        "hf:o/r:",
        "hf:o/r/../../x.gguf",
        "hf:o/r/.hidden",
        "hf:o/r/a.gguf:Q4_0",
        "hf:o/r\x1b[31m",
        "https://",
        "https://example.org",
        "https://example.org/",
        "https://me:secret@example.org/m.gguf",
        "http://example.org/m.gguf",
        "https://huggingface.co/o",
        "ftp://example.org/m.gguf",
    ],
)
def test_what_is_no_reference_is_a_wrong_usage(text: str) -> None:
    if text == "hf:o/r:":
        assert parse(text) == HubReference("o", "r")
        return
    with pytest.raises(UsageError):
        parse(text)


def test_an_unencrypted_address_needs_the_hash_of_the_file() -> None:
    found = parse("http://example.org/m.gguf", sha256=DIGEST)
    assert isinstance(found, UrlReference)
    assert found.sha256 == DIGEST
    with pytest.raises(UsageError, match="SHA-256"):
        parse("https://example.org/m.gguf", sha256="abc")


@given(st.text(max_size=60))
def test_any_word_is_a_reference_or_a_wrong_usage(text: str) -> None:
    for word in (text, f"hf:{text}", f"https://{text}", f"https://huggingface.co/{text}"):
        try:
            found = parse(word)
        except UsageError:
            continue
        except ValueError:
            pytest.fail(f"{word!r} raises ValueError")
        assert isinstance(found, HubReference | UrlReference)
        assert safe_path(found.name if isinstance(found, UrlReference) else found.path or "x")


# ---- selection ----


def listing(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1000 + number) for number, path in enumerate(paths)]


def chosen(files: list[RemoteFile], **wanted: str) -> list[str]:
    return [file.path for file in select(files, **wanted).files]


GGUFS = listing("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-IQ2_XS.gguf", "README.md", "m.imatrix.gguf")


def test_the_usual_quantisation_is_taken() -> None:
    assert chosen(GGUFS) == ["m-Q4_K_M.gguf"]
    assert select(GGUFS).main == "m-Q4_K_M.gguf"


def test_a_quantisation_can_be_named_in_any_case() -> None:
    assert chosen(GGUFS, tag="iq2_xs") == ["m-IQ2_XS.gguf"]


def test_a_part_of_a_quantisation_is_not_one() -> None:
    with pytest.raises(UsageError, match="There is no Q4_K") as refusal:
        select(GGUFS, tag="Q4_K")
    assert "Q8_0 (1000 B)" in str(refusal.value.hint)


def test_a_split_model_is_taken_whole_and_an_incomplete_one_not_at_all() -> None:
    parts = [f"BF16/m-BF16-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert chosen(listing(*parts), tag="BF16") == parts
    assert chosen(listing(*parts), path=parts[2]) == parts
    with pytest.raises(UsageError):
        select(listing(*parts[:2], "m-IQ3_S.gguf", "m-IQ3_M.gguf"), tag="BF16")


def test_a_projector_comes_along() -> None:
    files = listing("m-Q4_0.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf")
    assert chosen(files) == ["m-Q4_0.gguf", "mmproj-F16.gguf"]
    assert chosen(files, path="mmproj-BF16.gguf") == ["mmproj-BF16.gguf"]


def test_without_gguf_the_directory_of_safetensors_is_taken() -> None:
    files = listing(
        "config.json", "model.safetensors", "consolidated.safetensors", "tokenizer.model", "onnx/m.onnx", "a.png"
    )
    assert chosen(files) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert select(files).main == ""


def test_a_repository_without_a_model_is_refused() -> None:
    for files in ([], listing("README.md"), listing("model.safetensors")):
        with pytest.raises(UsageError):
            select(files)


def test_several_unusual_quantisations_ask_for_a_choice() -> None:
    with pytest.raises(UsageError, match="several models") as refusal:
        select(listing("a-IQ1_S.gguf", "b-IQ1_M.gguf"))
    assert "IQ1_M" in str(refusal.value.hint)


def test_paths_that_lead_out_of_the_repository_are_never_chosen() -> None:
    evil = listing("../../etc/cron.d/x.gguf", "/etc/x.gguf", "a/../x.gguf", ".ssh/x.gguf", "m-Q4_0.gguf")
    assert chosen(evil) == ["m-Q4_0.gguf"]


@given(st.lists(st.text(max_size=40), max_size=8), st.sampled_from([None, "Q4_0", "(", "*"]))
def test_any_listing_gives_a_selection_of_its_files_or_a_refusal(paths: list[str], tag: str | None) -> None:
    files = listing(*paths, *(f"{path}.gguf" for path in paths))
    try:
        found = select(files, tag=tag)
    except GpusvcError:
        return
    assert set(found.files) <= set(files)
    assert all(safe_path(file.path) for file in found.files)


# ---- which files a removal takes ----


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name in ("o/r/a.gguf", "o/r/b.gguf", "o/r/mm.gguf", "o/s/x-00001-of-00002.gguf", "o/s/x-00002-of-00002.gguf"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "o/r/.a.gguf.digest").write_text("x")
    return root


def test_only_named_files_count_and_parts_count_together(downloads: Path) -> None:
    text = f'model = "{downloads}/o/r/a.gguf"\nargs = ["--mmproj", "{downloads}/o/r/mm.gguf"]'
    assert usage.only_in(downloads, text, []) == ["o/r/a.gguf", "o/r/mm.gguf"]
    split = f'model = "{downloads}/o/s/x-00001-of-00002.gguf"'
    assert usage.only_in(downloads, split, []) == ["o/s/x-00001-of-00002.gguf", "o/s/x-00002-of-00002.gguf"]


def test_what_another_model_names_stays(downloads: Path) -> None:
    text = f'model = "{downloads}/o/r/a.gguf"\nargs = ["--mmproj={downloads}/o/r/mm.gguf"]'
    assert usage.only_in(downloads, text, [f'command = ["x", "{downloads}/o/r/mm.gguf"]']) == ["o/r/a.gguf"]
    assert usage.only_in(downloads, text, [f'model = "{downloads}/o/r"']) == []


def test_a_folder_means_all_of_it_and_a_longer_name_something_else(downloads: Path) -> None:
    assert len(usage.only_in(downloads, f'model = "{downloads}/o/r/"', [])) == 3
    assert usage.only_in(downloads, f'model = "{downloads}/o/r/a.gguf.old"', []) == []
    assert usage.only_in(downloads, 'model = "/srv/a.gguf"', []) == []


# ---- what is said ----


def gpu(index: int, total: int, free: int) -> Gpu:
    return Gpu(index, f"GPU-{index}", "card", index, "0", total * GIB, (total - free) * GIB, free * GIB)


def test_the_gpu_with_room_is_named() -> None:
    gpus = [gpu(0, 24, 3), gpu(1, 24, 20)]
    assert where_it_fits(gpus, 8 * GIB) == "It fits on GPU 1 (card), which has 20.0 GiB free."
    assert "once others leave: 20.0 GiB of 24.0 GiB" in where_it_fits(gpus, 22 * GIB)
    assert where_it_fits(gpus, 48 * GIB) == "No GPU here is large enough for all of it."


def test_a_bar_shows_share_amount_rate_and_time_left() -> None:
    assert bar(GIB, 4 * GIB, GIB / 60) == ("[######                  ]  25%  1.0 GiB of 4.0 GiB  17.1 MiB/s  3:00 left")
    assert bar(0, 0, None).startswith("[                        ]   0%")
