"""What was counted of a deployment's requests lately, as advice takes it."""

from __future__ import annotations

import numpy as np

from enova_coordinator.core.advice import Observed, observed_of
from enova_coordinator.core.model import Snapshot
from enova_coordinator.core.series import COLUMN, REQUEST_COUNTS
from enova_coordinator.telemetry import Telemetry

MINUTES = 9                        # of arrivals that are looked at

_ARRIVED = REQUEST_COUNTS.index("arrived")
# Tokens are counted whatever became of a request, so requests are as well.
_ENDED = tuple(REQUEST_COUNTS.index(name) for name in ("finished", "failed", "cut", "cancelled"))


def observed(telemetry: Telemetry, snapshot: Snapshot, deployment: str) -> Observed | None:
    """Rate and lengths of a deployment's requests; None where too few were counted."""
    minutes = np.zeros(MINUTES)
    seen = False
    for replica in snapshot.replicas_of(deployment):
        series = telemetry.replica_minutes(replica.name, count=MINUTES)
        if series is None:
            continue
        arrived = series.values[-MINUTES:, COLUMN["arrived"]]
        minutes[MINUTES - len(arrived) :] += np.nan_to_num(arrived)
        seen = seen or not np.isnan(arrived).all()
    totals = (
        (sum(each.counts[at] for at in _ENDED), each.prompt_tokens, each.output_tokens)
        for each in telemetry.totals(deployment).values()
    )
    lengths = telemetry.length_pairs(deployment)
    return observed_of([float(count) for count in minutes] if seen else [], totals, lengths)


def arrived_by_class(telemetry: Telemetry, deployment: str) -> dict[str, float]:
    """Requests of each class since the coordinator began to listen."""
    found: dict[str, float] = {}
    for (_, serving_class), totals in telemetry.totals(deployment).items():
        found[serving_class] = found.get(serving_class, 0.0) + totals.counts[_ARRIVED]
    return found
