"""The commands of README.md and docs/*.md, as written: each block of a document after the other, in one machine.

Blocks of ``sh`` are run by bash, and fail with the first command that does. What stands in a block of another language
is written where its first line (``# /path``), or the ``systemctl edit`` before it, says that it belongs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.machine.host import GGUF, REPOSITORY
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

# One machine is enough, and the tree of this release has HAProxy.
pytestmark = pytest.mark.generations(Generation.TRIXIE)

DOCUMENTS = sorted(
    str(file.relative_to(REPOSITORY))
    for file in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))
    if re.search(r"^```sh$", file.read_text(), re.MULTILINE)
)

# What cannot be run here, by the first line of its block; and why not.
UNTRIED = {
    ("README.md", "gpusvc add small hf:"): "no hub is within reach; test_hub.py downloads from one on loopback",
    ("docs/gateway.md", "ssh -L"): "there is no other machine",
    ("README.md", "./demo"): "test_demo.py runs it, and this is a part of ./test",
    ("README.md", "packaging/build-deb"): "this machine has the package, built and installed in this way",
    ("docs/reliability.md", "python -m tests.campaign"): "test_campaign.py has short ones, on machines of their own",
    ("docs/reliability.md", "tests/bench/escapes"): "it compares ways to end an engine, and has no need of gpusvc",
    ("docs/reliability.md", "pip install atheris"): "test_fuzz_targets.py tries its targets, without the fuzzer",
    ("docs/rootless.md", "gpusvc --user add"): "test_rootless.py has a user with a service manager of his own",
    ("docs/rootless.md", "systemctl --user enable"): "likewise",
}

# They go on until somebody has seen enough.
ENDLESS = re.compile(r"^(gpusvc events -f)\b")

# There is no sudo in the machine, nor need of it. A line that was written a moment ago may not be in the journal yet.
PRELUDE = """
set -euo pipefail
cd /root/job
sudo() { "$@"; }
journalctl() { command journalctl --sync; command journalctl "$@"; }
"""

# Serves as the test engine does, told so in the words of llama-server.
LLAMA_SERVER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in --port) port=$2 ;; esac
    shift
done
exec test-engine --port "$port" --model llama
"""


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """Language and text of each."""
    text = (REPOSITORY / document).read_text()
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block(document: str, language: str) -> str:
    return next(text for found, text in blocks(document) if found == language)


def of_readme(machine: Host) -> None:
    machine.remove("/etc/gpusvc/models/qwen.toml")  # it is added


def of_use_protocol(machine: Host) -> None:
    machine.write_model("qwen", keys="port = 21234")


def of_together(machine: Host) -> None:
    machine.write_model("coder")
    machine.write("/usr/local/bin/summarise", '#!/bin/sh\nexec curl --fail "$GPUSVC_URL/v1/models"\n', mode=0o755)
    machine.write("/root/hf-token", "secret", mode=0o600)
    machine.write("/srv/nas/models/weights", "weights")


def of_llama_swap(machine: Host) -> None:
    machine.write("/etc/llama-swap/config.yaml", block("docs/from-llama-swap.md", "yaml"))
    machine.write("/etc/systemd/system/llama-swap.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    machine.run("cp", GGUF, "/srv/models/embed.gguf")


def of_localai(machine: Host) -> None:
    machine.write("/srv/localai/models/chat.yaml", block("docs/from-localai.md", "yaml"))
    machine.run("cp", GGUF, "/srv/localai/models/chat-q4_k_m.gguf")


def of_ollama(machine: Host) -> None:
    store = "/usr/share/ollama/.ollama/models"
    digest = machine.run("sha256sum", GGUF).stdout.split()[0]
    machine.run("install", "-D", GGUF, f"{store}/blobs/sha256-{digest}")
    parameters = json.dumps({"num_ctx": 512}).encode()
    named = hashlib.sha256(parameters).hexdigest()
    machine.write(f"{store}/blobs/sha256-{named}", parameters)
    kinds = {"model": digest, "params": named}
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{value}"}
        for kind, value in kinds.items()
    ]
    machine.write(
        f"{store}/manifests/registry.ollama.ai/library/llama3.2/1b", json.dumps({"schemaVersion": 2, "layers": layers})
    )
    machine.run("groupadd", "--force", "ollama")


