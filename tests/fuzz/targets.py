"""What must hold for any bytes: of each parser an error that it declares or a result, the same however it is cut."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpusvc.config import files as config
from gpusvc.config import keys
from gpusvc.config.host import HostConfig
from gpusvc.errors import GpusvcError
from gpusvc.gateway.body.fields import FieldScanner
from gpusvc.gateway.body.multipart import FormScanner, boundary_of
from gpusvc.gateway.body.search import find_model
from gpusvc.gateway.http import request_head, response_head
from gpusvc.gateway.http.chunks import BadChunkError, Chunks
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.ollama import answers, members, questions
from gpusvc.gateway.ollama import pieces as pieces_of_answers
from gpusvc.gateway.ollama.answers import Answer, Times
from gpusvc.gateway.ollama.events import Events
from gpusvc.gateway.ollama.pieces import EngineError
from gpusvc.gateway.ollama.questions import Form, Question
from gpusvc.journal import eventlog
from gpusvc.paths import Paths
from gpusvc.printable import printable
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease, LeasedGpu
from gpusvc.weights import estimate as weights
from gpusvc.weights import gguf

# Longer than anything that a parser treats in another way for its length alone, but for what counts in mebibytes.
LONGEST_BYTES = 1 << 14

_BOUNDARY = b"x"


@dataclass(frozen=True, slots=True)
class Target:
    """A parser.

    ``check`` raises AssertionError, or whatever else, for input that breaks a promise, and says whether the parser took
    it. It takes ``seeds``.
    """

    check: Callable[[bytes], bool]
    seeds: Sequence[bytes]


def _cut(data: bytes) -> tuple[bytes, Sequence[bytes]]:
    """The input but for its first byte, and that in pieces as the first byte says."""
    size = data[0] % 32 + 1 if data else 1
    rest = data[1:]
    return rest, [rest[at : at + size] for at in range(0, len(rest), size)]


def fields(data: bytes) -> bool:
    """The scanner of JSON bodies: read alike in pieces, and as json.loads() reads what that accepts."""
    body, pieces = _cut(data)
    whole, cut = FieldScanner(), FieldScanner()
    whole.feed(body, past_model=True)
    for piece in pieces:
        cut.feed(piece, past_model=True)
    seen = [(one.model, one.stream, one.problem, one.members, one.closed) for one in (whole, cut)]
    assert seen[0] == seen[1]
    assert find_model(body) in (None, whole.model)
    try:
        members = json.loads(body.decode("utf-8-sig"), object_pairs_hook=list)
    except (ValueError, RecursionError):
        return False
    if not isinstance(members, list) or not body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    first = next((value for name, value in members if name == "model"), None)
    if whole.problem is None and whole.settled:
        assert whole.model == first
    return whole.model is not None


def form(data: bytes) -> bool:
    """The scanner of forms: read alike in pieces."""
    body, pieces = _cut(data)
    whole, cut = FormScanner(_BOUNDARY), FormScanner(_BOUNDARY)
    whole.feed(body)
    for piece in pieces:
        cut.feed(piece)
    seen = [(one.model, one.stream, one.problem, one.model_span, one.closed) for one in (whole, cut)]
    assert seen[0] == seen[1]
    if whole.model is not None and whole.model_span is not None:
        start, end = whole.model_span
        assert body[start:end].decode() == whole.model
    boundary_of(b"multipart/form-data; " + body)
    return whole.model is not None


def request(data: bytes) -> bool:
    """A request's head: refused, or without anything that another server could read in another way."""
    try:
        read = request_head.read_request(data + b"\r\n\r\n", Limits())
    except HttpError:
        return False
    assert b"\n" not in read.method + read.target
    assert b"\0" not in read.target
    return True


def response(data: bytes) -> bool:
    """An answer's head: refused, or a status."""
    try:
        read = response_head.read_response(data + b"\r\n\r\n", Limits())
    except response_head.BadResponseError:
        return False
    assert 100 <= read.status <= 999
    return True


def chunks(data: bytes) -> bool:
    """Chunked bodies: read alike in pieces."""
    body, pieces = _cut(data)
    results: list[object] = []
    for parts in ([body], pieces):
        reader, payload, left = Chunks(), b"", b""
        try:
            for part in parts:
                if reader.ended:
                    left += part
                    continue
                payload += reader.feed(part)
                left += reader.left if reader.ended else b""
        except BadChunkError:
            results.append(None)
            continue
        results.append((reader.ended, payload if reader.ended else b"", left, list(reader.trailers)))
    assert results[0] == results[1]
    return results[0] is not None


