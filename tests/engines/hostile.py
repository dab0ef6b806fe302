#!/usr/bin/python3 -IS
"""An engine that attacks: it tries what it is asked to, tells how each attempt went, and serves on.

Run as a model; ``GET /health`` answers 200, and ``POST /`` with a JSON list of attempts answers what became of each: 0
if it worked, else the name of the errno, or what was answered. Standard library only.
"""

# Every step is a system call, as pathlib would hide it.
# ruff: noqa: PTH101, PTH108, PTH116, PTH123, PTH208

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIBC = ctypes.CDLL(None, use_errno=True)
KEPT: list[object] = []

PTRACE_ATTACH = 16
PTRACE_DETACH = 17
NOTIFY_SOCKET = "/run/systemd/notify"


def main() -> None:
    port = int(sys.argv[1] if len(sys.argv) > 1 else os.environ["PORT"])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


class Handler(BaseHTTPRequestHandler):
    """Orders, and their outcome."""

    def do_GET(self) -> None:
        self._answer(b"ok")

    def do_POST(self) -> None:
        orders = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(json.dumps([outcome(*order) for order in orders]).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def outcome(what: str, *arguments: str) -> object:
    try:
        done = ATTEMPTS[what](*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return 0 if done is None else done


def bind(port: str, address: str = "127.0.0.1") -> None:
    listener = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    listener.bind((address, int(port)))
    listener.listen()
    KEPT.append(listener)


def connect(path: str, said: str = "") -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        if said:
            client.sendall(said.encode())
            return client.recv(1000).decode(errors="replace")
    return None


def request(port: str, said: str) -> object:
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
        client.sendall(said.encode())
        return client.recv(1000).decode(errors="replace")


def notify(state: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        files = [os.open("/dev/null", os.O_RDONLY)] if "FDSTORE" in state else []
        sender.connect(NOTIFY_SOCKET)
        socket.send_fds(sender, [state.encode()], files)


def journal(fields: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(fields.encode(), "/run/systemd/journal/socket")


def read(path: str) -> object:
    with open(path, "rb") as stream:
        return stream.read(200).decode(errors="replace")


def write(path: str, text: str = "forged\n") -> None:
    with open(path, "w") as stream:
        stream.write(text)


def opened(path: str) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def lock(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    KEPT.append(handle)


def flood(lines: str) -> None:
    block = b"\x1b[2J\x1b]0;owned\x07\x9b31m" + bytes(range(256)) + "\u202e\u009b31m flood".encode() + b"\n"
    for _ in range(int(lines)):
        os.write(1, block)
    os.write(1, b"endless" * 20000)


def ptrace(pid: str) -> None:
    checked(LIBC.ptrace(PTRACE_ATTACH, int(pid), None, None))
    os.waitpid(int(pid), 0)
    LIBC.ptrace(PTRACE_DETACH, int(pid), None, None)


def peek(pid: str) -> None:
    """As process_vm_readv(2), and pidfd_getfd(2), both of which the same right decides."""
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(buffer), 8)
    checked(LIBC.process_vm_readv(int(pid), local, 1, local, 1, 0))


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def setuid_copy(directory: str) -> object:
    """A program of our own with the bit set, and those that are there."""
    path = f"{directory}/setuid"
    with open("/usr/bin/id", "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    try:
        os.chmod(path, 0o6755)
        return oct(os.stat(path).st_mode)
    finally:
        os.unlink(path)


def run(*command: str) -> object:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20, check=False
    )
    return done.stdout.decode(errors="replace") or done.returncode


def status() -> object:
    with open("/proc/self/status") as stream:
        return dict(line.rstrip().split(":\t", 1) for line in stream if ":\t" in line)


def squat(port: str, title: str) -> None:
    """A process with a name of its choice that listens where another model is going to."""
    code = (
        "import socket,sys;s=socket.socket();s.setsockopt(1,2,1);s.bind(('127.0.0.1',int(sys.argv[1])));s.listen();"
        "print(flush=True);sys.stdin.read()"
    )
    child = subprocess.Popen(
        ["/usr/bin/python3", "-IS", "-c", code, port, title], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    KEPT.append(child)


def exit_with(status_: str) -> None:
    os._exit(int(status_))


def burst(count: str) -> object:
    """Processes without end, as far as it gets."""
    made = 0
    try:
        for _ in range(int(count)):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            made += 1
    except OSError:
        pass
    return made


ATTEMPTS: dict[str, Callable[..., object]] = {
    "bind": bind,
    "burst": burst,
    "chroot": os.chroot,
    "connect": connect,
    "exit": exit_with,
    "flood": flood,
    "journal": journal,
    "kill": lambda pid, number="0": os.kill(int(pid), int(number)),
    "list": lambda path: os.listdir(path) and None,
    "lock": lock,
    "mkdir": os.mkdir,
    "mknod": lambda path, minor: os.mknod(path, 0o20666, os.makedev(195, int(minor))),
    "mount": lambda: checked(LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -10),
    "notify": notify,
    "open": opened,
    "parent": lambda number="0": os.kill(os.getppid(), int(number)),
    "peek": peek,
    "ptrace": ptrace,
    "read": read,
    "request": request,
    "run": run,
    "setuid": lambda: os.setuid(0),
    "setuid_copy": setuid_copy,
    "sethostname": lambda: socket.sethostname("owned"),
    "signal_all": lambda: os.kill(-1, signal.SIGCONT),
    "squat": squat,
    "status": status,
    "umount": lambda: checked(LIBC.umount2(b"/run/gpusvc", 2)),
    "unlink": os.unlink,
    "write": write,
}

if __name__ == "__main__":
    main()