PREPARE: dict[str, Callable[[Host], None]] = {
    "README.md": of_readme,
    "docs/use-protocol.md": of_use_protocol,
    "docs/together.md": of_together,
    "docs/from-llama-swap.md": of_llama_swap,
    "docs/from-localai.md": of_localai,
    "docs/from-ollama.md": of_ollama,
}


@pytest.fixture
def prepared(machine: Host) -> Iterator[Host]:
    """With what the documents take for granted; afterwards without what they made outside gpusvc's own directories."""
    machine.write("/usr/local/bin/llama-server", LLAMA_SERVER, mode=0o755)
    for model in ("qwen3-8b", "coder"):
        machine.run("cp", GGUF, f"/srv/models/{model}.gguf")
    for program in ("/usr/local/bin/batch-job", "/root/job/batch-job"):
        machine.write(program, "#!/bin/sh\nexit 0\n", mode=0o755)
    machine.write("/root/job/train.py", "")
    machine.write_model("qwen", gpu='vram = "1GiB"')
    machine.run("cp", "-a", "--update", "/etc/haproxy/haproxy.cfg", "/root/haproxy.cfg")
    yield machine
    machine.run("sh", "-c", CLEAN, timeout=60)


CLEAN = """
systemctl disable --quiet --now model-night@qwen.timer model-morning@qwen.timer 2> /dev/null || :
systemctl revert gpusvc-gateway.socket gpusvc-models.slice 2> /dev/null || :
rm -rf /etc/systemd/system/summarise.service /etc/systemd/system/llama-swap.service
mv /root/haproxy.cfg /etc/haproxy/haproxy.cfg
rm -f /etc/gpusvc/keys.toml /etc/gpusvc/gpusvc.toml
systemctl daemon-reload
systemctl stop gpusvc-gateway.service
systemctl restart haproxy.service gpusvc-gateway.socket
"""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_a_document_do_what_they_are_there_for(prepared: Host, document: str) -> None:
    if document in PREPARE:
        PREPARE[document](prepared)
    edited: str | None = None
    for language, text in blocks(document):
        place = re.match(r"# (/\S+)\n", text)
        if language == "sh":
            edited = try_commands(prepared, document, text)
        elif edited is not None:
            unit = edited if re.search(r"\.\w+$", edited) else f"{edited}.service"
            prepared.write(f"/etc/systemd/system/{unit}.d/override.conf", text)
            prepared.run("systemctl", "daemon-reload")
            edited = None
        elif place is not None:
            prepared.write(place.group(1), text)


def try_commands(machine: Host, document: str, text: str) -> str | None:
    """Runs a block; the unit that it opens in an editor last, if it does."""
    if any(document == where and text.startswith(start) for where, start in UNTRIED):
        return None
    script, edited = PRELUDE, None
    for line in text.splitlines():
        edit = re.match(r"(?:sudo )?systemctl edit (\S+)", line)
        if edit is not None:
            edited = edit.group(1)
        elif ENDLESS.match(line):
            script += f"timeout 1 {line.partition('#')[0]} || [ $? = 124 ]\n"
        elif line.startswith("gpusvc doctor"):
            script += f"{line.partition('#')[0]} || [ $? = 1 ]\n"  # a container is no healthy machine
        else:
            script += f"{line}\n"
    machine.run("bash", "-c", script, timeout=60)
    return edited


def test_what_is_not_tried_is_still_there() -> None:
    for document, start in UNTRIED:
        assert any(text.startswith(start) for language, text in blocks(document) if language == "sh"), start
