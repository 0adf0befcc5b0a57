"""Policies in a child process, each call under a deadline: a child that crashes or hangs is killed and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from enova_common.errors import FatalError, TimedOut, Unavailable
from enova_coordinator.policy_messages import (
    HEADER,
    Answer,
    PolicyAnswer,
    PolicyRequest,
    Request,
    WorkAnswer,
    WorkRequest,
    encode,
)
from enova_recommender.scaling.types import Observation, Proposal

ANSWER_BYTES_MAX = 1 << 20

Argument = TypeVar("Argument")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class PolicyRaised(FatalError):
    """The policy or function itself raised: its defect, which costs its answer and nothing else."""

    reason = "POLICY_RAISED"


@dataclass(slots=True)
class PolicyProcessFigures:
    """How the child fared, for the coordinator's own metrics."""

    calls: int = 0
    starts: int = 0
    timeouts: int = 0
    crashes: int = 0


class PolicyProcess:
    """One child for one kind of work, started when it is needed, one call at a time.

    `work` is what `ps` shows of it; each kind has a child of its own, so that none waits for another.
    """

    def __init__(self, *, timeout_s: float, start_timeout_s: float = 20.0, work: str = "policies") -> None:
        self.figures = PolicyProcessFigures()
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._work = work
        self._process: asyncio.subprocess.Process | None = None
        self._fresh = False                # not answered yet: it may still be importing numpy
        self._lock = asyncio.Lock()
        self._number = 0

    @property
    def pid(self) -> int | None:
        """The child's pid while there is one."""
        return self._process.pid if self._process is not None else None

    async def decide(self, policy: str, observation: Observation) -> Proposal:
        """What the policy proposes. Raises PolicyRaised, TimedOut or Unavailable (the next call starts a new child)."""
        async with self._lock:
            self.figures.calls += 1
            self._number += 1
            answer = await self._call(PolicyRequest(self._number, policy, observation), self._timeout_s)
        assert isinstance(answer, PolicyAnswer)
        if answer.proposal is None:
            raise PolicyRaised(f"policy {policy} raised {answer.error}", metadata={"policy": policy})
        return answer.proposal

    async def run(
        self, function: Callable[[Argument], Result], argument: Argument, *, timeout_s: float | None = None
    ) -> Result:
        """What a module-level function of the recommender returns, computed in the child.

        Raises as `decide` does. Policies wait meanwhile: `timeout_s` is for what takes longer than a policy may.
        """
        async with self._lock:
            self._number += 1
            request = WorkRequest(self._number, function, argument)
            answer = await self._call(request, timeout_s or self._timeout_s)
        assert isinstance(answer, WorkAnswer)
        if answer.error:
            raise PolicyRaised(f"{function.__name__} raised {answer.error}", metadata={"function": function.__name__})
        return cast("Result", answer.result)

    async def close(self) -> None:
        """End the child."""
        async with self._lock:
            await self._end()

    async def _call(self, request: Request, timeout_s: float) -> Answer:
        try:
            process = await self._running()
            if self._fresh:
                timeout_s = max(timeout_s, self._start_timeout_s)
            async with asyncio.timeout(timeout_s):
                answer = await _exchange(process, request)
        except TimeoutError as error:
            self.figures.timeouts += 1
            await self._end()
            text = f"the policy's process did not answer within {timeout_s:g} s"
            raise TimedOut(text, reason="POLICY_HUNG") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            self.figures.crashes += 1
            await self._end()
            raise Unavailable("the policy's process ended before it answered", reason="POLICY_CRASHED") from error
        except BaseException:
            await self._end()  # a call that was given up leaves an answer in the pipe: the next must not read it
            raise
        self._fresh = False
        return answer

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self.figures.starts += 1
            self._fresh = True
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "enova_coordinator.policy_child", str(os.getpid()), self._work,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            log.info("%s: process %d works on them", self._work, self._process.pid)
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def _exchange(process: asyncio.subprocess.Process, request: Request) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(encode(request))
    await process.stdin.drain()
    size = HEADER.unpack(await process.stdout.readexactly(HEADER.size))[0]
    if size > ANSWER_BYTES_MAX:
        raise OSError(f"an answer of {size} bytes")
    answer: Answer = pickle.loads(await process.stdout.readexactly(size))  # noqa: S301  # from our own child
    assert answer.number == request.number, (answer.number, request.number)
    return answer
