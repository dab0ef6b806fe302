"""The gateway as the package installs it: its units, keys and TLS, and what its ends do to clients and models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.host import GGUF
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM, Generation.FORKY)

GATEWAY = "gpusvc-gateway.service"
SOCKET = "gpusvc-gateway.socket"
URL = "http://127.0.0.1:8484"
CHAT = "/v1/chat/completions"

# Asks again and again, each time by a new connection, until it is told to stop; prints how many answers there were of
# each kind.
_CLIENTS = """
import collections, http.client, json, os, sys, threading
name, stop = sys.argv[1], sys.argv[2]
body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hello"}]})
found = collections.Counter()
def ask():
    while not os.path.exists(stop):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 8484, timeout=60)
            connection.request("POST", "/v1/chat/completions", body)
            found[str(connection.getresponse().status)] += 1
            connection.close()
        except Exception as error:
            found[repr(error)] += 1
print("asking", flush=True)
threads = [threading.Thread(target=ask) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
print(json.dumps(found), flush=True)
"""


@pytest.fixture
def gateway(machine: Host) -> Iterator[Host]:
    """A machine whose gateway is as the package has it, before and after."""
    restore(machine)
    yield machine
    restore(machine)


def restore(machine: Host) -> None:
    machine.run(
        "sh",
        "-c",
        "rm -rf /etc/systemd/system/gpusvc-* /etc/gpusvc/keys.toml /etc/gpusvc/tls /tmp/stop; systemctl daemon-reload\n"
        f"systemctl stop {SOCKET} {GATEWAY}; systemctl reset-failed; systemctl start {SOCKET}",
    )


def configure(machine: Host, *lines: str) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "\n".join(("[gateway]", *lines, "")))


def drop_in(machine: Host, unit: str, text: str) -> None:
    machine.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


def question(name: str, **more: Any) -> str:
    return json.dumps({"model": name, "messages": [{"role": "user", "content": "the water"}], "max_tokens": 8, **more})


def ask(machine: Host, name: str, *options: str, url: str = URL, **more: Any) -> str:
    return machine.curl(url + CHAT, "-d", question(name, **more), *options)


def status(machine: Host, *options: str, url: str = URL + CHAT) -> int:
    """The status that curl gets."""
    return int(machine.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *options, url, check=False).stdout)


def main_pid(machine: Host) -> int:
    return int(machine.property(GATEWAY, "MainPID"))


def worker_pids(machine: Host) -> list[int]:
    return [pid for pid in machine.pids(GATEWAY) if pid != main_pid(machine)]


def is_free(machine: Host, name: str) -> bool:
    """Whether nobody uses a model."""
    return machine.run("flock", "-n", "-x", f"/run/gpusvc/models/{name}/use", "true", check=False).returncode == 0


# Requests


def test_a_request_starts_the_model_that_it_names(gateway: Host) -> None:
    gateway.write_model("qwen", keys='aliases = ["Qwen/Qwen3-8B"]')
    assert json.loads(ask(gateway, "Qwen/Qwen3-8B"))["choices"][0]["message"]["content"] == "You said: the water"
    assert gateway.is_active("model@qwen.service")
    assert is_free(gateway, "qwen")
    assert [model["id"] for model in json.loads(gateway.curl(URL + "/v1/models"))["data"]] == ["qwen", "Qwen/Qwen3-8B"]
    assert "Serving at 127.0.0.1:8484." in gateway.property(GATEWAY, "StatusText")


def test_a_model_that_cannot_start_is_refused_with_the_reason(gateway: Host) -> None:
    gateway.write_model("broken", arguments="--die-after-load --exit-status 3")

    def refused() -> str:
        return gateway.run("curl", "-s", "-i", "-d", question("broken"), URL + CHAT).stdout

    answer = refused()
    assert answer.startswith("HTTP/1.1 503 ")
    assert "broken" in json.loads(answer.splitlines()[-1])["error"]["message"]
    gateway.wait_until(lambda: re.search("(?im)^retry-after: [0-9]+", refused()), "it is left alone for a while")


@pytest.mark.generations(Generation.FORKY)
def test_the_real_llama_server_chats_streams_and_embeds(gateway: Host) -> None:
    llama = f'engine = "llama-server"\nmodel = "{GGUF}"\n'
    gateway.write_model("tiny", llama + 'args = ["-c", "512"]\n[gpu]\ncount = 0\n')
    options = '["-c", "512", "--embeddings", "--pooling", "mean"]'
    gateway.write_model("embed", f"{llama}args = {options}\n[gpu]\ncount = 0\n")
    assert json.loads(ask(gateway, "tiny"))["usage"]["completion_tokens"] == 8
    lines = [line for line in ask(gateway, "tiny", "--no-buffer", stream=True).splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    embedded = gateway.curl(URL + "/v1/embeddings", "-d", json.dumps({"model": "embed", "input": "the water"}))
    assert len(json.loads(embedded)["data"][0]["embedding"]) == 64


# Keys


def test_with_keys_only_those_who_have_one_are_served(gateway: Host) -> None:
    gateway.write_model("qwen")
    gateway.write_model("other")
    secret = gateway.run("gpusvc", "key", "add", "alice", "--model", "qwen").stdout.strip()
    admin = gateway.run("gpusvc", "key", "add", "root", "--admin").stdout.strip()
    assert gateway.run("stat", "-c", "%U:%G %a", "/etc/gpusvc/keys.toml").stdout == "root:gpusvc-gateway 640\n"
    assert "You said" in ask(gateway, "qwen", "-H", f"Authorization: Bearer {secret}")
    assert "You said" in ask(gateway, "qwen", "-H", f"x-api-key: {secret}")
    assert status(gateway, "-d", question("qwen")) == 401
    assert status(gateway, "-d", question("qwen"), "-H", f"Authorization: Bearer {secret}x") == 401
    assert status(gateway, "-d", question("other"), "-H", f"Authorization: Bearer {secret}") == 404
    assert status(gateway, "-H", f"Authorization: Bearer {secret}", url=URL + "/gpusvc/models") == 403
    assert status(gateway, "-H", f"Authorization: Bearer {admin}", url=URL + "/gpusvc/models") == 200
    assert status(gateway, url=URL + "/health") == 200
    assert not gateway.is_active("model@other.service")
    assert secret not in gateway.journal()


def test_a_key_counts_without_a_restart_until_it_is_removed(gateway: Host) -> None:
    gateway.write_model("qwen")
    assert status(gateway, "-d", question("qwen")) == 200
    pid = main_pid(gateway)
    secret = gateway.run("gpusvc", "key", "add", "alice").stdout.strip()
    header = ("-H", f"Authorization: Bearer {secret}")
    gateway.wait_until(lambda: status(gateway, "-d", question("qwen")) == 401, "a key is asked for")
    assert status(gateway, "-d", question("qwen"), *header) == 200
    gateway.run("gpusvc", "key", "rm", "alice")
    gateway.wait_until(lambda: status(gateway, "-d", question("qwen"), *header) == 401, "the key is refused")
    assert main_pid(gateway) == pid


def test_keys_may_come_as_a_credential(gateway: Host) -> None:
    gateway.write_model("qwen")
    secret = gateway.run("gpusvc", "key", "add", "alice").stdout.strip()
    gateway.run("sh", "-c", "mkdir -p /etc/credstore && mv /etc/gpusvc/keys.toml /etc/credstore/gpusvc-keys")
    try:
        assert status(gateway, "-d", question("qwen")) == 401
        assert status(gateway, "-d", question("qwen"), "-H", f"Authorization: Bearer {secret}") == 200
    finally:
        gateway.remove("/etc/credstore/gpusvc-keys")


# Who may reach it


def test_it_does_not_serve_the_network_without_keys(gateway: Host) -> None:
    gateway.write_model("qwen")
    gateway.run("ip", "address", "replace", "192.0.2.7/32", "dev", "lo")
    drop_in(
        gateway, SOCKET, "[Socket]\nListenStream=\nListenStream=0.0.0.0:8484\nListenStream=/run/gpusvc/gateway.sock\n"
    )
    gateway.run("systemctl", "restart", SOCKET)
    gateway.run("systemctl", "start", GATEWAY, check=False)
    assert gateway.wait_for_state(GATEWAY, "failed") == "failed"
    assert gateway.property(GATEWAY, "ExecMainStatus") == "78"
    said = gateway.journal(GATEWAY, "-o", "cat")
    assert "The gateway would answer everybody who reaches 0.0.0.0:8484: there are no API keys." in said
    assert "gpusvc key add NAME" in said

    secret = gateway.run("gpusvc", "key", "add", "alice").stdout.strip()
    gateway.run("systemctl", "restart", SOCKET)
    url = "http://192.0.2.7:8484"
    assert "You said" in ask(gateway, "qwen", "-H", f"Authorization: Bearer {secret}", url=url)
    assert status(gateway, "-d", question("qwen"), url=url + CHAT) == 401
    unix = ("--unix-socket", "/run/gpusvc/gateway.sock")
    assert "You said" in ask(gateway, "qwen", "-H", f"Authorization: Bearer {secret}", *unix)
    shown = gateway.property(GATEWAY, "StatusText")
    assert "0.0.0.0:8484" in shown
    assert "/run/gpusvc/gateway.sock" in shown


def test_it_serves_the_network_without_keys_if_that_was_said_twice(gateway: Host) -> None:
    gateway.write_model("qwen")
    gateway.run("ip", "address", "replace", "192.0.2.7/32", "dev", "lo")
    configure(gateway, "allow_without_keys = true")
    drop_in(gateway, SOCKET, "[Socket]\nListenStream=\nListenStream=0.0.0.0:8484\n")
    gateway.run("systemctl", "restart", SOCKET)
    assert "You said" in ask(gateway, "qwen", url="http://192.0.2.7:8484")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates: needs openssl")
def test_it_serves_by_tls_with_the_certificate_that_is_there_now(gateway: Host, tmp_path: Path) -> None:
    gateway.write_model("qwen")
    install_certificate(gateway, tmp_path, "old.example")
    configure(gateway, 'tls_certificate = "/etc/gpusvc/tls/crt"', 'tls_key = "/etc/gpusvc/tls/key"')
    gateway.run("systemctl", "restart", GATEWAY)
    trust = ("--cacert", "/etc/gpusvc/tls/crt")
    options = (*trust, "--resolve", "old.example:8484:127.0.0.1")
    configure(gateway, 'hosts = ["old.example"]', *gateway.read("/etc/gpusvc/gpusvc.toml").splitlines()[1:])
    gateway.run("systemctl", "reload", GATEWAY)
    gateway.wait_until(
        lambda: status(gateway, "-d", question("qwen"), *options, url="https://old.example:8484" + CHAT) == 200,
        "the name is known",
    )
    assert status(gateway, "-d", question("qwen")) == 0, "no HTTP in clear on the same port"

    install_certificate(gateway, tmp_path, "new.example")
    renewed = (*trust, "--connect-to", "new.example:443:127.0.0.1:8484")
    gateway.wait_until(
        lambda: status(gateway, *renewed, url="https://new.example/health") != 0, "the new one is served"
    )


def install_certificate(machine: Host, directory: Path, name: str) -> None:
    kind = (
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-days",
        "2",
        "-nodes",
        "-subj",
        f"/CN={name}",
    )
    files = directory / "crt", directory / "key"
    command = ["openssl", "req", *kind, "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    for file in files:
        machine.write(f"/etc/gpusvc/tls/{file.name}", file.read_bytes(), mode=0o640)
        machine.run("chgrp", "gpusvc-gateway", f"/etc/gpusvc/tls/{file.name}")


def test_files_that_are_wrong_keep_it_from_starting_and_are_named(gateway: Host) -> None:
    configure(gateway, 'tls_certificate = "/etc/gpusvc/none.crt"', 'tls_key = "/etc/gpusvc/none.key"')
    gateway.run("systemctl", "start", GATEWAY, check=False)
    assert gateway.wait_for_state(GATEWAY, "failed") == "failed"
    said = gateway.journal(GATEWAY, "-o", "cat")
    assert "tls_certificate /etc/gpusvc/none.crt cannot be read: No such file or directory." in said


# Its ends


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_under_load_loses_no_request(gateway: Host, workers: int) -> None:
    configure(gateway, f"workers = {workers}")
    gateway.write_model("qwen")
    ask(gateway, "qwen")
    clients = gateway.popen("python3", "-c", _CLIENTS, "qwen", "/tmp/stop")
    assert clients.stdout is not None
    assert clients.stdout.readline() == "asking\n"
    for _ in range(5):
        gateway.run("systemctl", "restart", GATEWAY)
    gateway.write("/tmp/stop", "")
    found = json.loads(clients.communicate(timeout=120)[0])
    assert list(found) == ["200"], found
    assert gateway.is_active("model@qwen.service")


def test_killing_it_leaves_models_running_and_their_use_free(gateway: Host) -> None:
    gateway.write_model("qwen")
    ask(gateway, "qwen")
    [engine] = gateway.engine_pids()
    gateway.run("kill", "-USR1", str(engine))  # from now on it answers nobody
    gateway.popen("curl", "-s", "-d", question("qwen"), URL + CHAT)
    gateway.wait_until(lambda: not is_free(gateway, "qwen"), "the request uses the model")
    before = main_pid(gateway)
    gateway.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", GATEWAY)
    gateway.wait_until(lambda: is_free(gateway, "qwen"), "nobody uses it any more")
    assert gateway.engine_pids() == [engine]
    gateway.wait_until(lambda: status(gateway, url=URL + "/health") == 200, "it is back", unit=GATEWAY)
    assert main_pid(gateway) != before


def test_each_worker_is_replaced_and_none_outlives_the_service(gateway: Host) -> None:
    configure(gateway, "workers = 2")
    gateway.write_model("qwen")
    ask(gateway, "qwen")
    assert "with 2 workers." in gateway.property(GATEWAY, "StatusText")
    first, second = worker_pids(gateway)
    gateway.run("kill", "-KILL", str(first))
    gateway.wait_until(
        lambda: len(pids := worker_pids(gateway)) == 2 and first not in pids, "the worker is replaced", unit=GATEWAY
    )
    assert second in worker_pids(gateway)
    assert "You said" in ask(gateway, "qwen")

    workers = worker_pids(gateway)
    gateway.run("kill", "-KILL", str(main_pid(gateway)))
    gateway.wait_until(
        lambda: not set(workers) & set(gateway.pids(GATEWAY)) and "You said" in ask(gateway, "qwen"),
        "other workers serve",
        unit=GATEWAY,
    )


def test_a_stop_of_its_socket_ends_it_and_no_model(gateway: Host) -> None:
    gateway.write_model("qwen")
    ask(gateway, "qwen")
    gateway.run("systemctl", "stop", SOCKET)
    assert gateway.wait_for_state(GATEWAY, "inactive") == "inactive"
    assert gateway.is_active("model@qwen.service")


# Its sandbox


@pytest.mark.parametrize("unit", [GATEWAY, "gpusvc-api.service"])
def test_it_is_well_contained(machine: Host, unit: str) -> None:
    said = machine.run("systemd-analyze", "security", "--no-pager", unit).stdout
    (exposure,) = re.findall(rf"exposure level for {unit}: ([\d.]+)", said)
    assert float(exposure) <= 2.0


def test_it_has_no_right_to_start_a_model_itself(machine: Host) -> None:
    machine.write_model("qwen")
    call = (
        "busctl",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    )
    unit = ("StartUnit", "ss", "model@qwen.service", "replace")
    assert machine.run(*call, *unit, check=False, user="gpusvc-gateway").returncode != 0
    assert not machine.is_active("model@qwen.service")