def ollama(data: bytes) -> bool:
    """Requests of Ollama's API: a question that engines can be asked, or a refusal."""
    try:
        asked = members.read(data)
    except HttpError:
        return False
    is_taken = False
    for form in Form:
        try:
            question = questions.read(form, asked)
        except HttpError:
            continue
        is_taken = True
        for attempt in question.attempts:
            json.dumps(attempt.body)
        ", ".join(question.ignored).encode("ascii")
    return is_taken


def answer(data: bytes) -> bool:
    """An engine's stream for a client of Ollama's API: read alike in pieces, and lines or one error."""
    stream, pieces = _cut(data)
    whole, cut = Events(), Events()
    found = [*whole.feed(stream), *whole.end()]
    assert found == [*(event for piece in pieces for event in cut.feed(piece)), *cut.end()]
    made = Answer(Question(Form.CHAT, "qwen", (), True, None), Times(0))
    try:
        for event in found:
            if event != b"[DONE]" and (value := made.part(pieces_of_answers.read(event), 0.0)) is not None:
                answers.line(value)
        lines = [answers.line(value) for value in made.end(0.0)]
    except EngineError:
        return False
    return bool(found) and json.loads(lines[-1])["done"] is True


def metadata(data: bytes) -> bool:
    """The head of a GGUF file, and what is estimated from it."""
    with tempfile.TemporaryDirectory(dir=_FAST) as directory:
        file = Path(directory, "model.gguf")
        file.write_bytes(data)
        with contextlib.suppress(ValueError):
            gguf.read_metadata(file)
        weights.estimate(["llama-server", "-m", str(file), "-ncmoe", "1", "-ngl", "2"], {})
        return weights.estimate(["llama-server", "-m", str(file), "-c", "4096"], {}) is not None


def safetensors(data: bytes) -> bool:
    """The configuration of a model of Hugging Face's beside its weights."""
    with tempfile.TemporaryDirectory(dir=_FAST) as name:
        directory = Path(name)
        (directory / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        (directory / "config.json").write_bytes(data)
        return weights.estimate(["vllm", "serve", str(directory)], {}) is not None


def model_file(data: bytes) -> bool:
    """A model's file: a configuration, or one error that can be shown."""
    with tempfile.TemporaryDirectory(dir=_FAST) as name:
        paths = _paths(Path(name))
        paths.model_file("qwen").write_bytes(data)
        config.check(paths)
        return _is_taken(lambda: config.load_model(paths, "qwen", HostConfig()))


def key_file(data: bytes) -> bool:
    """The keys of clients."""
    with tempfile.TemporaryDirectory(dir=_FAST) as name:
        paths = _paths(Path(name))
        keys.file_of(paths).write_bytes(data)
        return _is_taken(lambda: keys.read(keys.file_of(paths)))


def lease(data: bytes) -> bool:
    """A lease, which decides what is killed."""
    with tempfile.TemporaryDirectory(dir=_FAST) as name:
        paths = _paths(Path(name))
        paths.lease_file("qwen").write_bytes(data)
        try:
            held = leases.read(paths, "qwen")
        except BrokenLeaseError:
            return False
        assert held is not None
        assert held.model == "qwen"
        assert held.cgroup is None or held.cgroup.endswith(f"/{held.scope}")
        return True


def event(data: bytes) -> bool:
    """A line of the journal: an event whose sentence steers no terminal, or none."""
    found = eventlog.parse(data)
    if found is not None:
        assert printable(found.message).isprintable()
    return found is not None


def _is_taken(read: Callable[[], object]) -> bool:
    """What is not has an error that can be shown."""
    problem = None
    try:
        read()
    except GpusvcError as error:
        problem = str(error)
    assert problem is None or all(printable(line).isprintable() for line in problem.split("\n"))
    return problem is None


def _paths(directory: Path) -> Paths:
    paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "lib")
    for made in (paths.models_directory, paths.lease_directory("qwen")):
        made.mkdir(parents=True)
    return paths


# Thousands of files a second are for no disk.
_FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None

# Good input.

_FORM = b"""\x05--x\r
Content-Disposition: form-data; name="model"\r
\r
qwen\r
--x\r
Content-Disposition: form-data; name="file"; filename="a"\r
\r
RIFF\r
--x--\r
"""

_POST = b"""POST /v1/chat/completions?x=1 HTTP/1.1\r
Host: a:1\r
Content-Length: 2\r
Authorization: Bearer k"""

