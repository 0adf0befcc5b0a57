"""Asks the simulator's plan, a process of its own that needs no coordinator: JSON in, JSON out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from enova_common.errors import FatalError, InvalidField, TimedOut

TIMEOUT_S = 3600.0

Plain = dict[str, Any]             # Any: JSON


def ask_plan(command: str, question: Plain, *, options: Collection[str], remedy: str) -> Plain:
    """The plan's answer to a question. Raises InvalidField for what is wrong with it.

    `options`: fields that users give as options of that name; `remedy`: against an answer that takes too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "enova_simulator.plan", command],
            input=json.dumps(question), capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"no answer within {TIMEOUT_S:g} s", remedy=remedy) from error
    if done.returncode == 0:
        # The solver that it uses prints a line of its own now and then: the answer is the last.
        answer: Plain = json.loads(done.stdout.strip().rpartition("\n")[2])
        return answer
    last = done.stderr.strip().rpartition("\n")[2]
    try:
        told = json.loads(last)
    except ValueError as error:
        raise FatalError(f"enova_simulator.plan failed: {last}", reason="SIMULATION_FAILED") from error
    field = told["field"]
    raise InvalidField(told["message"], field=f"--{field}" if field in options else field, remedy=told["remedy"])
