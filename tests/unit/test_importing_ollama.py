"""Ollama's store as model files."""

from __future__ import annotations

import hashlib
import json
import struct
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gpusvc.errors import ConfigError
from gpusvc.importing import ollama
from gpusvc.importing.draft import Import, by_kind
from tests.engines import tinygguf

MEDIA = "application/vnd.ollama.image."


class Store:
    """A store of Ollama's, as it lies on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)
        (root / "manifests").mkdir()

    def blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(content)
        return f"sha256:{digest}"

    def add(self, name: str, *more: tuple[str, bytes], **layers: bytes) -> Path:
        """A model by HOST/NAMESPACE/MODEL/TAG, with one layer of each kind, and more of some."""
        listed = [
            {"mediaType": MEDIA + kind, "digest": self.blob(content), "size": len(content)}
            for kind, content in (*layers.items(), *more)
        ]
        file = self.root / "manifests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": listed}))
        return file

    def convert(self) -> Import:
        return ollama.convert(ollama.read(self.root), self.root)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tinygguf.write(file)
    return file.read_bytes()


def files(found: Import) -> dict[str, dict[str, Any]]:
    return {draft.name: tomllib.loads(draft.text()) for draft in found.drafts}


def test_a_model_is_its_blob_and_its_parameters(store: Store, weights: bytes) -> None:
    parameters = {"temperature": 0.6, "num_ctx": 8192, "num_gpu": 20, "num_predict": -1, "seed": 1, "stop": ["</s>"]}
    store.add(
        "registry.ollama.ai/library/tiny/latest",
        model=weights,
        template=b"{{ .Prompt }}",
        system=b"Be kind.",
        params=json.dumps(parameters).encode(),
        license=b"MIT",
    )
    found = store.convert()
    made = files(found)["tiny"]
    blob = Path(made.pop("model"))
    assert (blob.parent, blob.read_bytes()) == (store.root / "blobs", weights)
    assert made == {
        "engine": "llama-server",
        "args": ["-c", "8192", "-ngl", "20", "--temp", "0.6", "--seed", "1"],
        "aliases": ["tiny:latest"],
    }
    assert {(note.model, note.key) for note in found.notes} == {
        ("tiny", "params.stop"),
        ("tiny", "template"),
        ("tiny", "system"),
        (None, "blobs"),
    }


def test_a_model_is_called_as_ollama_shows_it(store: Store, weights: bytes) -> None:
    for name in (
        "registry.ollama.ai/library/llama3.2/1b",
        "registry.ollama.ai/ada/mine/latest",
        "hf.co/org/Repo-GGUF/Q4_K_M",
    ):
        store.add(name, model=weights)
    made = files(store.convert())
    assert {name: file.get("aliases") for name, file in made.items()} == {
        "llama3.2:1b": None,
        "mine": ["ada/mine:latest", "ada/mine"],
        "Repo-GGUF:Q4_K_M": ["hf.co/org/Repo-GGUF:Q4_K_M"],
    }


def test_a_projector_and_an_adapter_are_given_to_the_engine(store: Store, weights: bytes) -> None:
    store.add("registry.ollama.ai/library/sees/7b", model=weights, projector=b"GGUF p", adapter=b"GGUF a")
    arguments = files(store.convert())["sees:7b"]["args"]
    assert arguments[::2] == ["--mmproj", "--lora"]
    assert [Path(path).read_bytes() for path in arguments[1::2]] == [b"GGUF p", b"GGUF a"]


def described(architecture: str, **keys: int) -> bytes:
    """A GGUF file without tensors."""
    texts = b"".join(text(f"{architecture}.{key}") + struct.pack("<II", 4, value) for key, value in keys.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(keys))
    return head + text("general.architecture") + struct.pack("<I", 8) + text(architecture) + texts


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "args"),
    [
        (described("nomic-bert"), ["--embeddings"]),
        (described("gemma-embedding"), ["--embeddings"]),
        (described("qwen3", pooling_type=3), ["--embeddings"]),
        (described("qwen3", pooling_type=4), ["--reranking"]),
        (described("bert", pooling_type=4), ["--reranking"]),
        (described("qwen3", pooling_type=0), None),
        (described("llama"), None),
    ],
)
def test_a_model_of_embeddings_is_served_as_one(store: Store, content: bytes, args: list[str] | None) -> None:
    store.add("registry.ollama.ai/library/m/1b", model=content)
    assert files(store.convert())["m:1b"].get("args") == args


def test_a_draft_model_is_given_to_the_engine(store: Store, weights: bytes) -> None:
    store.add("registry.ollama.ai/library/m/1b", ("draft", b"GGUF e"), model=weights, draft=b"GGUF d")
    found = store.convert()
    option, path = files(found)["m:1b"]["args"]
    assert (option, Path(path).read_bytes()) == ("--model-draft", b"GGUF d")
    assert "draft" in {note.key for note in found.notes if note.model == "m:1b"}


def test_a_second_layer_of_weights_is_named(store: Store, weights: bytes) -> None:
    store.add("registry.ollama.ai/library/m/1b", ("model", weights + b"x"), model=weights)
    found = store.convert()
    assert (found.drafts, "several layers of weights" in found.notes[0].reason) == ((), True)


def test_a_context_that_is_not_said_is_named_once_for_all(store: Store, weights: bytes) -> None:
    for name in ("a", "b"):
        store.add(f"registry.ollama.ai/library/{name}/latest", model=weights)
    store.add("registry.ollama.ai/library/c/latest", model=weights, params=b'{"num_ctx": 4096}')
    (line,) = [line for line in by_kind(store.convert().notes) if "num_ctx" in line]
    assert line.startswith("a, b: params.num_ctx: ")


@pytest.mark.parametrize(
    "manifest",
    [
        "no JSON",
        "[]",
        '{"layers": []}',
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}]}',
        json.dumps({"layers": [{"mediaType": f"{MEDIA}model", "digest": f"sha256:{'0' * 64}"}]}),
        "[" * 100_000,
    ],
)
def test_a_model_that_cannot_be_read_is_left_out_and_named(store: Store, weights: bytes, manifest: str) -> None:
    store.add("registry.ollama.ai/library/good/1b", model=weights)
    store.add("registry.ollama.ai/library/bad/1b").write_text(manifest)
    found = store.convert()
    assert list(files(found)) == ["good:1b"]
    assert [note.key for note in found.notes if note.model == "bad:1b"] == ["model"]


def test_weights_that_are_no_gguf_are_named(store: Store) -> None:
    store.add("registry.ollama.ai/library/other/1b", model=b"safetensors")
    assert store.convert().drafts == ()


def test_the_store_is_found_in_its_surroundings(tmp_path: Path) -> None:
    Store(tmp_path / ".ollama/models")
    assert ollama.root_of(tmp_path) == ollama.root_of(tmp_path / ".ollama") == tmp_path / ".ollama/models"


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a store of Ollama"):
        ollama.root_of(tmp_path)
