"""Live capacity of a deployment, from the rows that telemetry keeps: frames of its replicas, and what they prove; pure.

The time that a request takes is not in the rows; by Little's law the requests that are present and those that finish
tell it, interval by interval, so the latencies of the frames stay unknown here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.series import COLUMN
from enova_recommender.recommend.live import Evidence, LiveCapacity, NotYet, ReplicaFrames, live_capacity

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


def live_sentences(windows: Sequence[NDArray[np.floating]], *, step_s: float, max_num_seqs: int) -> Iterator[str]:
    """What the newest window of each replica of one configuration says of what one of them carries."""
    if not windows:
        return
    match live_capacity([replica_frames(rows, step_s=step_s) for rows in windows]):
        case LiveCapacity() as found:
            rate, load = found.n_limit_rps, found.saturation_load
            yield (
                f"Live capacity: one replica carries at most {rate.value:.3g} requests/s "
                f"({rate.low:.3g} to {rate.high:.3g} in 80 of 100 cases), with {load.value:.0f} in the batch: "
                f"{_EVIDENCE[found.evidence]} in {found.saturated_frames} of {found.frames} intervals. "
                f"By Little's law max_num_seqs {found.max_num_seqs} makes this rate; {max_num_seqs} is set."
            )
        case NotYet() as doubt:
            yield f"Live capacity is not known: {doubt.reason}."
