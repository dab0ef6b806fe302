"""The parsers of what strangers send, under a fuzzer that sees which branches its input takes (atheris).

``python -m tests.fuzz fields --seconds 600`` looks for an input that breaks what ``targets`` says of a parser. It is
run by hand: hours find what a test's seconds do not. ``tests/unit/test_fuzz_targets.py`` keeps the targets true.
"""
