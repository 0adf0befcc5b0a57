"""Kinds of prompts: communities of the graph in which each prompt is joined to its nearest neighbours; pure.

Theory of operation. Each vector is joined to its NEIGHBOURS nearest by cosine, an edge weighing as much as the cosine.
Louvain's method (Blondel et al., 2008) looks for the division with the highest modularity; RESOLUTION below 1 asks for
few, large communities, because a kind is worth telling apart only if there are answers enough to know its lengths.
Communities need not be round, yet a new prompt is assigned to the nearest centroid within reach, since that is what an
ingress can do in microseconds. So that what is fitted is what is applied, the members of a community are, in the end,
those who are assigned to it in this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from enova_recommender.recommend.max_tokens.survival import Floats, Ints
from enova_recommender.recommend.max_tokens.types import Centres, Vectors

NEIGHBOURS = 20            # of each prompt in the graph
RESOLUTION = 0.3           # of the communities: the coarser kinds (tried on seeds below 1000)
GRAPH_MAX = 2048           # prompts in the graph: two seconds of one core; the others join by their vectors
MEMBERS_MIN = 20           # of a community; smaller ones are none
KINDS_MAX = 16             # that an ingress compares a prompt with
REACH_SHARE = 0.01         # of a community's members that its reach leaves out
REACH_SLACK = 0.02         # of the cosine: prompts made from one template are all alike, and the next is not quite
_ROWS = 512                # of the table of cosines that are in memory at once
_BYTE = 127.0              # the largest entry of a vector of signed bytes
NOWHERE = -1               # of a prompt that belongs to no community


def unit(vectors: Vectors | Floats) -> Floats:
    """Vectors of length one; one without any word stays zero."""
    plain = vectors.astype(np.float64)
    lengths: Floats = np.sqrt(np.einsum("ij,ij->i", plain, plain))[:, None]
    return plain / np.maximum(lengths, 1e-12)


def neighbours(vectors: Vectors, count: int = NEIGHBOURS) -> tuple[Ints, Floats]:
    """The nearest `count` others of each vector and their cosines, in no order."""
    points = unit(vectors)
    count = min(count, len(points) - 1)
    nearest = np.empty((len(points), count), np.int64)
    cosines = np.empty((len(points), count))
    for start in range(0, len(points), _ROWS):
        table = points[start : start + _ROWS] @ points.T
        rows = np.arange(len(table))
        table[rows, start + rows] = -2.0      # itself is no neighbour
        nearest[start : start + _ROWS] = np.argpartition(-table, count - 1, axis=1)[:, :count]
        cosines[start : start + _ROWS] = np.take_along_axis(table, nearest[start : start + _ROWS], axis=1)
    return nearest, cosines


def communities(vectors: Vectors, *, seed: int) -> list[Ints]:
    """The members of each community, the largest first; singles and very small ones included."""
    import networkx as nx  # a second to import: only where communities are sought

    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(vectors)))
    if len(vectors) > 1:
        nearest, cosines = neighbours(vectors)
        for place, (others, weights) in enumerate(zip(nearest.tolist(), cosines.tolist(), strict=True)):
            graph.add_weighted_edges_from(
                (place, other, weight) for other, weight in zip(others, weights, strict=True) if weight > 0
            )
    found = nx.community.louvain_communities(graph, resolution=RESOLUTION, seed=seed)
    return sorted((np.array(sorted(members), np.int64) for members in found), key=lambda each: (-len(each), each[0]))


def centres(vectors: Vectors, *, seed: int) -> Centres:
    """Where the communities of some prompts lie; of many prompts, a seeded part is looked at."""
    if len(vectors) > GRAPH_MAX:
        rows = np.random.default_rng(seed).choice(len(vectors), GRAPH_MAX, replace=False)
        vectors = vectors[np.sort(rows)]
    members = [each for each in communities(vectors, seed=seed) if len(each) >= MEMBERS_MIN][:KINDS_MAX]
    return centres_of(vectors, members)


def centres_of(vectors: Vectors, members: Sequence[Ints]) -> Centres:
    """The centroids and reaches of given groups."""
    points = unit(vectors)
    middle = np.array([points[each].mean(axis=0) for each in members]).reshape(-1, vectors.shape[1])
    centroids = unit(np.round(unit(middle) * _BYTE))  # as they are sent: what is fitted is what is applied
    reaches = [
        float(np.quantile(points[each] @ centroid, REACH_SHARE)) - REACH_SLACK
        for each, centroid in zip(members, centroids, strict=True)
    ]
    return Centres(centroids, np.array(reaches))


def assign(vectors: Vectors, where: Centres) -> Ints:
    """The community of each vector: the nearest within reach, or NOWHERE."""
    if not len(where.centroids) or not len(vectors):
        return np.full(len(vectors), NOWHERE, np.int64)
    cosines = unit(vectors) @ where.centroids.T
    near = np.where(cosines >= where.reaches, cosines, -2.0)
    best = near.argmax(axis=1)
    return np.where(near[np.arange(len(best)), best] > -2.0, best, NOWHERE)
