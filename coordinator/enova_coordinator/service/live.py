"""What the newest configuration's replicas showed of their capacity, in words and in numbers for whoever asks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from enova.v1 import deployment_service_pb2
from enova_common.errors import NotFound
from enova_coordinator.core.engine_facts import shape_of
from enova_coordinator.core.gpu_types import gpu_of
from enova_coordinator.core.live_frames import cache_plain, capacity_of, live_plain, live_sentences
from enova_coordinator.core.model import Variant
from enova_coordinator.core.routes import DEFAULT_CONCURRENCY
from enova_coordinator.service import names
from enova_coordinator.service.advice import fill
from enova_coordinator.service.leading import Leading
from enova_recommender.recommend.live import LiveCapacity, NotYet

REPLICAS_MAX = 16  # that are looked at: more say hardly more, and somebody waits for the answer


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the replicas of a variant showed."""

    variant: Variant
    replicas: int
    found: LiveCapacity | NotYet

    @property
    def max_num_seqs(self) -> int:
        """What is set."""
        return int(self.variant.configuration.get("max_num_seqs", DEFAULT_CONCURRENCY))


async def live_words(leading: Leading, deployment: str) -> tuple[str, ...]:
    """Sentences on the live capacity of a deployment; none where no replica reported."""
    seen = await _seen(leading, deployment)
    if seen is None or not seen.replicas:
        return ()
    return tuple(live_sentences(seen.found, max_num_seqs=seen.max_num_seqs))


async def get_live_capacity(
    leading: Leading, request: deployment_service_pb2.GetLiveCapacityRequest
) -> deployment_service_pb2.LiveCapacity:
    """The same in numbers, with the memory of the batch at saturation."""
    name = names.deployment_name(request.name)
    if name not in leading.control.snapshot.deployments:
        raise NotFound(f"there is no {name}", field="name", remedy="enova get deployments lists them")
    message = deployment_service_pb2.LiveCapacity(name=name)
    seen = await _seen(leading, name)
    if seen is None:
        message.doubt = deployment_service_pb2.CAPACITY_DOUBT_TOO_FEW_FRAMES
        message.reason = message.memory_reason = "it has no variant yet"
        return message
    plain = await asyncio.to_thread(_plain, leading, name, seen)
    fill(message, plain)
    return message


def _plain(leading: Leading, name: str, seen: _Seen) -> dict[str, object]:
    variant = seen.variant
    facts = leading.models.get(variant.model)
    shape = shape_of(variant.model, json.loads(facts.config_json) if facts is not None and facts.config_json else None)
    gpu = gpu_of(leading.control.snapshot, variant.gpu_type)
    model = leading.advisor.types.model(gpu)
    sheet = f"GPU type {gpu.type or '(none yet)'} {model}" if isinstance(model, str) else model
    lengths = leading.telemetry.length_pairs(name)
    return {
        "variant": variant.name,
        "replicas": seen.replicas,
        "configured_max_num_seqs": seen.max_num_seqs,
        **live_plain(seen.found),
        **cache_plain(seen.found, shape, sheet, variant.configuration, lengths),
    }


async def _seen(leading: Leading, deployment: str) -> _Seen | None:
    """What the newest variant's replicas showed; None where there is no variant."""
    snapshot, telemetry = leading.control.snapshot, leading.telemetry
    variants = [variant for variant in snapshot.variants_of(deployment) if not variant.retired]
    if not variants:
        return None
    newest = variants[-1]
    replicas = [each.name for each in snapshot.replicas_of(deployment) if each.variant == newest.name]
    steps = round(telemetry.limits.window_s / telemetry.limits.step_s)
    windows = [
        found[1] for name in replicas[:REPLICAS_MAX] if (found := telemetry.replica_window(name, steps=steps))
    ]
    seen = await asyncio.to_thread(capacity_of, windows, step_s=telemetry.limits.step_s)
    return _Seen(newest, len(windows), seen)
