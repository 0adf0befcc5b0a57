"""Restart policy and the causes it decides on."""

from __future__ import annotations

import pytest

from enova_agent.core.failure import Cause, Ending, Fault, classify, is_chatter
from enova_agent.core.restart import GiveUp, RestartHistory, RestartPolicy, Retry, decide
from enova_common.backoff import Backoff

POLICY = RestartPolicy(backoff=Backoff(initial_s=1.0, maximum_s=300.0, jitter=0.2), attempts_max=8, window_s=600.0)


def fail(fault: Fault, times: int, *, ready_s: float | None = None) -> tuple[list[Retry | GiveUp], float]:
    """The answers to failures that come as soon as the engine was started again, and when the last came."""
    history, now_s, answers = RestartHistory(), 0.0, []
    for _ in range(times):
        history, answer = decide(
            POLICY, history, cause=Cause(fault=fault, detail="boom"), ready_s=ready_s, now_s=now_s, draw=0.0
        )
        answers.append(answer)
        if isinstance(answer, Retry):
            now_s += answer.delay_s
    return answers, now_s


def test_delays_double_and_the_budget_of_the_window_ends_in_giving_up() -> None:
    answers, now_s = fail(Fault.CRASHED, 9)
    assert [answer.delay_s for answer in answers if isinstance(answer, Retry)] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert isinstance(answers[-1], GiveUp)
    assert "8 restarts" in answers[-1].reason
    assert "boom" in answers[-1].reason
    assert now_s < 600


def test_jitter_shortens_a_delay_by_a_fifth_at_most() -> None:
    _, answer = decide(
        POLICY, RestartHistory(), cause=Cause(fault=Fault.CRASHED, detail=""), ready_s=None, now_s=0.0, draw=0.999
    )
    assert isinstance(answer, Retry)
    assert 0.8 <= answer.delay_s < 0.81


@pytest.mark.parametrize(
    ("fault", "starts"),
    [(Fault.ARGUMENT, 1), (Fault.MODEL, 2), (Fault.GPU_MEMORY, 3), (Fault.HOST_MEMORY, 3), (Fault.EXECUTABLE, 1)],
)
def test_a_start_that_fails_for_its_configuration_is_repeated_twice_at_most(fault: Fault, starts: int) -> None:
    answers, _ = fail(fault, starts)
    assert [type(answer) for answer in answers] == [Retry] * (starts - 1) + [GiveUp]


def test_a_taken_port_is_tried_again_as_often_as_the_budget_allows() -> None:
    answers, _ = fail(Fault.PORT_TAKEN, 8)
    assert all(isinstance(answer, Retry) for answer in answers)


def test_running_out_of_memory_after_it_served_is_a_crash_like_others() -> None:
    answers, _ = fail(Fault.GPU_MEMORY, 8, ready_s=60.0)
    assert all(isinstance(answer, Retry) for answer in answers)


def test_failures_older_than_the_window_and_before_a_long_healthy_time_are_forgiven() -> None:
    history = RestartHistory(times_s=tuple(float(n) for n in range(8)))
    cause = Cause(fault=Fault.CRASHED, detail="")
    _, answer = decide(POLICY, history, cause=cause, ready_s=None, now_s=700.0, draw=0.0)
    assert isinstance(answer, Retry)
    _, answer = decide(POLICY, history, cause=cause, ready_s=400.0, now_s=420.0, draw=0.0)
    assert isinstance(answer, Retry)
    assert answer.delay_s == 1.0
    _, answer = decide(POLICY, history, cause=cause, ready_s=10.0, now_s=420.0, draw=0.0)
    assert isinstance(answer, GiveUp)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", Fault.GPU_MEMORY),
        ("ValueError: No available memory for the cache blocks. Try increasing", Fault.GPU_MEMORY),
        ("ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less than desired", Fault.GPU_MEMORY),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", Fault.HOST_MEMORY),
        ("OSError: [Errno 98] Address already in use", Fault.PORT_TAKEN),
        ("OSError: [Errno 28] No space left on device", Fault.DISK_FULL),
        ("huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name'", Fault.MODEL),
        ("OSError: /m does not appear to have a file named config.json.", Fault.MODEL),
        ("api_server.py: error: unrecognized arguments: --max-num-sequences 4", Fault.ARGUMENT),
        ("  Value error, Sleep mode is not supported on current platform.", Fault.ARGUMENT),
        ("ValueError: No common block size for 16 (CPU_ATTN: [MultipleOf(32)])", Fault.ARGUMENT),
        (
            "  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len "
            "(max_position_embeddings=2048.0 or model_max_length=None in model's config.json).",
            Fault.ARGUMENT,
        ),
        ("ValueError: User-specified max_model_len (9) is greater than the derived max_model_len", Fault.ARGUMENT),
        ("RuntimeError: Failed to infer device type", Fault.GPU_MISSING),
        ("Cannot access gated repo for url https://hub/api/models/org/name.", Fault.HUB_DENIED),
        ("Access to model org/name is restricted and you are not in the authorized list.", Fault.HUB_DENIED),
        ("OSError: You are trying to access a gated repo.", Fault.HUB_DENIED),
        ("Invalid credentials in Authorization header", Fault.HUB_DENIED),
        ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1)", Fault.HUB_MISSING),
        ("OSError: org/x is not a local folder and is not a valid model identifier listed on", Fault.HUB_MISSING),
        ("OSError: v9 is not a valid git identifier (branch name, tag name or commit id)", Fault.HUB_MISSING),
        ("'[Errno 111] Connection refused' thrown while requesting HEAD https://hub/x", Fault.HUB_UNREACHABLE),
        ("OSError: We couldn't connect to 'https://hub' to load the files", Fault.HUB_UNREACHABLE),
        ("something else", Fault.CRASHED),
    ],
)
def test_last_words_name_the_cause(line: str, fault: Fault) -> None:
    cause = classify(Ending(code=1), ["INFO start", line, "  File x.py, line 3", ""])
    assert cause.fault is fault
    assert "exit code 1" in cause.detail
    if fault is not Fault.CRASHED:
        assert line.strip()[:40] in cause.detail


