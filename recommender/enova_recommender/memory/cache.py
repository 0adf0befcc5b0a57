"""What a sequence holds of the KV cache, as vLLM's manager of blocks deals them out.

Theory of operation. All layers of one kind (full attention, one window size, recurrent states) make a bucket. Where
there is one bucket, one block holds `block_size` tokens of all layers. Where there are several, their pages are made
equally large (smaller ones hold more tokens a block, states are padded to one), and each bucket is cut into groups of
as many layers as the smallest bucket has. All groups draw blocks from one pool, and a block holds one page of each
layer of a group. A group of full attention keeps all tokens of a sequence, a window those that may still be attended
to and those in flight, a recurrence a fixed number of states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from enova_recommender.memory.weights import plain_element_bytes, stages
from enova_recommender.types import (
    AS_PUBLISHED,
    ELEMENT_BYTES,
    Attention,
    LatentAttention,
    ModelShape,
    Parallelism,
    Precision,
    Recurrence,
)

BLOCK_SIZE = 16        # tokens, vLLM's default on GPUs
HYBRID_ALIGNMENT = 16  # tokens that the block size is a multiple of where recurrent states set it
INDEXER_SCALE_BYTES, INDEXER_SCALE_GROUP = 4, 128
# States that a sequence holds of each recurrence: with prefix caching the last one and the one being made.
STATES, STATES_WITH_PREFIX_CACHING = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """`count` groups of layers of one kind; each holds blocks of its own of every sequence."""

    count: int
    block_tokens: int = 0             # 0: blocks hold states, not tokens
    window_tokens: int | None = None
    states: int = 0                   # blocks of a sequence whatever its length

    def blocks(self, tokens: int, *, in_flight_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds in these groups."""
        if self.states:
            return self.count * self.states
        if self.window_tokens is None:
            return self.count * -(-tokens // self.block_tokens)
        # A window may begin in the middle of a block, hence one more.
        kept = min(self.window_tokens - 1 + in_flight_tokens, tokens)
        return self.count * (-(-kept // self.block_tokens) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """How the cache of one GPU is cut: bytes of a block, and who holds how many."""

    block_bytes: int
    groups: tuple[CacheGroup, ...]

    @property
    def is_plain(self) -> bool:
        """Whether sequences hold blocks in proportion to their tokens."""
        return len(self.groups) == 1 and self.groups[0].count == 1 and self.groups[0].window_tokens is None

    def blocks(self, tokens: int, *, in_flight_tokens: int = 1) -> int:
        """Blocks that one sequence of so many tokens holds."""
        return sum(group.blocks(tokens, in_flight_tokens=in_flight_tokens) for group in self.groups)

    def tokens(self, blocks: int, max_model_len: int, *, in_flight_tokens: int) -> int:
        """Tokens as vLLM prints them: those of all sequences of `max_model_len` that the blocks carry."""
        each = self.blocks(max_model_len, in_flight_tokens=in_flight_tokens)
        return int(max(0, blocks) / each * max_model_len) if each else 0


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers of one bucket have in common: bytes of a token or of a state, and the window."""

    token_bytes: int = 0
    window_tokens: int | None = None
    state_bytes: int = 0


def cache_element_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of one cached element."""
    cached = shape.kv_cache_dtype if precision.kv_cache_dtype == "auto" else precision.kv_cache_dtype
    return ELEMENT_BYTES[cached] if cached else plain_element_bytes(shape, precision)


def kv_bytes_per_token(shape: ModelShape, precision: Precision = AS_PUBLISHED, *, tensor_parallel: int = 1) -> int:
    """Bytes of keys and values of one token in all layers, on one GPU; heads are replicated beyond their number."""
    element = cache_element_bytes(shape, precision)
    return sum(count * _token_bytes(mixer, element, tensor_parallel) for count, mixer in shape.attention_layers)


def _token_bytes(mixer: Attention | LatentAttention, element: float, tensor: int) -> int:
    """Bytes that one layer keeps of a token on one GPU."""
    held = element * mixer.cache_elements(tensor_parallel=tensor)
    if isinstance(mixer, LatentAttention) and mixer.indexer_cache_dim:
        # An indexer keeps its keys in 8 bits whatever the cache's type, with a scale in 32 bits for each 128.
        keys = mixer.indexer_cache_dim
        held += keys * (1 - element) + INDEXER_SCALE_BYTES * -(-keys // INDEXER_SCALE_GROUP)
    return round(held)


def state_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED, *, tensor_parallel: int = 1) -> int:
    """Bytes of the recurrent states of one sequence in all layers, on one GPU."""
    kinds = _buckets(shape, precision, tensor_parallel)
    return sum(kind.state_bytes * layers for kind, layers in kinds.items())


def cache_layout(
    shape: ModelShape,
    precision: Precision = AS_PUBLISHED,
    *,
    parallelism: Parallelism,
    block_size: int = BLOCK_SIZE,
    enable_prefix_caching: bool = True,
) -> CacheLayout:
    """The cache of the GPUs of the stage with the most layers."""
    buckets = _buckets(shape, precision, parallelism.tensor)
    if not buckets:
        return CacheLayout(block_bytes=1, groups=())
    share = max(stage.layers for stage in stages(shape, parallelism.pipeline)), shape.layers
    states = STATES_WITH_PREFIX_CACHING if enable_prefix_caching else STATES
    full = {kind: layers for kind, layers in buckets.items() if kind.token_bytes and kind.window_tokens is None}
    if len(full) == len(buckets):  # layers of full attention share one table of blocks, whatever their sizes
        total = sum(kind.token_bytes * layers for kind, layers in buckets.items()) * block_size
        return CacheLayout(block_bytes=_part(total, share), groups=(CacheGroup(count=1, block_tokens=block_size),))
    page = _page_bytes(buckets, block_size)
    layers_a_group = _layers_a_group(tuple(buckets.values()))
    groups = tuple(
        CacheGroup(
            count=-(-layers // layers_a_group),
            block_tokens=page // kind.token_bytes if kind.token_bytes else 0,
            window_tokens=kind.window_tokens,
            states=states if kind.state_bytes else 0,
        )
        for kind, layers in buckets.items()
    )
    return CacheLayout(block_bytes=_part(page * layers_a_group, share), groups=groups)


def _part(size_bytes: int, share: tuple[int, int]) -> int:
    """What one pipeline stage holds of it, with `share` = its layers and all layers."""
    return max(1, -(-size_bytes * share[0] // share[1]))


def _buckets(shape: ModelShape, precision: Precision, tensor: int) -> Mapping[_Kind, int]:
    """Layers by kind."""
    element, plain = cache_element_bytes(shape, precision), plain_element_bytes(shape, precision)
    buckets: dict[_Kind, int] = {}
    for block in shape.blocks:
        mixer = block.mixer
        match mixer:
            case None:
                continue
            case Attention():
                kind = _Kind(token_bytes=_token_bytes(mixer, element, tensor), window_tokens=mixer.window_tokens)
            case LatentAttention():
                kind = _Kind(token_bytes=_token_bytes(mixer, element, tensor))
            case Recurrence():
                of_state = plain if mixer.state_dtype == "auto" else ELEMENT_BYTES[mixer.state_dtype]
                held = of_state * mixer.state_elements + plain * mixer.convolution_elements
                kind = _Kind(state_bytes=round(held / tensor))
            case _:
                assert_never(mixer)
        if kind.token_bytes or kind.state_bytes:  # some layers take keys and values from an earlier one
            buckets[kind] = buckets.get(kind, 0) + block.count
    return buckets


def _page_bytes(buckets: Mapping[_Kind, int], block_size: int) -> int:
    """The page of a block that suits all kinds: a state fits into one, smaller tokens fill it up."""
    largest_state = max(kind.state_bytes for kind in buckets)
    tokens = [kind.token_bytes for kind in buckets if kind.token_bytes]
    if not tokens:
        return largest_state
    largest = max(tokens)
    if largest_state > largest * block_size:
        block_size = HYBRID_ALIGNMENT * -(-largest_state // (HYBRID_ALIGNMENT * largest))
    return largest * block_size


def _layers_a_group(counts: tuple[int, ...]) -> int:
    """The smallest bucket sets the size of groups, unless the largest is hardly larger."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
