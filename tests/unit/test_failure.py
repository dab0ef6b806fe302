"""What a person is told of a start that failed: the reason once, and what else the log says."""

from __future__ import annotations

import pytest

from gpusvc.errors import NO_ROOM_STATUS
from gpusvc.status.failure import NoRoomError, StartError, StoppedError, is_told_by_log, parted, why_not
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.units import ActiveState, ServiceStatus, Unit

ENDED = "The engine ended with exit status 7 before it was ready; its last words: CUDA error"
REFUSED = "qwen needs 9.0 GiB on a GPU, and this machine does not have that free now. GPU 0 (A): 1.0 GiB free."
REFUSED_IN_LINES = [
    "qwen needs 9.0 GiB on a GPU, and this machine does not have that free now.",
    "GPU 0 (A): 1.0 GiB free.",
    "`gpusvc gpus` shows who holds what.",
]


def said(text: str, *, exit_status: int = 1, result: str = "exit-code") -> ServiceStatus:
    return ServiceStatus(text, result, exit_status, 0.0)


def unit(sub: str = "failed") -> Unit:
    return Unit("model@qwen.service", ActiveState.FAILED, sub, "/")


def failed(text: str, *lines: str, sub: str = "failed", in_lines: bool = False) -> StartError:
    error = why_not("qwen", JobResult.FAILED, unit(sub), said(text), lines, in_lines=in_lines)
    assert isinstance(error, StartError)
    return error


def test_the_reason_and_the_line_that_it_quotes_are_said_once() -> None:
    error = failed(ENDED, "loading", "CUDA error", "more", "CUDA error", ENDED, "released", in_lines=True)
    assert error.message == f"qwen did not start. {ENDED}"
    assert error.log == ("loading", "CUDA error", "more", "released")


def test_a_program_gets_all_lines_of_the_engine() -> None:
    assert failed(ENDED, "loading", "CUDA error", ENDED).log == ("loading", "CUDA error")


def test_a_reason_in_several_lines_is_said_once_in_one() -> None:
    error = failed(REFUSED, "loading", *REFUSED_IN_LINES)
    assert error.message == f"qwen did not start. {REFUSED}"
    assert error.log == ("loading", REFUSED_IN_LINES[2])


def test_a_person_reads_a_reason_in_its_own_lines() -> None:
    error = failed(REFUSED, "loading", *REFUSED_IN_LINES, in_lines=True)
    assert error.message == "qwen did not start. " + "\n".join(REFUSED_IN_LINES[:2])
    assert error.log == ("loading", REFUSED_IN_LINES[2])


def test_a_reason_that_was_cut_off_is_found_in_the_log() -> None:
    assert parted(REFUSED[:90] + "…", REFUSED_IN_LINES) == (REFUSED_IN_LINES[:2], REFUSED_IN_LINES[2:])


def test_a_line_with_the_reason_and_a_hint_is_the_reason() -> None:
    assert parted("It failed.", ["It failed. Try again."]) == (["It failed. Try again."], [])


@pytest.mark.parametrize("reason", ["It failed.", ""])
def test_a_log_without_the_reason_is_left_as_it_is(reason: str) -> None:
    assert parted(reason, ["It", "did something"]) == ([], ["It", "did something"])


def test_a_service_that_reports_nothing_is_described_by_systemds_words() -> None:
    assert failed("").message == "qwen did not start. systemd calls it exit-code, exit status 1."


def test_a_restart_to_come_is_hinted_at() -> None:
    assert failed("It failed.", sub="auto-restart").hint == (
        "systemd tries again; `gpusvc stop qwen` ends that. `gpusvc logs qwen` shows all of its log."
    )


def test_a_refusal_is_no_failure_of_the_model() -> None:
    refused = why_not("qwen", JobResult.FAILED, unit(), said(REFUSED, exit_status=NO_ROOM_STATUS))
    assert isinstance(refused, NoRoomError)
    assert str(refused) == f"qwen did not start. {REFUSED} `gpusvc gpus` shows which model holds what."


def test_a_person_reads_the_refusal_with_its_own_hint() -> None:
    status = said(REFUSED, exit_status=NO_ROOM_STATUS)
    refused = why_not("qwen", JobResult.FAILED, unit(), status, REFUSED_IN_LINES, in_lines=True)
    assert str(refused) == "qwen did not start. " + "\n".join(REFUSED_IN_LINES)


def test_a_stop_meanwhile_is_no_failure_of_the_model() -> None:
    assert isinstance(why_not("qwen", JobResult.CANCELED, None, None), StoppedError)


def test_a_unit_that_the_model_requires_is_looked_for_with_systemctl() -> None:
    error = why_not("qwen", JobResult.DEPENDENCY, None, None)
    assert "a unit that it requires failed" in error.message
    assert error.hint == "See `systemctl status model@qwen.service`."


@pytest.mark.parametrize(
    ("result", "exit_status", "needed"),
    [
        (JobResult.FAILED, 1, True),
        (JobResult.TIMEOUT, 0, True),
        (JobResult.FAILED, NO_ROOM_STATUS, False),
        (JobResult.CANCELED, 1, False),
        (JobResult.DEPENDENCY, 1, False),
    ],
)
def test_the_log_is_read_only_for_a_failure(result: JobResult, exit_status: int, *, needed: bool) -> None:
    assert is_told_by_log(result, said("", exit_status=exit_status)) is needed