def test_a_silent_end_and_a_kill_still_have_a_reason() -> None:
    assert classify(Ending(code=0), []).detail == "ended with exit code 0, silently"
    assert "signal 9" in classify(Ending(signal=9), ["INFO fine"]).detail
    assert "unknown" in classify(Ending(), []).detail


def test_a_reason_stays_short_however_long_the_line() -> None:
    assert len(classify(Ending(code=1), ["CUDA out of memory " + "x" * 100_000]).detail) <= 400


def test_of_a_dead_core_process_that_is_said_and_not_how_the_server_ended_after_it() -> None:
    lines = [
        'INFO:     127.0.0.1:41546 - "GET /metrics HTTP/1.1" 200 OK',
        "(Worker pid=9) INFO 11-21 14:33:37 [multiproc_executor.py:843] Parent process exited",
        "(APIServer pid=7) WARNING 11-21 14:33:37 [core_client.py:817] MPClient: engine core exited unexpectedly",
        "(APIServer pid=7) ERROR 11-21 14:33:37 [serving.py:500] ValueError: something that followed from it",
        "INFO:     Finished server process [7]",
        "nanobind: leaked 4 instances!",
        ' - leaked type "triton._C.libtriton.ir.location"',
    ]
    cause = classify(Ending(code=0), lines)
    assert cause.fault is Fault.CRASHED
    assert cause.detail.startswith("ended with exit code 0; last words:")
    assert "engine core exited unexpectedly" in cause.detail
    without = classify(Ending(code=0), [line for line in lines if "core" not in line])
    assert "ValueError: something" in without.detail
    assert "Parent process exited" in classify(Ending(code=0), lines[:2]).detail


_GATED = """\
huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-x)

Cannot access gated repo for url https://hub/org/name/resolve/main/config.json.
Access to model org/name is restricted and you are not in the authorized list. Visit https://hub/org/name to ask.

The above exception was the direct cause of the following exception:
ValueError: Invalid repository ID or local directory specified: 'org/name'.
Please verify the following requirements:
   - For Hugging Face models: ensure the presence of a 'config.json'.
"""


def test_what_the_hub_answered_says_more_than_that_the_model_cannot_be_loaded() -> None:
    cause = classify(Ending(code=1), _GATED.splitlines())
    assert cause.fault is Fault.HUB_DENIED
    assert "HF_TOKEN" in cause.detail
    assert "is restricted" in cause.detail


@pytest.mark.parametrize("fault", [Fault.HUB_DENIED, Fault.HUB_MISSING])
def test_what_the_hub_refuses_is_not_asked_again(fault: Fault) -> None:
    answers, _ = fail(fault, 1)
    assert isinstance(answers[0], GiveUp)


def test_bars_of_progress_push_no_last_words_out() -> None:
    assert is_chatter("model-00001-of-00004.safetensors:  12%|#2        | 594M/4.98G [00:10<01:12, 60.4MB/s]")
    assert not is_chatter("ValueError: 12% of x | y")
