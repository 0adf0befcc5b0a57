"""Live capacity of a deployment: asked for, and in sentences."""

from __future__ import annotations

from typing import Any

from enova.v1.deployment_service_pb2 import GetLiveCapacityRequest, LiveCapacity
from enova_cli.client import CALL_TIMEOUT_S, Client
from enova_cli.plain import to_plain
from enova_common.errors import EnovaError

MEBIBYTE = 1 << 20


async def live_capacity(client: Client, name: str) -> dict[str, Any]:
    """What the coordinator says of it; where it cannot (nobody leads, an older release), the reason in its place."""
    request = GetLiveCapacityRequest(name=name)
    try:
        return to_plain(await client.call(lambda s: s.deployments.GetLiveCapacity(request, timeout=CALL_TIMEOUT_S)))
    except EnovaError as error:
        return to_plain(LiveCapacity(name=name, reason=error.message, memory_reason=error.message))


def live_line(plain: dict[str, Any]) -> str:
    """One line: the figures with their intervals, or why there are none."""
    if plain["n_limit_rps"] is None:
        return f"live capacity is not known: {plain['reason']}"
    rate, time, load = (_interval(plain[name]) for name in ("n_limit_rps", "t_limit_s", "saturation_load"))
    memory = plain["memory"]
    cache = (
        f"; the cache of {memory['sequences']} sequences takes {memory['cache_bytes'] / MEBIBYTE:.0f} MiB of "
        f"{memory['configured_cache_bytes'] / MEBIBYTE:.0f} on each GPU"
        if memory is not None
        else f"; its cache is not known: {plain['memory_reason']}"
    )
    return (
        f"live capacity: n_limit {rate} requests/s, t_limit {time} s, saturation at {load} requests in the batch "
        f"({plain['evidence']}, {plain['saturated_frames']} of {plain['frames']} intervals), max_num_seqs "
        f"{plain['max_num_seqs']} by Little's law where {plain['configured_max_num_seqs']} is set{cache}"
    )


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3g} ({interval['low']:.3g} to {interval['high']:.3g})"
