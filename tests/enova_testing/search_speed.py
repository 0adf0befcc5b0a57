"""What counts as work in the benchmark of searches: candidates that differ, in a space without copies."""

from __future__ import annotations

import numpy as np

from enova_recommender.recommend.search_result import SearchResult
from enova_recommender.recommend.search_space import SearchSpace
from enova_recommender.recommend.types import Workload


def space_for(workload: Workload) -> SearchSpace:
    """Prefix caching on and off only where something is cached: elsewhere both are one configuration."""
    return SearchSpace(prefix_caching=(True, False) if workload.cached_prefix_share else (True,))


def evaluations(found: SearchResult) -> int:
    """Candidates whose figures were computed for themselves.

    Settings that differ in max_model_len alone share theirs, and layouts that are impossible as a whole have none.
    """
    each = found.settings
    alike = np.stack([each.prefix_caching, each.max_num_seqs, each.max_num_batched_tokens, each.gpu_memory_utilization])
    distinct = np.unique(alike, axis=1)
    return len(distinct[0]) * sum(group.found is not None for group in found.groups)
