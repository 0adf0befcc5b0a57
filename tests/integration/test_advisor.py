"""The recommender's processes: a fleet is asked about in several at once, and only the first outlives the question."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from enova_common.errors import InvalidField
from enova_coordinator.advisor import Advisor
from enova_coordinator.policy_process import PolicyProcess
from enova_recommender.recommend.fleet import FleetOptions, OptionsQuestion

pytestmark = pytest.mark.network  # child processes

CORES = 3
GPU_TYPES = ("H100", "A100-80G", "L40S", "H200", "B200")


def question(gpu_type: str) -> OptionsQuestion:
    """What may run of one deployment where there are GPUs of one type."""
    return OptionsQuestion(request={
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "gpus": [{"type": gpu_type, "count": 1, "price_per_hour": 1.0}],
        "workload": {"requests_per_s": 0.01, "prompt_tokens": {"p50": 512}, "output_tokens": {"p50": 128}},
    })  # fmt: skip


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[PolicyProcess]:
    """Those that an advisor made on a host of three cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(CORES)))
    return []


@pytest.fixture
def advisor(children: list[PolicyProcess]) -> Advisor:
    def new_process() -> PolicyProcess:
        children.append(PolicyProcess(timeout_s=60.0, work="advice"))
        return children[-1]

    return Advisor(new_process, now_s=time.time, creation_wait_s=1.0)


async def test_a_fleet_is_asked_about_in_as_many_processes_as_cores(
    advisor: Advisor, children: list[PolicyProcess]
) -> None:
    async with advisor.fleet() as ask:
        answers: list[FleetOptions] = await asyncio.gather(*(ask(question(kind)) for kind in GPU_TYPES))
        pids = [child.pid for child in children]
        assert len(set(pids) - {None}) == CORES
    assert [{each.settings.gpu.name for each in answer.options} for answer in answers] == [{k} for k in GPU_TYPES]
    assert [child.pid for child in children] == [pids[0], None, None]
    assert [psutil.pid_exists(pid) for pid in pids if pid is not None] == [True, False, False]
    await advisor.close()
    assert children[0].pid is None


async def test_a_question_that_cannot_be_answered_costs_no_other_one_its_process(
    advisor: Advisor, children: list[PolicyProcess]
) -> None:
    wrong = OptionsQuestion(request={**question("H100").request, "gpus": []})
    async with advisor.fleet() as ask:
        answers = await asyncio.gather(
            *(ask(each) for each in (*[wrong] * 2 * CORES, question("H100"))), return_exceptions=True
        )
    assert [type(each) for each in answers] == [InvalidField] * 2 * CORES + [FleetOptions]
    assert sum(child.figures.starts for child in children) == CORES
    await advisor.close()


async def test_a_fleet_that_is_given_up_leaves_no_process_behind(
    advisor: Advisor, children: list[PolicyProcess]
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), advisor.fleet() as ask:
            await asyncio.gather(*(ask(question(kind)) for kind in GPU_TYPES))
    assert [child.pid for child in children[1:]] == [None, None]
    async with asyncio.timeout(30), advisor.fleet() as ask:
        assert (await ask(question("H100"))).options
    await advisor.close()
