"""How long steps take, read from tables."""

from __future__ import annotations

import numpy as np

from enova_simulator.cluster.kernel.state import Floats, Tables, compiled, exported


@compiled
def _place(knots: Floats, point: float) -> int:
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if knots[middle] <= point:
            low = middle
        else:
            high = middle
    return low


@compiled
def _along(knots: Floats, values: Floats, point: float) -> float:
    low = _place(knots, point)
    share = (point - knots[low]) / (knots[low + 1] - knots[low])
    return float(values[low] + share * (values[low + 1] - values[low]))


@compiled
def step_time(tables: Tables, kind: int, prefill: tuple[int, int], decode: int, context: int) -> float:
    """Duration of one step; `prefill` are prompt tokens and their pairs."""
    prompts, pairs = prefill
    read = _along(tables.context_knots, tables.context[kind, decode], context) if decode else 0.0
    if prompts == 0:
        return float(tables.decode[kind, decode] + read)
    low = _place(tables.prompt_knots, prompts)
    share = (prompts - tables.prompt_knots[low]) / (tables.prompt_knots[low + 1] - tables.prompt_knots[low])
    below = _along(tables.pair_knots, tables.pairs[kind, low], pairs)
    above = _along(tables.pair_knots, tables.pairs[kind, low + 1], pairs)
    own = tables.tokens[kind, prompts + decode] + tables.mixed[kind, decode]
    return float(own + read + below + share * (above - below))


@compiled
def run_time(tables: Tables, kind: int, decode: int, context: int, steps: int) -> float:
    """Duration of so many steps in a row that only decode the same sequences; exact on each piece of the context."""
    knots, values = tables.context_knots, tables.context[kind, decode]
    total = tables.decode[kind, decode] * steps
    done = 0
    low = _place(knots, context)
    while done < steps:
        first = context + done * decode
        while low < len(knots) - 2 and knots[low + 1] <= first:
            low += 1
        count = steps - done
        if low < len(knots) - 2:
            count = min(count, int(np.ceil((knots[low + 1] - first) / decode)))
        slope = (values[low + 1] - values[low]) / (knots[low + 1] - knots[low])
        middle = first + decode * (count - 1) / 2.0
        total += count * (values[low] + slope * (middle - knots[low]))
        done += count
    return float(total)


@exported
def step_seconds(tables: Tables, kind: int, prefill: tuple[int, int], decode: int, context: int) -> float:
    """`step_time`, for Python."""
    return step_time(tables, kind, prefill, decode, context)


@exported
def run_seconds(tables: Tables, kind: int, decode: int, context: int, steps: int) -> float:
    """`run_time`, for Python."""
    return run_time(tables, kind, decode, context, steps)
