"""Live capacity of a deployment, from the rows that telemetry keeps: frames of its replicas, and what they prove; pure.

The time that a request takes is not in the rows; by Little's law the requests that are present and those that finish
tell it, interval by interval, so the latencies of the frames stay unknown here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.advice import REQUESTS_MIN
from enova_coordinator.core.model import Configuration
from enova_coordinator.core.series import COLUMN
from enova_recommender.memory import cache_layout, fit
from enova_recommender.recommend.live import (
    Evidence,
    LiveCapacity,
    NotYet,
    ReplicaFrames,
    cache_bytes,
    live_capacity,
)
from enova_recommender.recommend.request import settings_of_flags
from enova_recommender.recommend.types import EngineSettings
from enova_recommender.types import GpuModel, ModelShape

CACHE_QUANTILE = 0.99

_EVIDENCE = {
    Evidence.QUEUE: "requests waited without a break",
    Evidence.PLATEAU: "the rate did not grow with the load",
}


def replica_frames(rows: NDArray[np.floating], *, step_s: float) -> ReplicaFrames:
    """A replica's rows as frames; what its ingress holds back beyond what runs is waiting."""
    values = rows.astype(np.float64)
    running, waiting, held = (values[:, COLUMN[name]] for name in ("running", "waiting", "held"))
    return ReplicaFrames(
        interval_s=step_s,
        # An engine counts what it finished; where it does not say, the ingresses' count stands in.
        finished=_first_known(values[:, COLUMN["engine_finished"]], values[:, COLUMN["finished"]]),
        running=running,
        waiting=np.where(np.isnan(held), waiting, np.fmax(waiting, held - running)),
        latency_s=np.full(len(values), np.nan),
    )


def _first_known(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first column, or the second where the first was never measured."""
    return other if np.isnan(one).all() else one


def capacity_of(windows: Sequence[NDArray[np.floating]], *, step_s: float) -> LiveCapacity | NotYet:
    """What the newest window of each replica of one configuration says of what one of them carries."""
    return live_capacity([replica_frames(rows, step_s=step_s) for rows in windows])


def live_sentences(found: LiveCapacity | NotYet, *, max_num_seqs: int) -> Iterator[str]:
    """The same in words; `max_num_seqs` is what is set."""
    match found:
        case LiveCapacity():
            rate, load = found.n_limit_rps, found.saturation_load
            yield (
                f"Live capacity: one replica carries at most {rate.value:.3g} requests/s "
                f"({rate.low:.3g} to {rate.high:.3g} in 80 of 100 cases), with {load.value:.0f} in the batch: "
                f"{_EVIDENCE[found.evidence]} in {found.saturated_frames} of {found.frames} intervals. "
                f"By Little's law max_num_seqs {found.max_num_seqs} makes this rate; {max_num_seqs} is set."
            )
        case NotYet():
            yield f"Live capacity is not known: {found.reason}."
        case _:
            assert_never(found)


def live_plain(found: LiveCapacity | NotYet) -> dict[str, object]:
    """The same as plain values under the names of the API's `LiveCapacity`."""
    match found:
        case LiveCapacity():
            figures = {
                name: asdict(getattr(found, name)) for name in ("n_limit_rps", "t_limit_s", "saturation_load")
            }
            return figures | {
                "frames": found.frames, "max_num_seqs": found.max_num_seqs, "evidence": found.evidence.value,
                "saturated_frames": found.saturated_frames, "finished": found.finished,
            }  # fmt: skip
        case NotYet():
            return {
                "frames": found.frames, "doubt": found.doubt.value, "reason": found.reason,
                "at_least_rps": found.at_least_rps,
            }  # fmt: skip
        case _:
            assert_never(found)


def cache_plain(
    found: LiveCapacity | NotYet,
    shape: ModelShape | str,
    gpu: GpuModel | str,
    flags: Configuration,
    lengths: Sequence[tuple[int, int]],
) -> dict[str, object]:
    """KV cache of the batch at saturation by the lengths of prompts and answers together, or why it is not known."""
    if isinstance(found, NotYet):
        return {"memory_reason": "the batch at saturation is not known"}
    if isinstance(shape, str):
        return {"memory_reason": shape}
    if isinstance(gpu, str):
        return {"memory_reason": gpu}
    if len(lengths) < REQUESTS_MIN:
        return {"memory_reason": f"the lengths of {len(lengths)} requests are known, {REQUESTS_MIN} are needed"}
    settings = settings_of_flags(gpu, flags, shape)
    layout = cache_layout(
        shape, settings.precision, parallelism=settings.parallelism,
        enable_prefix_caching=settings.enable_prefix_caching,
    )  # fmt: skip
    sequences = max(1, round(found.saturation_load.value))
    return {
        "memory": {
            "sequences": sequences,
            "quantile": CACHE_QUANTILE,
            "cache_bytes": cache_bytes(layout, lengths, sequences=sequences, quantile=CACHE_QUANTILE),
            "configured_cache_bytes": _configured_bytes(settings, shape),
            "lengths": f"prompts and answers of the newest {len(lengths)} requests that ingresses told of",
        }
    }


def _configured_bytes(settings: EngineSettings, shape: ModelShape) -> int:
    found = fit(
        shape, settings.gpu, parallelism=settings.parallelism, precision=settings.precision,
        gpu_memory_utilization=settings.gpu_memory_utilization, max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens, max_model_len=settings.max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
    )  # fmt: skip
    return max(0, found.kv_blocks) * found.kv_block_bytes
