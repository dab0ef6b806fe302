"""What a model's unit wrote, as journalctl(1) gives it: the engine's lines, gpusvc's and systemd's."""

from __future__ import annotations

from gpusvc import unitlog


def last_lines(name: str, lines: int, *, since: float | None = None) -> list[str]:
    """The engine's and gpusvc's last ones, oldest first; none if the caller may not read them.

    Args:
        name: the model.
        lines: how many.
        since: not those before that, in seconds since the epoch.
    """
    import subprocess  # noqa: PLC0415  most commands ask nobody

    options = [f"--lines={lines}", "--output=cat", "--no-pager", "--quiet"]
    if since is not None:
        options.append(f"--since=@{since:.6f}")
    try:
        # Lines written a moment ago may be in journald's socket still; only root may ask it to read on.
        subprocess.run(["journalctl", "--sync"], check=False, capture_output=True, timeout=2)  # noqa: S607
        command = ["journalctl", *unitlog.own_lines(name), *options]
        done = subprocess.run(command, check=False, capture_output=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
