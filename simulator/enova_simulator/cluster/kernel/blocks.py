"""The KV cache of each replica as counted blocks, with a prefix cache by block hash."""

from __future__ import annotations

from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.state import Longs, State, compiled


@compiled
def blocks_of(tokens: int, size: int) -> int:
    """Blocks that hold so many tokens."""
    return (tokens + size - 1) // size


@compiled
def free(engine: Longs) -> int:
    """Blocks that can be taken now."""
    return int(engine[at.BLANK] + engine[at.IDLE])


@compiled
def find(state: State, replica: int, block_hash: int) -> int:
    """The node of a block hash, or -1."""
    node = state.buckets[replica, block_hash & (state.buckets.shape[1] - 1)]
    while node >= 0 and state.node_hashes[replica, node] != block_hash:
        node = state.nodes[replica, node, at.NEXT_IN_BUCKET]
    return int(node)


@compiled
def _unlink(state: State, replica: int, node: int) -> None:
    """Take a node out of the idle ones."""
    engine, nodes = state.engines[replica], state.nodes[replica]
    older, younger = nodes[node, at.OLDER], nodes[node, at.YOUNGER]
    if older >= 0:
        nodes[older, at.YOUNGER] = younger
    else:
        engine[at.OLDEST] = younger
    if younger >= 0:
        nodes[younger, at.OLDER] = older
    else:
        engine[at.YOUNGEST] = older
    engine[at.IDLE] -= 1


@compiled
def _evict(state: State, replica: int) -> None:
    """Blank the idle block that was used least recently."""
    engine, nodes = state.engines[replica], state.nodes[replica]
    node = engine[at.OLDEST]
    _unlink(state, replica, node)
    bucket = state.node_hashes[replica, node] & (state.buckets.shape[1] - 1)
    link = state.buckets[replica, bucket]
    if link == node:
        state.buckets[replica, bucket] = nodes[node, at.NEXT_IN_BUCKET]
    else:
        while nodes[link, at.NEXT_IN_BUCKET] != node:
            link = nodes[link, at.NEXT_IN_BUCKET]
        nodes[link, at.NEXT_IN_BUCKET] = nodes[node, at.NEXT_IN_BUCKET]
    nodes[node, at.NEXT_IN_BUCKET] = engine[at.SPARE_NODE]
    engine[at.SPARE_NODE] = node
    engine[at.BLANK] += 1


@compiled
def take(state: State, replica: int, count: int) -> None:
    """Give private blocks to a request; the caller has looked at `free`."""
    engine = state.engines[replica]
    while engine[at.BLANK] < count:
        _evict(state, replica)
    engine[at.BLANK] -= count
    engine[at.PRIVATE] += count


@compiled
def hold(state: State, replica: int, request: int, count: int) -> None:
    """Let the request hold its first `count` blocks, which are cached."""
    engine, first = state.engines[replica], state.requests[request, at.HASH_AT]
    for index in range(first, first + count):
        node = find(state, replica, state.hashes[index])
        if state.nodes[replica, node, at.HOLDERS] == 0:
            _unlink(state, replica, node)
            engine[at.SHARED] += 1
        state.nodes[replica, node, at.HOLDERS] += 1
        state.is_shared[index] = 1
    state.requests[request, at.SHARED_BLOCKS] = count


@compiled
def publish(state: State, replica: int, request: int) -> None:
    """Offer the prompt blocks that are full now to the prefix cache."""
    engine, row = state.engines[replica], state.requests[request]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    full = min(row[at.HASHES], row[at.COMPUTED] // size)
    for index in range(row[at.HASH_AT] + row[at.PUBLISHED], row[at.HASH_AT] + full):
        block_hash = state.hashes[index]
        if find(state, replica, block_hash) >= 0:
            continue
        node = engine[at.SPARE_NODE]
        engine[at.SPARE_NODE] = state.nodes[replica, node, at.NEXT_IN_BUCKET]
        bucket = block_hash & (state.buckets.shape[1] - 1)
        state.node_hashes[replica, node] = block_hash
        state.nodes[replica, node, at.NEXT_IN_BUCKET] = state.buckets[replica, bucket]
        state.nodes[replica, node, at.HOLDERS] = 1
        state.buckets[replica, bucket] = node
        engine[at.PRIVATE] -= 1
        engine[at.SHARED] += 1
        state.is_shared[index] = 1
        row[at.OWN_BLOCKS] -= 1
        row[at.SHARED_BLOCKS] += 1
    row[at.PUBLISHED] = max(row[at.PUBLISHED], full)


@compiled
def give_back(state: State, replica: int, request: int) -> None:
    """Take back a request's private blocks and its hold on shared ones."""
    engine, nodes, row = state.engines[replica], state.nodes[replica], state.requests[request]
    engine[at.PRIVATE] -= row[at.OWN_BLOCKS]
    engine[at.BLANK] += row[at.OWN_BLOCKS]
    if row[at.SHARED_BLOCKS]:
        for index in range(row[at.HASH_AT] + row[at.HASHES] - 1, row[at.HASH_AT] - 1, -1):
            if not state.is_shared[index]:
                continue
            state.is_shared[index] = 0
            node = find(state, replica, state.hashes[index])
            nodes[node, at.HOLDERS] -= 1
            if nodes[node, at.HOLDERS] == 0:
                engine[at.SHARED] -= 1
                engine[at.IDLE] += 1
                nodes[node, at.OLDER] = engine[at.YOUNGEST]
                nodes[node, at.YOUNGER] = -1
                if engine[at.YOUNGEST] >= 0:
                    nodes[engine[at.YOUNGEST], at.YOUNGER] = node
                else:
                    engine[at.OLDEST] = node
                engine[at.YOUNGEST] = node
    row[at.OWN_BLOCKS] = 0
    row[at.SHARED_BLOCKS] = 0