_GET = b"""GET / HTTP/1.1\r
Host: a\r
Connection: keep-alive, x\r
X: y\r
Transfer-Encoding: chunked\r
Expect: 100-continue"""

_GGUF = (
    b"GGUF\x03\0\0\0" + bytes(8) + b"\x02" + bytes(7)
    + b"\x14" + bytes(7) + b"general.architecture" + b"\x08\0\0\0" + b"\x05" + bytes(7) + b"llama"
    + b"\x11" + bytes(7) + b"llama.block_count" + b"\x04\0\0\0" + b"\x20\0\0\0"
)  # fmt: skip


def _with_tensors() -> bytes:
    """A whole small model: numbers, a vocabulary and a list of tensors."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    numbers = {"block_count": 2, "context_length": 64, "embedding_length": 8, "attention.head_count": 2}
    numbers |= {"feed_forward_length": 16, "expert_count": 2, "expert_used_count": 1}
    head = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += b"".join(text(f"llama.{key}") + struct.pack("<II", 4, number) for key, number in numbers.items())
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    names = ("token_embd.weight", "blk.0.ffn_down_exps.weight", "blk.1.ffn_down.weight", "output.weight")
    for position, name in enumerate(names):
        head += text(name) + struct.pack("<IQQIQ", 2, 8, 16, 0, position * 512)
    return b"GGUF" + struct.pack("<IQQ", 3, len(names), len(numbers) + 2) + head + bytes(2100)


_CONFIG_JSON = b"""{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
"hidden_size": 2048, "torch_dtype": "bfloat16", "max_position_embeddings": 32768}"""

_MODEL = b"""command = ["/bin/sh", "{port}"]
user = "root"
aliases = ["a/b"]
idle_timeout = "1h"
[gpu]
count = 1
vram = "9GiB"
[filter]
set = { n = 1 }
[scope]
MemoryMax = "1G"
"""

_KEYS = b"""["somebody"]
sha256 = "%b"
rights = ["use"]
models = ["a"]
""" % (b"0" * 64)

_LEASE = json.dumps(
    Lease(
        "qwen", 20000, (LeasedGpu(0, "GPU-1", 1, 0),), 1.5, ready=True, pid=7,
        cgroup="/gpusvc.slice/gpusvc-models.slice/model-qwen.scope",
    ).to_json()
).encode()  # fmt: skip

_EVENT = b"""{"__REALTIME_TIMESTAMP": "1", "__CURSOR": "s=1;i=2", "MESSAGE": "qwen is evicted.", "PRIORITY": "6",
"GPUSVC_EVENT": "evict", "GPUSVC_MODEL": "qwen", "GPUSVC_GPU": "0"}"""

TARGETS: Mapping[str, Target] = {
    "fields": Target(
        fields,
        [
            b'\x07{"model":"qwen","stream":true,"messages":[{"role":"user","content":"say \\"hi\\""}]}',
            b'\x01\xef\xbb\xbf{ "m\\u006fdel" : "a/b" , "x":[1,-2.5e3,{"model":null}] }',
        ],
    ),
    "form": Target(form, [_FORM]),
    "request": Target(request, [_POST, _GET]),
    "response": Target(
        response,
        [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close", b"HTTP/1.1 502 \r\nTransfer-Encoding: chunked"],
    ),
    "chunks": Target(chunks, [b"\x03" + b"5\r\nhello\r\n0;x=y\r\nA: b\r\n\r\nGET /", b"\x000\r\n\r\n"]),
    "ollama": Target(
        ollama,
        [
            b'{"model":"a","messages":[{"role":"user","content":"b","images":["iVBORw0KGgo"]}],"options":{"seed":1}}',
            b'{"model":"a","prompt":"b","suffix":"c","raw":true,"keep_alive":"5m","format":"json","context":[1,2]}',
            b'{"model":"a","input":["b"],"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"c"}}]}]}',
        ],
    ),
    "answer": Target(
        answer,
        [
            b'\x07data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"b"}}]}}]}\r\n\r\ndata: [DONE]\n\n',
            b'\x02: wait\n\ndata: {"content":"a","stop":true}',
        ],
    ),
    "metadata": Target(metadata, [_GGUF, _with_tensors()]),
    "safetensors": Target(safetensors, [_CONFIG_JSON]),
    "model_file": Target(model_file, [_MODEL]),
    "key_file": Target(key_file, [_KEYS]),
    "lease": Target(lease, [_LEASE]),
    "event": Target(event, [_EVENT]),
}
