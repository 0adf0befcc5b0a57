"""What the newest configuration's replicas showed of their capacity, in words for whoever asks."""

from __future__ import annotations

import asyncio

from enova_coordinator.core.live_frames import live_sentences
from enova_coordinator.core.routes import DEFAULT_CONCURRENCY
from enova_coordinator.service.leading import Leading

REPLICAS_MAX = 16  # that are looked at: more say hardly more, and somebody waits for the answer


async def live_words(leading: Leading, deployment: str) -> tuple[str, ...]:
    """Sentences on the live capacity of a deployment; none where no replica reported."""
    snapshot, telemetry = leading.control.snapshot, leading.telemetry
    variants = [variant for variant in snapshot.variants_of(deployment) if not variant.retired]
    if not variants:
        return ()
    newest = variants[-1]
    names = [each.name for each in snapshot.replicas_of(deployment) if each.variant == newest.name]
    steps = round(telemetry.limits.window_s / telemetry.limits.step_s)
    windows = [found[1] for name in names[:REPLICAS_MAX] if (found := telemetry.replica_window(name, steps=steps))]
    limit = int(newest.configuration.get("max_num_seqs", DEFAULT_CONCURRENCY))
    return await asyncio.to_thread(
        lambda: tuple(live_sentences(windows, step_s=telemetry.limits.step_s, max_num_seqs=limit))
    )
