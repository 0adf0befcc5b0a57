"""The child process that policies and fits run in: a request a line of work, read from stdin, answered on stdout.

It knows nothing but the recommender. numpy (and later statsmodels) hold the interpreter's lock for as long as they
like here, and may crash: neither delays a heartbeat in the coordinator. It ends when its parent does. Its arguments
are the parent's pid and the kind of its work, for whoever lists processes.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from typing import BinaryIO, assert_never

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
from enova_recommender.scaling import POLICIES

_PR_SET_PDEATHSIG = 1
_NICE = 5  # a fit may take a core for seconds: the coordinator, whose lease is at stake, goes first


def answer(request: Request) -> Answer:
    """What a policy says or a function returns; whatever it raises is an answer too."""
    match request:
        case PolicyRequest():
            return _decided(request)
        case WorkRequest():
            return _worked(request)
        case _:
            assert_never(request)


def _decided(request: PolicyRequest) -> PolicyAnswer:
    try:
        proposal = POLICIES[request.policy].decide(request.observation)
    except Exception as error:  # noqa: BLE001  # a policy's defect must reach the decision's record, whatever it is
        return PolicyAnswer(request.number, error=f"{type(error).__name__}: {error}")
    return PolicyAnswer(request.number, proposal=proposal)


def _worked(request: WorkRequest) -> WorkAnswer:
    try:
        result = request.function(request.argument)
    except Exception as error:  # noqa: BLE001  # a defect of the recommender's is told to whoever asked
        return WorkAnswer(request.number, error=f"{type(error).__name__}: {error}")
    return WorkAnswer(request.number, result=result)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while len(head := requests.read(HEADER.size)) == HEADER.size:
        body = requests.read(HEADER.unpack(head)[0])
        request = pickle.loads(body)  # noqa: S301  # from our parent, over a pipe that only it holds
        answers.write(encode(answer(request)))
        answers.flush()


def main() -> None:
    """Serve until stdin ends, or the parent does (even when this process is stopped then)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is the parent's business
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return  # the parent ended before the line above
    os.nice(_NICE)
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
