"""What the coordinator has measured, as tests want to compare it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from enova.v1 import replica_service_pb2, replica_service_pb2_grpc
from enova_testing.fleet import UpFleet
from enova_testing.waiting import until

CALL_TIMEOUT_S = 5.0
SETTLE_S = 3.0  # frames come each second


@dataclass(frozen=True, slots=True)
class Counted:
    """What the ingresses have counted of a deployment since the coordinator began to listen."""

    finished: int
    prompt_tokens: int
    output_tokens: int

    def plus(self, finished: int, prompt_tokens: int, output_tokens: int) -> Counted:
        """These counts and more."""
        return Counted(self.finished + finished, self.prompt_tokens + prompt_tokens, self.output_tokens + output_tokens)


@dataclass(frozen=True, slots=True)
class Measured:
    """Totals from the ingresses, what is held now, and the engines' own counters (None where none is known)."""

    counted: Counted
    held: float
    engine_tokens: tuple[float, float] | None


def telemetry(fleet: UpFleet, parent: str) -> Measured:
    """Ask the coordinator."""
    with grpc.insecure_channel(fleet.facts["api"]) as channel:
        stub = replica_service_pb2_grpc.ReplicaServiceStub(channel)
        answer = stub.GetTelemetry(replica_service_pb2.GetTelemetryRequest(parent=parent), timeout=CALL_TIMEOUT_S)
    counted = Counted(
        sum(total.finished for total in answer.totals),
        sum(total.prompt_tokens for total in answer.totals),
        sum(total.output_tokens for total in answer.totals),
    )
    known = [s for s in answer.latest if s.HasField("prompt_tokens_total") and s.HasField("generation_tokens_total")]
    tokens = (sum(s.prompt_tokens_total for s in known), sum(s.generation_tokens_total for s in known))
    return Measured(counted, sum(sample.held for sample in answer.latest), tokens if known else None)


def settled(fleet: UpFleet, parent: str) -> Counted:
    """The totals once nothing has been added for longer than a frame takes to arrive."""
    last, since = telemetry(fleet, parent).counted, time.monotonic()

    def steady() -> bool:
        nonlocal last, since
        now = telemetry(fleet, parent).counted
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > SETTLE_S

    until(steady, timeout_s=30.0, what=f"no more traffic on {parent}")
    return last
