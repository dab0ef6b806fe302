"""An engine that means harm: each attempt is refused or comes to nothing, and another model never feels it.

Both models run as the same user, which is the worst case, and the default.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from gpusvc.journal.events import MESSAGE_IDS, EventType
from tests.machine.host import REPOSITORY
from tests.machine.test_isolation import itself
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

EVIL, VICTIM = "evil", "victim"
SERVICES = ("gpusvc-watchdog.service", "gpusvc-api.service", "gpusvc-gateway.service")
MANAGER = (
    "busctl",
    "call",
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
)
REFUSED = re.compile("Access denied|authentication required|not permitted|not available", re.IGNORECASE)
CLOSED = {"EACCES", "EPERM", "EROFS"}

# Landlock's version from which on signals stay inside (Linux 6.12); landlock_create_ruleset(2) tells it.
LANDLOCK_WITH_SCOPES = 6


def landlock_version() -> int:
    return int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))


Attempt = Callable[..., Any]


@pytest.fixture(scope="module")
def key(shared_machine: Host) -> str:
    """Without which the gateway serves nobody."""
    found = re.search(r"gpusvc-\S{40,}", shared_machine.run("gpusvc", "key", "add", "somebody").stdout)
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def machine(shared_machine: Host, key: str) -> Iterator[Host]:
    """One on which the hostile model runs beside its victim, for all tests: none of them may change that."""
    host = shared_machine
    host.write("/usr/local/bin/hostile", (REPOSITORY / "tests/engines/hostile.py").read_bytes(), mode=0o755)
    command = json.dumps(["hostile", "{port}"])
    host.write_model(EVIL, f'command = {command}\nhealth_timeout = "5min"\n[gpu]\ndevices = [1]\n')
    host.write_model(VICTIM, arguments="--vram 1GiB", gpu="devices = [0]", keys='env = { TOKEN = "secret" }')
    host.run("systemctl", "restart", *SERVICES)
    host.run("systemctl", "start", f"model@{VICTIM}", f"model@{EVIL}", timeout=60)
    yield host
    host.reset()


@pytest.fixture
def attempt(machine: Host) -> Attempt:
    """What came of one attempt of the hostile model's."""
    url = machine.url(EVIL)

    def ask(*order: str) -> Any:
        return json.loads(machine.curl(url, "--data-binary", json.dumps([order])))[0]

    return ask


@pytest.fixture
def unharmed(machine: Host, attempt: Attempt) -> Callable[[], None]:
    """Whether the victim and all of gpusvc are what they were before."""

    def state() -> dict[str, Any]:
        units = (f"model@{VICTIM}.service", *SERVICES)
        shown = {unit: machine.properties(unit, "ActiveState", "MainPID", "NRestarts", "StatusText") for unit in units}
        for unit in SERVICES:
            shown[unit].pop("StatusText")
        lease = json.loads(machine.read(f"/run/gpusvc/models/{VICTIM}/lease.json"))
        machine.curl(machine.url(VICTIM, "/health"))
        return shown | {"lease": (lease["pid"], lease["port"], lease["ready"])}

    before = state()

    def check() -> None:
        assert state() == before
        assert "Traceback" not in machine.journal()

    return check


