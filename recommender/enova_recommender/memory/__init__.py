"""What a replica needs of each GPU's memory, how much KV cache is left, and why a model does not fit."""

from enova_recommender.memory.cache import (
    CacheGroup,
    CacheLayout,
    cache_element_bytes,
    cache_layout,
    kv_bytes_per_token,
    state_bytes,
)
from enova_recommender.memory.concurrency import BlockDemand, Method, Moment, block_demand, most_sequences
from enova_recommender.memory.division import GPU_MEMORY_UTILIZATION, Item, MemoryFit, fit, fit_host
from enova_recommender.memory.overheads import (
    MEASURED,
    Overheads,
    activation_bytes,
    graph_bytes,
    overheads_of,
    usable_bytes,
)
from enova_recommender.memory.weights import (
    gpu_weight_bytes,
    layer_weight_bytes,
    part_element_bytes,
    plain_element_bytes,
    weight_bytes,
)
from enova_recommender.memory.why_not import Change, Lever, MemorySettings, WhyNot, fit_settings, why_not

__all__ = [
    "GPU_MEMORY_UTILIZATION",
    "MEASURED",
    "BlockDemand",
    "CacheGroup",
    "CacheLayout",
    "Change",
    "Item",
    "Lever",
    "MemoryFit",
    "MemorySettings",
    "Method",
    "Moment",
    "Overheads",
    "WhyNot",
    "activation_bytes",
    "block_demand",
    "cache_element_bytes",
    "cache_layout",
    "fit",
    "fit_host",
    "fit_settings",
    "gpu_weight_bytes",
    "graph_bytes",
    "kv_bytes_per_token",
    "layer_weight_bytes",
    "most_sequences",
    "overheads_of",
    "part_element_bytes",
    "plain_element_bytes",
    "state_bytes",
    "usable_bytes",
    "weight_bytes",
    "why_not",
]
