"""The command: ``python -m tests.campaign --help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.campaign import plan
from tests.campaign.campaign import Campaign, Tally, ViolationError
from tests.campaign.plan import Step
from tests.campaign.stage import MODELS, Stage
from tests.machine import tree
from tests.machine.container import MachineError
from tests.machine.host import Host, build_package, prepare
from tests.machine.tree import Generation

# Of the journal, what is kept beside a replay. (Not --lines=: with --since= that is the oldest.)
_JOURNAL_LINES = 3000


def main() -> int:
    options = _parse_options()
    generation = Generation(options.generation)
    if options.replay:
        about, steps = plan.read(options.replay)
        generation = Generation(about["generation"])
    else:
        steps = plan.make(options.seed, options.operations, sorted(MODELS))
    deadline = time.monotonic() + options.minutes * 60
    total, failures = Tally(), 0
    with tempfile.TemporaryDirectory() as directory:
        package = build_package(Path(directory, "package"))
        layer = prepare(generation, package)
        say = _say if options.verbose else lambda _: None
        runs = _in_runs(steps) if options.keep_going else [steps]
        try:
            while runs:
                done, error = attempt(
                    layer, generation, package, runs, total, deadline, say, options.replays, pace=options.pace
                )
                if error is None:
                    break
                failures += 1
                print(f"\nVIOLATION after {total.operations} operations:\n{error}", flush=True)
                minimal = done
                if options.shrink:
                    minimal = shrink(layer, generation, package, done, deadline, options.replays)
                file = Path(options.replays, f"campaign-{generation}-{options.seed}-{failures}.jsonl")
                plan.write(file, minimal, generation=generation, seed=options.seed)
                print(f"To do it again: python -m tests.campaign --replay {file}  ({len(minimal)} steps)", flush=True)
                if not options.keep_going or time.monotonic() > deadline:
                    break
        finally:
            layer.close()
    print(summary(generation, options.seed, total, failures))
    return 1 if failures else 0


def attempt(
    layer: Host,
    generation: Generation,
    package: Path,
    runs: list[list[Step]],
    total: Tally,
    deadline: float,
    say: Callable[[str], None],
    replays: Path,
    *,
    pace: float = 0.0,
) -> tuple[list[Step], Exception | None]:
    """Does runs of steps on a machine of its own until one fails.

    Returns what was done since all was as new, and how it failed.
    """
    done: list[Step] = []
    with Stage(layer.layer, tree.ensure(generation)) as stage:
        stage.boot()
        stage.furnish(package)
        campaign = Campaign(stage, say=say)
        campaign.tally = total
        try:
            while runs:
                for step in runs.pop(0):
                    done.append(step)
                    campaign.do(step)
                    time.sleep(pace)
                    if step.kind == "settle":
                        done.clear()
                        if total.settlings % 10 == 0:
                            print(f"{total.operations} operations in {total.seconds:.0f} s", flush=True)
                    if time.monotonic() > deadline:
                        runs.clear()
                        break
        except (ViolationError, MachineError, OSError) as error:
            with suppress(MachineError):
                file = Path(replays, f"campaign-{generation}-{time.time():.0f}.journal")
                file.write_text("".join(stage.journal(None).splitlines(keepends=True)[-_JOURNAL_LINES:]))
            return done, error
        finally:
            campaign.close()
    return done, None


def shrink(
    layer: Host, generation: Generation, package: Path, steps: list[Step], deadline: float, replays: Path
) -> list[Step]:
    """Fewer steps that fail as well, as far as time allows. As much hangs on the moment, each set is tried twice."""

    def fails(candidate: list[Step]) -> bool:
        settled = candidate if candidate and candidate[-1].kind == "settle" else [*candidate, Step("settle")]
        for _ in range(2):
            if time.monotonic() > deadline:
                return False
            if (
                attempt(layer, generation, package, [settled], Tally(), deadline, lambda _: None, replays)[1]
                is not None
            ):
                return True
        return False

    size = max(1, len(steps) // 2)
    while size:
        start = 0
        while start < len(steps):
            candidate = steps[:start] + steps[start + size :]
            if candidate and fails(candidate):
                steps = candidate
            else:
                start += size
        size //= 2
    return steps


def summary(generation: str, seed: int, tally: Tally, failures: int) -> str:
    """What was done and seen, in numbers."""
    rate = tally.operations / tally.seconds if tally.seconds else 0.0
    lines = [
        f"{generation}, seed {seed}: {tally.operations} operations in {tally.seconds:.0f} s ({rate:.1f}/s)",
        f"looks: {tally.looks}; violations: {failures}",
        f"requests answered: {sum(tally.statuses.values())}: {_counts(tally.statuses)}",
        f"uses by flock: {tally.holds}; models seen stuck: {tally.stuck}; cooldowns at a settling: {tally.cooldowns}",
        f"quiet connections: {tally.connections}; probes answered: {_counts(tally.probes)}",
        f"clients of short patience served: {tally.insisted}; verdicts: {_counts(tally.verdicts)}",
        f"settlings: {tally.settlings}, the longest {tally.longest_settling_seconds:.1f} s",
        f"operations: {_counts(tally.steps)}",
    ]
    lines += [f"traceback in the journal:\n{text}" for text in tally.tracebacks[:3]]
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _in_runs(steps: Sequence[Step]) -> list[list[Step]]:
    runs: list[list[Step]] = [[]]
    for step in steps:
        runs[-1].append(step)
        if step.kind == "settle":
            runs.append([])
    return [run for run in runs if run]


def _say(text: str) -> None:
    print(f"{time.monotonic():.3f} {text}", flush=True)


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Random operations and faults.")
    add = parser.add_argument
    add("--seed", type=int, default=1)
    add("--operations", type=int, default=300)
    add("--minutes", type=float, default=30.0, help="end after so long, however many operations that were")
    add("--pace", type=float, default=0.0, metavar="SECONDS", help="pause after each step, as others work here")
    add("--generation", default="trixie", choices=[str(one) for one in Generation])
    add("--replay", type=Path, metavar="FILE", help="do these steps again")
    add("--replays", type=Path, default=Path(tempfile.gettempdir()), metavar="DIRECTORY", help="where replays go")
    add("--shrink", action="store_true", help="look for fewer steps that fail as well")
    add("--keep-going", action="store_true", help="go on, on a new machine, after a violation")
    add("--verbose", action="store_true", help="say each step")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
