"""The gateway's own processes, as its unit runs them, in front of whatever listens on a port: no systemd, no API.

A model that runs is its file, its locks, and a lease that names the port.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from gpusvc.config import keys
from gpusvc.paths import Paths
from gpusvc.state import counters, use
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease
from tests.component.conftest import ROOT

_BEGIN_SECONDS = 20.0

# `python3 -m gpusvc.gateway` with other roots, and with its socket where systemd would put it.
_PROGRAM = """
import os, sys
from pathlib import Path
from gpusvc.gateway.__main__ import main
from gpusvc.paths import Paths
root = Path(sys.argv[1])
Paths.system = classmethod(lambda cls: cls(config=root / "etc", runtime=root / "run", state=root / "state"))
os.dup2(int(sys.argv[2]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
sys.exit(main())
"""


class ServedGateway:
    """A gateway on the files of one directory. Its models and keys may be changed at any time."""

    def __init__(self, directory: Path) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
        self.paths.models_directory.mkdir(parents=True)
        counters.directory(self.paths).mkdir(parents=True)
        self._directory = directory
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, **settings: object) -> None:
        """``[gateway]`` of the host's file; numbers and booleans, or text."""
        lines = [f"{name} = {_toml(value)}" for name, value in settings.items()]
        self.paths.host_file.write_text("\n".join(["[gateway]", *lines, ""]))

    def add_key(self, *models: str) -> str:
        """Another key; its secret. As long as there is none, nobody needs one."""
        file = keys.file_of(self.paths)
        known = keys.read(file) if file.exists() else []
        key, secret = keys.make(f"key{len(known)}", models=models)
        file.write_text(keys.text([*known, key]))
        return secret

    def add_model(self, name: str, text: str = "") -> None:
        """One that does not run. ``text`` is for more keys of its file."""
        self.paths.model_file(name).write_text(f'command = ["/bin/true"]\n{text}')

    def run_model(self, name: str, port: int, text: str = "") -> None:
        """One that runs, and listens on ``port``."""
        self.add_model(name, text)
        use.prepare(self.paths, name, os.getegid())
        leases.write(self.paths, Lease(name, port, (), time.time(), ready=True, address="127.0.0.1", pid=os.getpid()))

    @property
    def pids(self) -> list[int]:
        """Of the processes that serve."""
        assert self._process is not None
        main = self._process.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [int(pid) for pid in children] or [main]

    def __enter__(self) -> Self:
        """Start it; whoever connects from now on is served in time."""
        listener = self._socket.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(self._directory), str(listener)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": ""},
            pass_fds=(listener,),
        )
        self._await_health()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        try:
            self._process.terminate()
            # A test may have left somebody waiting: asked twice it drops him.
            self._process.terminate()
            self._process.wait(_BEGIN_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self.close()

    def close(self) -> None:
        """For who never started it."""
        self._socket.close()

    def _await_health(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), _BEGIN_SECONDS) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200"), answer


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
