"""What a server's measured figures would be by given step times, under the load it was measured with.

Closed loop: so many clients begin at once and send ROUNDS requests each. In a cycle of a client the engine computes
every client's prompt once and as many decode steps as answers have tokens:

    cycle = output_tokens x decode step + clients x prompt
    TTFT  = (1 + (clients - 1) / 2 / ROUNDS) x prompt + first_token_steps x decode step + first_token_s
    TPOT  = (cycle - TTFT) / (output_tokens - 1)

where `prompt` is what the prompt's chunks add to the decode steps they share. The term with ROUNDS is the first round,
in which all prompts stand in one queue. Clients whose requests find no room in the KV cache wait for others' to end.
Batch: prompts are computed in whole chunks, then all decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.memory import fit
from enova_recommender.performance import Constants, KernelClass, KernelTimes, StepTimes
from enova_recommender.types import Batch
from enova_testing.latency_rows import Load, Row

BLOCK_TOKENS = 16
ROUNDS = 10              # requests of each client: usual for benchmarks of serving, no set says
CHUNK_TOKENS = 8192      # max_num_batched_tokens of vLLM's server on these GPUs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Predicted seconds and tokens a second."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The batches that a row's figures are made of: one decode step, and those with chunks of a prompt."""

    decode: Batch
    chunks: tuple[Batch, ...]
    around: Batch | None     # that decode in the steps with chunks; None: no others
    clients: int             # of one data-parallel rank


def loop_of(row: Row) -> Loop:
    """The batches of a closed loop, of one data-parallel rank, at the mean length of the answers under way."""
    clients = max(1, min(round(row.concurrency / row.parallelism.data), most_running(row)))
    context = round(row.prompt_tokens + row.output_tokens / 2)
    others = clients - 1
    around = Batch(decode_sequences=others, context_tokens=others * context) if others else None
    return Loop(
        decode=Batch(decode_sequences=clients, context_tokens=clients * context),
        chunks=tuple(
            Batch(prefill_tokens=chunk, prefill_pairs=pairs, decode_sequences=others, context_tokens=others * context)
            for chunk, pairs in _chunks(row.prompt_tokens)
        ),
        around=around, clients=clients,
    )  # fmt: skip


def most_running(row: Row) -> int:
    """Sequences of the row's mean length that the KV cache of one rank holds, by the memory model; at least one."""
    tokens = row.prompt_tokens + row.output_tokens / 2
    room = fit(row.shape, row.gpu, parallelism=row.parallelism, precision=row.precision)
    return max(1, int(room.kv_blocks * BLOCK_TOKENS / tokens))


def _chunks(tokens: int) -> Iterator[tuple[int, int]]:
    """Tokens and pairs of the chunks of one prompt."""
    for done in range(0, tokens, CHUNK_TOKENS):
        chunk = min(CHUNK_TOKENS, tokens - done)
        yield chunk, chunk * done + chunk * (chunk + 1) // 2


def predicted(row: Row, times: StepTimes, constants: Constants) -> Figures:
    """The figures of a row."""
    return _closed(row, times, constants) if row.load is Load.CLOSED else _batch(row, times)


def _closed(row: Row, times: StepTimes, constants: Constants) -> Figures:
    loop = loop_of(row)
    decode = times.step_s(loop.decode)
    beside = times.step_s(loop.around) if loop.around else 0.0
    prompt = sum(times.step_s(chunk) - beside for chunk in loop.chunks)
    return closed_figures(row, loop.clients, decode_s=decode, prompt_s=prompt, constants=constants)


def closed_figures(
    row: Row, clients: int, *, decode_s: float, prompt_s: float, constants: Constants
) -> Figures:
    """The formulas above."""
    cycle = row.output_tokens * decode_s + clients * prompt_s
    queued = (1 + (clients - 1) / 2 / ROUNDS) * prompt_s
    ttft = queued + constants.first_token_delay.after_s(decode_s)
    tpot = max(cycle - ttft, decode_s) / max(1, row.output_tokens - 1)
    turns = max(1.0, row.concurrency / row.parallelism.data / clients)  # of those that run, until a request is answered
    return Figures(
        ttft_s=ttft + (turns - 1) * cycle, tpot_s=tpot,
        tokens_per_s=row.concurrency * row.output_tokens / (turns * cycle),
    )  # fmt: skip


def _batch(row: Row, times: StepTimes) -> Figures:
    batch, prompt = int(row.concurrency), row.prompt_tokens
    together = max(1, CHUNK_TOKENS // prompt)
    prefill = 0.0
    for done in range(0, batch, together):
        prompts = min(together, batch - done)
        prefill += sum(
            times.step_s(Batch(prefill_tokens=prompts * chunk, prefill_pairs=prompts * pairs))
            for chunk, pairs in _chunks(prompt)
        )
    decode = times.decode_run_s(sequences=batch, context_tokens=batch * prompt, steps=row.output_tokens)
    tokens = batch * (prompt + row.output_tokens)
    return Figures(ttft_s=prefill, tpot_s=decode / row.output_tokens, tokens_per_s=tokens / (prefill + decode))


# What a fit needs: the same figures as sums over kernel classes.

CLASSES = tuple(kind for kind in KernelClass if kind is not KernelClass.HOST)
FEATURES = len(CLASSES) + 3  # the host's: steps, steps with prompts, sequences


def features(times: KernelTimes, batch: Batch) -> Floats:
    """Seconds of one step by class at unit factors, then its counts that the host's constants multiply."""
    shares = times.shares(batch)
    host = (1.0, float(batch.prefill_tokens > 0), float(batch.decode_sequences))
    return np.array([*(shares[kind] for kind in CLASSES), *host])


def loop_features(times: KernelTimes, row: Row) -> tuple[Floats, Floats, int]:
    """Features of a closed loop's decode step and of its prompt, and the clients of one rank."""
    loop = loop_of(row)
    beside = features(times, loop.around) if loop.around else np.zeros(FEATURES)
    prompt = sum((features(times, chunk) - beside for chunk in loop.chunks), np.zeros(FEATURES))
    return features(times, loop.decode), prompt, loop.clients