def test_it_has_no_right_that_a_process_could_lack(machine: Host, attempt: Attempt) -> None:
    status = attempt("status")
    assert {status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    refused = {
        "setuid": attempt("setuid"),
        "setuid file": attempt("setuid_copy", "/tmp"),
        "nice": attempt("nice"),
        "mount": attempt("mount"),
        "umount": attempt("umount"),
        "chroot": attempt("chroot", "/tmp"),
        "sethostname": attempt("sethostname"),
        "node": attempt("mknod", "/tmp/node", "0"),
        "other GPU": attempt("open", "/dev/nvidia0"),
        "memory": attempt("open", "/dev/mem"),
        "kernel setting": attempt("write", "/proc/sys/kernel/core_pattern"),
        "kernel log": attempt("read", "/dev/kmsg"),
        "shadow": attempt("read", "/etc/shadow"),
    }
    refused["memory"] = "EPERM" if refused["memory"] == "ENOENT" else refused["memory"]
    refused["kernel log"] = "EPERM" if refused["kernel log"] == "ENOENT" else refused["kernel log"]
    assert {name for name, said in refused.items() if said not in CLOSED} == set()
    for command in (("mount", "-t", "tmpfs", "none", "/mnt"), ("su", "-c", "id"), ("newgrp", "gpusvc")):
        assert "uid=0" not in str(attempt("run", *command))
    assert machine.run("findmnt", "/mnt", check=False).returncode != 0


def test_it_cannot_reach_another_models_processes(
    machine: Host, attempt: Attempt, unharmed: Callable[[], None]
) -> None:
    if landlock_version() < LANDLOCK_WITH_SCOPES:
        pytest.skip("THIS KERNEL KEEPS NO SIGNALS INSIDE: Landlock has no scopes before Linux 6.12.")
    victim = machine.ps(VICTIM)
    assert victim is not None
    assert itself(machine, VICTIM)["uid"] == int(attempt("status")["Uid"].split()[0])
    launcher = machine.property(f"model@{VICTIM}.service", "MainPID")
    for target in (str(victim["pid"]), launcher, "1"):
        assert attempt("kill", target, "9") == "EPERM"
        assert attempt("ptrace", target) == "EPERM"
        assert attempt("peek", target) == "EPERM"
        for file in ("environ", "mem", "fd/1", "cwd/."):
            assert attempt("read", f"/proc/{target}/{file}") in CLOSED
    assert attempt("parent", "15") == "EPERM"
    assert attempt("signal_all") in {0, "EPERM", "ESRCH"}  # it would have the victim hang
    unharmed()


def test_it_cannot_reach_files_that_are_not_its(machine: Host, attempt: Attempt, unharmed: Callable[[], None]) -> None:
    machine.run("chmod", "600", f"/etc/gpusvc/models/{VICTIM}.toml")
    there = f"/run/gpusvc/models/{VICTIM}"
    own = machine.property(f"model-{EVIL}.scope", "ControlGroup")
    its = machine.property(f"model-{VICTIM}.scope", "ControlGroup")
    orders = [
        ("read", "/etc/gpusvc/keys.toml"),
        ("write", "/etc/gpusvc/keys.toml"),
        ("read", f"/etc/gpusvc/models/{VICTIM}.toml"),
        ("write", f"/etc/gpusvc/models/{VICTIM}.toml"),
        ("write", "/etc/gpusvc/hooks.d/forged"),
        ("write", "/run/gpusvc/forged"),
        ("write", "/run/gpusvc/placement.lock"),
        ("write", f"/run/gpusvc/pins/{EVIL}"),
        ("write", "/run/gpusvc/watchdog/verdicts.json"),
        ("write", "/run/gpusvc/gateway/counters-0"),
        ("write", f"/run/gpusvc/gateway/slots/{VICTIM}"),
        ("mkdir", "/run/gpusvc/models/forged"),
        ("mkdir", "/run/gpusvc/waiting/forged"),
        *(("lock", f"{there}/{file}") for file in ("door", "use", "lock")),
        *(("write", f"{there}/{file}") for file in ("door", "use", "lock", "lease.json")),
        ("unlink", f"{there}/lease.json"),
        ("lock", f"/run/gpusvc/models/{EVIL}/door"),
        ("write", f"/run/gpusvc/models/{EVIL}/lease.json"),
        ("write", f"/var/lib/gpusvc/footprints/{VICTIM}.json"),
        ("write", "/usr/lib/python3/dist-packages/gpusvc/forged.py"),
        ("write", "/etc/systemd/system/forged.service"),
        ("write", "/run/systemd/system/forged.service"),
        ("connect", "/run/gpusvc/api.sock"),
        *(
            ("write", f"/sys/fs/cgroup{group}/cgroup.procs", "0")
            for group in ("", "/system.slice", "/gpusvc.slice", its)
        ),
        ("write", f"/sys/fs/cgroup{its}/cgroup.kill", "1"),
        ("write", f"/sys/fs/cgroup{its}/cgroup.freeze", "1"),
        ("write", f"/sys/fs/cgroup{own}/cgroup.procs", "0"),
        ("write", f"/sys/fs/cgroup{own}/cgroup.max.depth", "max"),
        ("mkdir", f"/sys/fs/cgroup{own}/child"),
    ]
    said = {" ".join(order): attempt(*order) for order in orders}
    # What is not there yet cannot be made either.
    assert {order: came for order, came in said.items() if came not in {*CLOSED, "ENOENT"}} == {}
    unharmed()


def test_it_cannot_steer_systemd(machine: Host, attempt: Attempt, unharmed: Callable[[], None]) -> None:
    unit = f"model@{VICTIM}.service"
    transient = ("StartTransientUnit", "ssa(sv)a(sa(sv))", "owned.service", "fail", "1", "ExecStart", "a(sasb)", "1")
    calls = [
        ("StopUnit", "ss", unit, "replace"),
        ("RestartUnit", "ss", unit, "replace"),
        ("KillUnit", "ssi", unit, "all", "9"),
        ("StopUnit", "ss", f"model-{VICTIM}.scope", "replace"),
        ("StopUnit", "ss", "gpusvc-watchdog.service", "replace"),
        ("SetUnitProperties", "sba(sv)", f"model-{EVIL}.scope", "true", "1", "DevicePolicy", "s", "auto"),
        ("AttachProcessesToUnit", "ssau", "gpusvc-api.service", "/", "0"),
        ("Reload", ""),
        ("PowerOff", ""),
        (*transient, "/bin/touch", "2", "/bin/touch", "/pwned", "false", "0"),
    ]
    for call in calls:
        assert REFUSED.search(str(attempt("run", *MANAGER, *call))), call
    assert machine.run("test", "-e", "/pwned", check=False).returncode == 1

    keys = ("ActiveState", "MainPID", "StatusText", "NFileDescriptorStore", "Result")
    before = machine.properties(f"model@{EVIL}.service", *keys)
    for state in ("READY=1", "WATCHDOG=trigger", "MAINPID=1", "STOPPING=1", "STATUS=owned", "FDSTORE=1\nFDNAME=x"):
        attempt("notify", f"{state}\nSTATUS=owned")
    assert machine.properties(f"model@{EVIL}.service", *keys) == before

    # One that only says that it is ready is not.
    lie = "NOTIFY_SOCKET=/run/systemd/notify systemd-notify --ready --status=owned; exec sleep 60"
    machine.write_model("liar", f'command = {json.dumps(["sh", "-c", lie])}\nstart_timeout = "1s"\n[gpu]\ncount = 0\n')
    assert "The engine made no progress for 1s" in machine.fail_to_start("liar")
    unharmed()


def test_it_can_take_no_port_that_is_in_use_and_is_named_where_it_takes_one_that_was_free(
    machine: Host, attempt: Attempt, unharmed: Callable[[], None]
) -> None:
    port = str(itself(machine, VICTIM)["environment"]["PORT"])
    for address in ("127.0.0.1", "0.0.0.0"):
        assert attempt("bind", port, address) == "EADDRINUSE"
    attempt("squat", "20999", "\x1b[2J\nREADY=1\nSTATUS=owned")
    machine.write_model("fixed", keys="port = 20999")
    done = machine.run("gpusvc", "start", "fixed", check=False)
    assert done.returncode == 1
    assert "Port 20999 is taken by another program: PID" in done.stderr
    assert_plain(done.stderr)
    said = machine.messages("fixed")
    assert "is taken by another program: PID" in said
    assert_plain(said)
    unharmed()


def test_it_cannot_manage_models_through_the_gateway_without_a_key(
    machine: Host, attempt: Attempt, unharmed: Callable[[], None]
) -> None:
    head = "HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    paths = (f"POST /gpusvc/models/{VICTIM}/stop", "POST /unload", f"GET /upstream/{VICTIM}/health", "GET /metrics")
    for path in paths:
        assert " 401 " in attempt("request", "8484", f"{path} {head}").partition("\r\n")[0], path
    unharmed()


def test_what_it_says_breaks_no_terminal_no_log_and_no_neighbour(
    machine: Host, attempt: Attempt, unharmed: Callable[[], None]
) -> None:
    attempt("flood", "2000")
    fields = {
        "MESSAGE": "forged",
        "MESSAGE_ID": MESSAGE_IDS[EventType.EVICT],
        "GPUSVC_EVENT": "evict",
        "GPUSVC_MODEL": VICTIM,
        "OBJECT_SYSTEMD_UNIT": f"model@{VICTIM}.service",
        "_UID": "0",
        "_SYSTEMD_UNIT": "gpusvc-watchdog.service",
    }
    attempt("journal", "".join(f"{name}={value}\n" for name, value in fields.items()))
    machine.run("journalctl", "--sync")
    shown = [
        machine.run("gpusvc", *command).stdout
        for command in (
            ("status", EVIL),
            ("status", EVIL, "--json"),
            ("logs", EVIL, "-n", "50"),
            ("logs", VICTIM),
            ("events",),
            ("events", "--json"),
            ("ps", "--wide"),
            ("top", "--count", "1"),
            ("gpus",),
        )
    ]
    for text in shown:
        assert_plain(text)
        assert "forged" not in text
    log = machine.run(
        "curl", "-s", "--unix-socket", "/run/gpusvc/api.sock", f"http://x/gpusvc/models/{EVIL}/log?lines=50&follow=0"
    )
    assert "\x1b" not in log.stdout
    assert "\x9b" not in log.stdout
    unharmed()


def test_its_last_words_reach_nobody_as_they_are(machine: Host, key: str, unharmed: Callable[[], None]) -> None:
    script = r"printf '\033[2J\033]0;owned\007\302\23331m\377 READY=1\nlast \033[31mwords\302\233'; exit 3"
    machine.write_model("dying", f"command = {json.dumps(['sh', '-c', script])}\n[gpu]\ncount = 0\n")
    done = machine.run("gpusvc", "start", "dying", check=False)
    assert done.returncode == 1
    assert "exit status 3" in done.stderr
    assert_plain(done.stderr)
    assert_plain(machine.property("model@dying.service", "StatusText"))
    answer = machine.run(
        "curl",
        "-s",
        "http://127.0.0.1:8484/v1/chat/completions",
        *("-H", f"Authorization: Bearer {key}"),
        "-d",
        '{"model": "dying", "messages": []}',
        timeout=60,
    ).stdout
    assert "words" in answer
    assert_plain(answer)
    for command in (("status", "dying"), ("events", "dying"), ("logs", "dying")):
        assert_plain(machine.run("gpusvc", *command).stdout)
    unharmed()


def test_however_many_it_becomes_all_of_it_ends(machine: Host, attempt: Attempt, unharmed: Callable[[], None]) -> None:
    assert attempt("burst", "300") == 300
    machine.stop(EVIL)
    unharmed()
    assert machine.run("test", "-e", f"/run/gpusvc/models/{EVIL}/lease.json", check=False).returncode == 1
    assert not [line for line in machine.command_lines().values() if "hostile" in line]
    machine.start(EVIL)
    unharmed()


def assert_plain(text: str) -> None:
    """Nothing in it moves a cursor but the end of a line."""
    assert [repr(line) for line in text.split("\n") if not line.isprintable()] == []
