"""The fault campaign: random operations and faults on a booted machine, and what must hold after each of them.

    python -m tests.campaign --seed 7 --operations 10000 --minutes 60 --generation trixie

``plan.py`` makes steps out of a seed, ``stage.py`` is the machine, ``users.py`` are those who use its models,
``observer.py`` looks at all of it from outside, and ``invariants.py``, which is pure, says what of that must never be.
``patience.py`` remembers wedged engines and quiet connections.
``campaign.py`` does one step after the other. It needs what the machine tests need.
"""
