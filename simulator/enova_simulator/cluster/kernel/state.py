"""The continuous-batching scheduler of `enova_recommender.engine` for many replicas at once, on arrays, compiled.

Theory of operation. A row of each array of `State` is one replica (or one request), a column one figure; the numbers
of the columns are the constants below. The functions are those of the pure scheduler, with the same names and in the
same order, and a property test holds them equal: same admissions, preemptions and tokens, times within 1e-9 s. Beyond
that a replica knows when it next changes visibly (NEXT), so that only those that are due need be advanced.

Two things differ from the pure scheduler. Requests are submitted when they arrive, never ahead of time; and there is
no bound on queued requests here: the gate of `enova_agent.core.admission` stands before each engine.

What is compiled is kept beside `engines.py`; numba notices no change in the other modules: after one, touch that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]

F = TypeVar("F", bound=Callable[..., object])


class Tables(NamedTuple):
    """Step times of each kind of replica, on knots; see `tables.tabulated`."""

    tokens: Floats         # kinds x tokens of a step with a prompt part
    mixed: Floats          # kinds x decoding sequences beside a prompt part
    decode: Floats         # kinds x decoding sequences alone
    context: Floats        # kinds x decoding sequences x knots of the context
    context_knots: Floats
    pairs: Floats          # kinds x knots of prompt tokens x knots of pairs
    prompt_knots: Floats
    pair_knots: Floats


class State(NamedTuple):
    """All replicas and all requests."""

    engines: Longs
    clocks: Floats
    running: Ints          # replicas x places, in the order of admission
    prefills: Ints         # replicas x places x (request, tokens) of the step in flight
    phases: Ints           # replicas x block size
    requests: Ints
    times: Floats
    hashes: Longs          # block hashes of all requests, one after another
    is_shared: Bytes       # of each of them, whether its request holds a shared block for it
    buckets: Ints          # replicas x buckets
    node_hashes: Longs     # replicas x blocks
    nodes: Ints            # replicas x blocks x columns
    limits: Longs
    log: Ints              # entries x (kind, replica, request)
    log_times: Floats
    control: Longs
    tables: Tables


_JIT: Any = numba.njit     # its types leave out options that it takes


def compiled(function: F) -> F:
    """The function as machine code, for other compiled functions alone: wrappers would double the time to compile."""
    return cast(F, _JIT(no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def exported(function: F) -> F:
    """The function as machine code with all that it calls, kept on disk between runs; Python may call it."""
    return cast(F, _JIT(cache=True, no_cfunc_wrapper=True)(function))
