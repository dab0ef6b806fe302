"""The command: ``python -m tests.fuzz --help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    options = _parse_options()
    try:
        import atheris  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415  it is in no list of what the tests need
    except ImportError:
        sys.exit("python -m tests.fuzz: atheris is not installed: pip install atheris")
    with atheris.instrument_imports(include=["gpusvc"]):
        from tests.fuzz.targets import LONGEST_BYTES, TARGETS  # noqa: PLC0415

    if options.target not in TARGETS:
        sys.exit(f"python -m tests.fuzz: there is no target {options.target!r}: {', '.join(TARGETS)}.")
    target = TARGETS[options.target]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, f"seed{number}").write_bytes(seed)
        limits = [
            f"-max_total_time={options.seconds}",
            f"-max_len={LONGEST_BYTES}",
            "-timeout=10",
            "-rss_limit_mb=4096",
        ]
        where = [f"-artifact_prefix={options.findings}/{options.target}-"]
        atheris.Setup([sys.argv[0], *limits, *where, "-print_final_stats=1", corpus], target.check)
        atheris.Fuzz()


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Coverage-guided fuzzing of a parser.")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()), metavar="DIRECTORY")
    return parser.parse_args()


if __name__ == "__main__":
    main()
