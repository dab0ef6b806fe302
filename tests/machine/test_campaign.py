"""A short campaign on each generation: what a thousand random faults must not do, a hundred of them must not either.

The long one is run by hand: ``python -m tests.campaign --help``, and docs/reliability.md for what it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.campaign import plan
from tests.campaign.__main__ import summary
from tests.campaign.campaign import Campaign, ViolationError
from tests.campaign.stage import MODELS, Stage
from tests.machine import tree

if TYPE_CHECKING:
    from pathlib import Path

    from tests.machine.conftest import Layers
    from tests.machine.tree import Generation

OPERATIONS = 110
SEEDS = {"bookworm": 12, "trixie": 13, "forky": 14}


def test_nothing_is_lost_whatever_happens(generation: Generation, layers: Layers, tmp_path: Path) -> None:
    steps = plan.make(SEEDS[generation], OPERATIONS, sorted(MODELS), heavy=False, settle_every=OPERATIONS // 2)
    with Stage(layers.prepared(generation).layer, tree.ensure(generation)) as stage:
        stage.boot()
        stage.furnish(layers.package())
        campaign = Campaign(stage)
        done: list[plan.Step] = []
        try:
            for step in steps:
                done.append(step)
                campaign.do(step)
        except ViolationError as error:
            plan.write(tmp_path / "replay.jsonl", done, generation=str(generation), seed=SEEDS[generation])
            pytest.fail(f"{error}\npython -m tests.campaign --replay {tmp_path / 'replay.jsonl'}\n{stage.journal()}")
        finally:
            campaign.close()
    print(summary(generation, SEEDS[generation], campaign.tally, 0))
    assert campaign.tally.operations == OPERATIONS
    assert campaign.tally.statuses["200"] > 0
